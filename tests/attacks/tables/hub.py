"""Who may call the hub, what it keeps of it, and what it takes (rows 29 to 32)."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from cloud_hub.ground import audit, ca
from shared.ids import DeviceId
from tests.attacks.defence import Defence, against, always

_HTTP: Final = "tests/unit/ground/test_ground_http.py::"
_DESK: Final = "tests/unit/devices/test_devices_desk.py::"
_ROUTES: Final = "tests/unit/devices/test_devices_routes.py::"
_BLOBS: Final = "tests/unit/releases/test_blobs.py::"
_RENEWAL: Final = "tests/unit/devices/test_renewal_desk.py::"
_CA: Final = "tests/unit/ground/test_ground_ca.py::"

_link = audit._link


def _unchained(_previous: str, **row: Any) -> str:
    return _link(audit.GENESIS, **row)


def _blind(previous: str, **_row: Any) -> str:
    return previous


_UNHASHED: Final = SimpleNamespace(sha256=lambda data: SimpleNamespace(hexdigest=data.hex))

_issue = ca.Authority.issue_device
_ANY_TEXT: Final = re.compile(r"[^\n]*")


def _as_asked(authority: ca.Authority, csr_pem: str, *, device: DeviceId, **rest: Any) -> Any:
    (name,) = x509.load_pem_x509_csr(csr_pem.encode()).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return _issue(authority, csr_pem, device=DeviceId(str(name.value)), **rest)


async def _yes(*_: object) -> bool:
    return True


async def _whole_body(_scope: object, receive: Any) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


DEFENCES: Final[tuple[Defence, ...]] = (
    against(
        29,
        _HTTP + "test_a_token_needs_its_whole_secret",
        ("cloud_hub.ground.auth.hmac", SimpleNamespace(compare_digest=always(True))),
    ),
    against(29, _DESK + "test_the_secret_is_nowhere_stored", ("cloud_hub.devices.desk.hashlib", _UNHASHED)),
    against(
        29,
        _ROUTES + "test_enrolling_is_throttled_by_address",
        ("cloud_hub.ground.rates.Buckets.take", always(0)),
    ),
    against(
        30,
        _DESK + "test_fifty_at_once_with_one_token_and_one_gets_in",
        ("cloud_hub.devices.tables.spend_grant", always(True)),
        ("cloud_hub.devices.rules.check_grant", lambda grant, **_: grant),
    ),
    against(
        30, _ROUTES + "test_roles_bound_what_is_possible", ("cloud_hub.ground.auth.Role.rank", property(always(0)))
    ),
    against(30, _CA + "test_the_name_is_the_hubs_choice", ("cloud_hub.ground.ca.Authority.issue_device", _as_asked)),
    against(
        30,
        "tests/unit/releases/test_release_routes.py::"
        "test_a_device_reads_only_files_of_releases_that_are_assigned_to_it",
        ("cloud_hub.releases.assigning.Assigning.may_read", _yes),
    ),
    against(
        30,
        _RENEWAL + "test_a_stolen_certificate_without_its_key_is_refused",
        ("cloud_hub.devices.renewing.is_proof", always(True)),
    ),
    against(
        30,
        _RENEWAL + "test_a_proof_for_another_request_name_or_ca_is_refused",
        ("cloud_hub.devices.renewing.is_proof", always(True)),
    ),
    against(
        30,
        _RENEWAL + "test_once_a_certificate_is_used_the_one_before_it_gets_only_its_answer_again[renewed]",
        ("cloud_hub.devices.certificate_tables.has_used_successor", always(False)),
    ),
    against(
        30,
        "tests/unit/devices/test_sightings.py::test_what_the_hub_signs_for_a_takeover_is_not_taken_up",
        ("cloud_hub.devices.sightings._is_adoptable", always(True)),
    ),
    against(
        31, "tests/unit/ground/test_ground_audit.py::test_tampering_shows", ("cloud_hub.ground.audit._link", _blind)
    ),
    against(
        31,
        "tests/unit/ground/test_ground_audit.py::test_tampering_shows[removed]",
        ("cloud_hub.ground.audit._link", _unchained),
    ),
    against(32, _HTTP + "test_a_body_has_a_bound", ("cloud_hub.ground.bounds._read_body", _whole_body)),
    against(
        32,
        _BLOBS + "test_what_is_not_as_announced_leaves_nothing",
        ("cloud_hub.releases.blobs.Blobs._finish", lambda blobs, upload, _digest: blobs._keep(upload)),
    ),
    against(
        32,
        "tests/unit/releases/test_release_routes.py::test_attack_32_a_name_that_would_be_a_path_is_refused",
        ("shared.ids._NAME", _ANY_TEXT),
        ("shared.ids._VERSION", _ANY_TEXT),
    ),
)
