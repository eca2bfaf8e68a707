"""Decisions of the devices room, over plain values: who may join under which name, who is welcome, what is newer.

Presence is ordered by (epoch, boot, session), because messages may arrive late or twice. The epoch changes when the
device's disk is replaced or emptied; its counters then begin anew, so an unknown epoch is always taken as newer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cloud_hub.ground.refusals import NotAllowed
from shared.errors import Conflict, InvalidValue, OutriderError
from shared.ids import DeviceId, parse_device_id

MAX_LABELS: Final = 32
MAX_LABEL_CHARS: Final = 63
MAX_USES: Final = 10_000
MAX_TTL_MS: Final = 366 * 24 * 3600 * 1000
MAX_REASON_CHARS: Final = 200
_AFTER_QUARANTINE: Final = (
    "find out whether somebody else has its key: if nobody has, `outrider device quarantine {name} --lift`; "
    "else `outrider device revoke {name}`, and then enrol it again"
)
PRESENCE: Final = frozenset({"birth", "death", "reported"})


class Standing(StrEnum):
    """Whether a device is welcome: QUARANTINED ones keep their certificate and get nothing, REVOKED ones have none."""

    GOOD = ""
    QUARANTINED = "quarantined"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class JoinGrant:
    """A join token as stored, without its secret.

    Attributes:
        device: the only name that it gives, None when it gives any free one.
        profile: the profile that it gives, None when the device says its own.
    """

    name: str
    device: DeviceId | None
    profile: str | None
    uses_left: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Presence:
    """The newest birth of a device that the hub has seen; zeros before the first."""

    epoch: str
    boot: int
    session: int
    online: bool


@dataclass(frozen=True, slots=True)
class ReportMark:
    """The newest report that the hub has: `boot` and `revision`."""

    boot: int
    revision: int


@dataclass(frozen=True, slots=True)
class CertificateStanding:
    """Whose certificate it is, and what was done to it or its device since."""

    device: DeviceId
    is_revoked: bool
    is_quarantined: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a name whose certificate is not: its standing, and when its newest known one was issued."""

    standing: Standing
    newest_ms: int


@dataclass(frozen=True, slots=True)
class DeviceTrust:
    """A device's newest certificate: when it ends, who signed it, which CAs the device was told with it.

    Issuer and list are empty for a certificate of before this was noted.
    """

    device: DeviceId
    expires_ms: int
    issuer: str
    told: frozenset[str]


def check_renewal(
    standing: CertificateStanding | None, *, name: str, ends_ms: int, expired_ms: int, now_ms: int
) -> DeviceId:
    """The device whose certificate may be renewed, or the reason why it may not.

    Args:
        standing: what is known of the certificate.
        name, ends_ms: what it says itself.
        expired_ms: how long after its end it may still be renewed; 0 for not at all.
        now_ms: the hub's clock.
    """
    again = "enrol the device again with a new join token: `outrider-hub token create --kind join --device NAME`"
    if standing is None or standing.device != name:
        raise NotAllowed(
            "the certificate is not one of this hub's devices", code="renew.unknown_certificate", hint=again
        )
    if standing.is_revoked:
        raise NotAllowed("the certificate was revoked", code="renew.revoked", hint=again)
    if standing.is_quarantined:
        raise NotAllowed(
            "the device is in quarantine",
            code="renew.quarantined",
            hint=_AFTER_QUARANTINE.format(name=name),
        )
    if now_ms >= ends_ms and not expired_ms:
        raise NotAllowed("certificates that have expired are not renewed here", code="renew.disabled", hint=again)
    if now_ms >= ends_ms + expired_ms:
        raise NotAllowed("the certificate has expired too long ago", code="renew.too_old", hint=again)
    return standing.device


def superseded() -> OutriderError:
    """The error for a certificate whose successor is in use."""
    return NotAllowed(
        "the certificate was renewed, and the one that followed it is in use",
        code="renew.superseded",
        hint="if the device's disk was set back to an older copy, enrol it again with a new join token; "
        "if it was not, somebody else has its key: revoke the device first",
    )


def is_adoptable(known: Known | None, *, begins_ms: int) -> bool:
    """Whether an unknown certificate of the hub's own CA is one that a restored database has forgotten.

    Only the hub makes them and it notes each one, so that one which begins after all that is noted was noted in what
    was lost. An older one is unknown because it was forgotten on purpose.
    """
    return known is not None and known.standing is Standing.GOOD and begins_ms > known.newest_ms


def without_bundle(trust: Sequence[DeviceTrust], *, wanted: str, now_ms: int) -> tuple[DeviceId, ...]:
    """Devices with a live certificate that were not told of this CA yet."""
    return tuple(each.device for each in trust if each.expires_ms > now_ms and wanted not in each.told)


def not_of(trust: Sequence[DeviceTrust], *, issuer: str, now_ms: int) -> tuple[DeviceId, ...]:
    """Devices whose newest certificate is live and was not signed by this CA."""
    return tuple(each.device for each in trust if each.expires_ms > now_ms and each.issuer != issuer)


def check_grant(grant: JoinGrant | None, *, now_ms: int) -> JoinGrant:
    """The grant, or the reason why it admits nobody: unknown, expired or spent."""
    if grant is None:
        raise NotAllowed(
            "the join token is not known to this hub",
            code="enrol.token_unknown",
            hint="make one with `outrider-hub token create --kind join` on this hub and copy all of it",
        )
    if now_ms >= grant.expires_ms:
        raise NotAllowed(
            "the join token has expired",
            code="enrol.token_expired",
            hint="make a new one with `outrider-hub token create --kind join`",
        )
    if grant.uses_left < 1:
        raise spent()
    return grant


