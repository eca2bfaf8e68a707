"""Who may do what at the broker, as devices and as impostors (rows 15, 22 to 28)."""

from __future__ import annotations

import re
import ssl
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from cloud_hub.ground import broker, ca, revocation
from edge_agent.adapters import tls
from shared.wire import topics
from shared.wire.envelope import decode_envelope
from shared.wire.messages import decode_body
from tests.attacks.defence import Defence, Removal, against, always

_LIVE: Final = "tests/live/test_broker_defences_live.py::"
_STANDING: Final = "tests/unit/devices/test_standing.py::"
_LINKS: Final = "tests/unit/trust/test_ca_links.py::"
_TLS: Final = "tests/unit/edge_agent/test_tls.py::"
_SWITCHBOARD: Final = "tests/unit/ground/test_ground_switchboard.py::"

_configuration = broker.configuration
_access_list = revocation.access_list
_make_list = revocation.make_list
_usages = x509.ExtendedKeyUsage
_furnished = tls._furnished


def _without(*lines: str, instead: tuple[str, ...] = ()) -> Removal:
    """The broker's configuration without the lines that begin so."""

    def stand_in(settings: broker.BrokerSettings, *, user: str | None) -> str:
        kept = [line for line in _configuration(settings, user=user).splitlines() if not line.startswith(lines)]
        return "\n".join([*kept, *instead, ""])

    return "cloud_hub.ground.broker.configuration", stand_in


def _opened(rule: str) -> Removal:
    """An access list with one more rule for all."""

    def stand_in(hub_name: str, **rest: Any) -> str:
        return _access_list(hub_name, **rest) + rule + "\n"

    return "cloud_hub.ground.revocation.access_list", stand_in


def _nobody_denied(hub_name: str, *, denied: object = (), mark: str = "") -> str:
    return _access_list(hub_name, mark=mark)


def _nobody_revoked(authority: ca.Authority, revoked: object, **rest: Any) -> bytes:
    return _make_list(authority, (), **rest)


