"""Who may call the hub, what it keeps of it, and what it takes (rows 29 to 32)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

from cloud_hub.ground import audit
from tests.attacks.defence import Defence, against, always

_HTTP: Final = "tests/unit/ground/test_ground_http.py::"
_DESK: Final = "tests/unit/devices/test_devices_desk.py::"
_ROUTES: Final = "tests/unit/devices/test_devices_routes.py::"
_BLOBS: Final = "tests/unit/releases/test_blobs.py::"
_CA: Final = "tests/unit/ground/test_ground_ca.py::"

_link = audit._link


def _unchained(_previous: str, **row: Any) -> str:
    return _link(audit.GENESIS, **row)


def _blind(previous: str, **_row: Any) -> str:
    return previous


DEFENCES: Final[tuple[Defence, ...]] = (
    against(
        29,
        _HTTP + "test_a_token_needs_its_whole_secret",
        ("cloud_hub.ground.auth.hmac", SimpleNamespace(compare_digest=always(True))),
    ),
    against(29, _DESK + "test_the_secret_is_nowhere_stored", ("cloud_hub.devices.desk._secret_sha256", lambda text: text)),
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
    against(30, _ROUTES + "test_roles_bound_what_is_possible", ("cloud_hub.ground.auth.Role.rank", property(always(0)))),
    against(31, "tests/unit/ground/test_ground_audit.py::test_tampering_shows", ("cloud_hub.ground.audit._link", _blind)),
    against(
        31,
        "tests/unit/ground/test_ground_audit.py::test_tampering_shows[removed]",
        ("cloud_hub.ground.audit._link", _unchained),
    ),
)