def spent() -> OutriderError:
    """The error for a token that has done its work."""
    return Conflict(
        "the join token has been used",
        code="enrol.token_spent",
        hint="make a new one with `outrider-hub token create --kind join`; "
        "if you did not use it, look at `outrider audit` for who did",
    )


def choose_name(grant: JoinGrant, *, proposed: str | None, generated: DeviceId) -> DeviceId:
    """The name that the device gets if it is free: the token's, else the proposed, else the generated one."""
    if grant.device is not None:
        if proposed not in (None, grant.device):
            raise NotAllowed(
                f"the join token is for {grant.device!r} only",
                code="enrol.token_bound",
                hint=f"enrol as {grant.device}, or make a token without --device",
            )
        return grant.device
    return generated if proposed is None else parse_device_id(proposed)


def choose_profile(grant: JoinGrant, *, proposed: str) -> str:
    """The device's profile: the token's where it has one, else what the device says."""
    profile = grant.profile or proposed
    if not 0 < len(profile) <= MAX_LABEL_CHARS or not profile.replace("-", "").replace("_", "").isalnum():
        raise InvalidValue(f"profile {profile[:80]!r} is not a name", code="invalid.profile")
    return profile


def name_taken(name: DeviceId) -> OutriderError:
    """The error for a name that another device has."""
    return Conflict(
        f"there is a device {name!r} already",
        code="enrol.name_taken",
        hint=f"choose another name; to enrol {name} again after a loss, use a token made with --device {name}",
    )


def unlistable(name: DeviceId) -> OutriderError:
    """The error for a name whose old certificate could not be kept out of the broker."""
    return Conflict(
        f"{name!r} has a certificate of an earlier version of the hub, which cannot be put onto the revocation list",
        code="enrol.old_certificate",
        hint="start the old device once, so that it shows its certificate to the hub; or choose another name, or wait "
        "until that certificate has ended (a month at most)",
    )


def quarantined(name: DeviceId) -> OutriderError:
    """The error for a name in quarantine, which a new certificate would not end."""
    return Conflict(
        f"{name!r} is in quarantine",
        code="enrol.quarantined",
        hint=_AFTER_QUARANTINE.format(name=name) + " (the join token keeps its use)",
    )


def is_newer_birth(known: Presence, *, epoch: str, boot: int, session: int) -> bool:
    """Whether a birth is not older than what is known; the same one again counts, and does no harm."""
    return epoch != known.epoch or (boot, session) >= (known.boot, known.session)


def is_current_death(known: Presence, *, boot: int, session: int) -> bool:
    """Whether a death is of the newest known birth; one of an earlier connection came late and says nothing."""
    return (boot, session) >= (known.boot, known.session)


def is_newer_report(known: ReportMark, *, boot: int, revision: int) -> bool:
    """Whether a report is newer than the stored one."""
    return (boot, revision) > (known.boot, known.revision)


def takes(standing: Standing, leaf: str) -> bool:
    """Whether the hub takes what a device sends on a topic's leaf; of one in quarantine only that it is there."""
    return standing is Standing.GOOD or (standing is Standing.QUARANTINED and leaf in PRESENCE)


def check_reason(reason: str) -> str:
    """The reason that a person gives, fit for one line of a log; raises InvalidValue."""
    if len(reason) > MAX_REASON_CHARS or (reason and not reason.isprintable()):
        raise InvalidValue(
            f"a reason is one line of at most {MAX_REASON_CHARS} printable characters", code="invalid.reason"
        )
    return reason


def next_standing(now: Standing, wanted: Standing, *, device: str) -> bool:
    """Whether a device's standing changes to what is wanted; raises Conflict for what would undo a revocation."""
    if now is Standing.REVOKED and wanted is not Standing.REVOKED:
        raise Conflict(
            f"{device!r} is revoked",
            code="conflict.revoked",
            hint=f"enrol it again: outrider-hub token create --kind join --device {device}",
        )
    return now is not wanted


def merge_labels(labels: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The labels after these changes, of which None removes one; raises InvalidValue.

    What is removed is checked like what is set: both go into the audit log.
    """
    _check_labels({key: value or "" for key, value in changes.items()})
    merged = {key: value for key, value in {**labels, **changes}.items() if value is not None}
    if len(merged) > MAX_LABELS:
        raise InvalidValue(
            f"a device has at most {MAX_LABELS} labels", code="invalid.labels", hint="remove some: KEY- removes KEY"
        )
    return merged


def _check_labels(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        fits = 0 < len(key) <= MAX_LABEL_CHARS and len(value) <= MAX_LABEL_CHARS
        if not fits or not (key + value).isprintable() or "=" in key or "," in key + value:
            raise InvalidValue(
                f"label {key[:40]!r} is not valid",
                code="invalid.labels",
                hint=f"keys and values have up to {MAX_LABEL_CHARS} printable characters, no comma; keys no '='",
            )


def check_join_request(*, uses: int, ttl_ms: int) -> None:
    """Raise InvalidValue unless a token with these bounds may be made."""
    if not 1 <= uses <= MAX_USES:
        raise InvalidValue(f"a join token has 1 to {MAX_USES} uses", code="invalid.uses")
    if not 0 < ttl_ms <= MAX_TTL_MS:
        raise InvalidValue("a token lives longer than nothing and at most a year", code="invalid.ttl")