def _for_all(_usages_asked: object) -> x509.ExtendedKeyUsage:
    return _usages([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


def _open_for_anybody(topic: str, payload: bytes) -> Any:
    envelope = decode_envelope(payload)
    return topics.parse_up(topic).device, envelope, decode_body(envelope)


def _of_any_name(*arguments: Any, **named: Any) -> ssl.SSLContext:
    context = _furnished(*arguments, **named)
    context.check_hostname = False
    return context


def _of_anybody(*arguments: Any, **named: Any) -> ssl.SSLContext:
    context = _of_any_name(*arguments, **named)
    context.verify_mode = ssl.CERT_NONE
    return context


def _nothing_seen(seen: tuple[Any, ...], birth: Any) -> Any:
    return (*seen, birth), ""


_EVERYTHING: Final = f"pattern readwrite {topics.ROOT}/#\npattern readwrite #\npattern readwrite $SYS/#"

DEFENCES: Final[tuple[Defence, ...]] = (
    against(
        15,
        _LIVE + "test_attack_15_nothing_is_said_without_tls",
        _without(
            "cafile",
            "certfile",
            "keyfile",
            "crlfile",
            "tls_version",
            "require_certificate",
            "use_",
            "allow_",
            instead=("allow_anonymous true",),
        ),
    ),
    against(
        15,
        _LIVE + "test_attack_15_without_a_certificate_nobody_comes_in",
        _without("require_certificate", "use_", "allow_", "crlfile", instead=("allow_anonymous true",)),
    ),
    against(22, _LIVE + "test_attack_22_and_23_nobody_speaks_in_anothers_name", _opened(_EVERYTHING)),
    against(
        22,
        _SWITCHBOARD + "test_what_does_not_belong_is_counted",
        ("cloud_hub.ground.switchboard._open", _open_for_anybody),
    ),
    against(23, _LIVE + "test_attack_22_and_23_nobody_speaks_in_anothers_name", _opened(_EVERYTHING)),
    against(23, _LIVE + "test_attack_23_nobody_reads_what_is_anothers", _opened(_EVERYTHING)),
    against(
        23,
        _LIVE + "test_attack_23_nobody_commands_itself_or_leaves_poison",
        _opened(f"pattern readwrite {topics.acl_patterns()[1]}"),
    ),
    against(
        23,
        "tests/unit/shared/test_ids.py::test_device_names_that_are_refused",
        ("shared.ids._NAME", re.compile(r"[^\n]*")),
    ),
    against(24, _LIVE + "test_attack_24_nobody_takes_over_anothers_session", _without("use_username_as_clientid")),
    against(
        24,
        _STANDING + "test_one_name_in_two_places_is_quarantined_with_the_reason",
        ("cloud_hub.devices.clones.note_birth", _nothing_seen),
    ),
    against(
        25,
        _LIVE + "test_attack_25_a_revoked_certificate_does_not_come_in",
        ("cloud_hub.ground.revocation.make_list", _nobody_revoked),
    ),
    against(
        25,
        _LIVE + "test_attack_25_who_is_denied_is_heard_no_more_on_the_connection_that_it_has",
        ("cloud_hub.ground.revocation.access_list", _nobody_denied),
    ),
    against(
        25,
        _STANDING + "test_a_revoked_device_is_listed_denied_and_refused",
        "cloud_hub.devices.tables.revoke_certificates",
    ),
    against(
        25,
        _STANDING + "test_a_new_token_lifts_the_denial_for_the_new_certificate_only",
        "cloud_hub.devices.tables.revoke_certificates",
    ),
    against(
        25,
        _STANDING + "test_quarantine_keeps_the_certificate_and_gives_nothing",
        ("cloud_hub.devices.standing.Standings.takes", always(True)),
    ),
    against(
        26,
        _STANDING + "test_the_list_is_made_anew_long_before_it_ends",
        ("cloud_hub.ground.revocation.AccessLists.is_due", always(False)),
    ),
    against(
        26,
        "tests/unit/ground/test_revocation.py::"
        "test_every_list_begins_later_than_the_one_before_and_never_in_the_future",
        (
            "cloud_hub.ground.revocation.begin_after",
            lambda _after, *, now_ms: revocation._to_time(now_ms) - ca.BACKDATE,
        ),
    ),
    against(
        26,
        "tests/unit/ground/test_ground_small.py::test_certificates_are_issued_when_they_must_be",
        ("cloud_hub.ground.transport.needs_renewal", always(False)),
    ),
    against(
        26,
        "tests/machines/test_renewal_core.py::test_what_has_expired_is_renewed_at_once",
        ("edge_agent.core.renewal.due_ms", always(2**62)),
    ),
    against(
        27,
        _LIVE + "test_attack_27_a_packet_that_is_too_large_ends_the_connection",
        _without("max_packet_size"),
    ),
    against(
        27, _SWITCHBOARD + "test_a_flood_is_counted_and_settled", ("cloud_hub.ground.switchboard.LANE_DEPTH", 10**6)
    ),
    against(
        27,
        "tests/unit/telemetry/test_telemetry_desk.py::test_the_same_batch_again_is_a_duplicate_with_one_effect",
        ("cloud_hub.telemetry.taking.meets", always(False)),
    ),
    against(
        28,
        _TLS + "test_a_foreign_ca_and_another_host_are_refused_with_and_without_dates",
        ("edge_agent.adapters.tls._furnished", _of_any_name),
    ),
    against(
        28,
        "tests/unit/edge_agent/test_fetcher.py::test_only_the_pinned_ca_is_trusted_and_foreign_devices_are_refused",
        ("edge_agent.adapters.tls._furnished", _of_anybody),
        "edge_agent.adapters.tls.check_dates",
        "edge_agent.adapters.tls.check_issuer",
    ),
    against(
        28,
        "tests/unit/edge_agent/test_enrolment.py::test_an_impostor_gets_neither_token_nor_request",
        ("edge_agent.enrolment.vouched", lambda published, *, pins: published),
    ),
    against(28, _LINKS + "test_a_device_certificate_is_no_link", ("shared.trust.ca_links._may_sign", always(True))),
    against(
        28,
        _LINKS + "test_without_a_link_of_the_pinned_one_nothing_follows",
        ("shared.trust.ca_links._is_signed_by", always(True)),
    ),
    against(28, _LIVE + "test_attack_28_no_older_tls", _without("tls_version", instead=("tls_version tlsv1.2",))),
    against(
        28,
        _LIVE + "test_attack_28_a_devices_certificate_is_no_servers",
        ("cloud_hub.ground.ca.x509.ExtendedKeyUsage", _for_all),
    ),
    against(
        28,
        _LIVE + "test_attack_28_a_servers_certificate_is_no_clients",
        ("cloud_hub.ground.ca.x509.ExtendedKeyUsage", _for_all),
    ),
)
