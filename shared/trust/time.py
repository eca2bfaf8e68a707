"""The time, as the hub attests it to one device that asked: signed online with a key that the root authorises.

    {"signed": {"_type": "time", "spec_version": "1", "device": …, "nonce": …, "time_ms": …}, "signatures": […]}

signed over canonical JSON; beside it, `"roots": […]` holds the texts of the roots that come after the asker's, which
vouch for themselves. The root lists the keys beside those of assignments: `"x-outrider": {"time": {"keyids": […],
"threshold": 1}}`. A root without that entry belongs to a hub that attests no time; its devices keep to their clocks.

What is refused has a code below `trust.time`: an answer that was replayed (another nonce), that is for another device,
that the wrong key signed, that lies below what signed documents prove or further ahead than the root allows (Uptane
Standard 2.0, section 5.3.2 "time server"; its issues 31 and 267).

Not here: what a device does with the time (edge_agent/core/trusted_time.py), and how it asks.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from shared.errors import InvalidValue, TrustError
from shared.ids import DeviceId, parse_device_id
from shared.limits import MAX_ROOT_BYTES, MAX_TIME_ANSWER_BYTES
from shared.trust import strict
from shared.trust.assignment import EXTENSION, authorised_keys
from shared.trust.library import Root, Signature, Signer, encode_canonical
from shared.trust.metadata import check_threshold, expires_ms, translated
from shared.trust.roles import ROOT, file_name
from shared.wire.verification import UNATTESTED

TYPE: Final = "time"
SPEC_VERSION: Final = "1"
MAX_PAST_ROOT_MS: Final = 366 * 24 * 3_600_000
"""How far past the root's expiry a time is still taken for possible.

A root that nobody renewed stops installs by itself; it must not cut devices without a clock off from their hub too.
"""

_WHAT: Final = "the attested time"
_NONCE: Final = re.compile(r"[A-Za-z0-9_-]{43}")


class AttestedTime(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed: the hub's clock when it answered the one who drew this nonce."""

    device: DeviceId
    nonce: str
    time_ms: int


def check_nonce(nonce: str) -> None:
    """Raise InvalidValue unless it is the base64url form of 32 bytes, without padding."""
    if not _NONCE.fullmatch(nonce):
        raise InvalidValue("a nonce is 32 random bytes in base64url, 43 characters", code="invalid.nonce")


def sign_time(time: AttestedTime, signer: Signer) -> bytes:
    """The signed answer; raises InvalidValue when name or nonce are unusable."""
    parse_device_id(time.device)
    check_nonce(time.nonce)
    signed = {**msgspec.to_builtins(time), "_type": TYPE, "spec_version": SPEC_VERSION}
    signature = signer.sign(_canonical(signed))
    document = {"signed": signed, "signatures": [{"keyid": signature.keyid, "sig": signature.signature}]}
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def newer_roots(answer: bytes) -> dict[str, bytes]:
    """The roots that came along, unverified, by the name of their file; raises TrustError below `trust.time`."""
    with _renamed():
        roots = strict.parse_json(answer, what=_WHAT, max_bytes=MAX_TIME_ANSWER_BYTES).get("roots", [])
        if not isinstance(roots, list) or not all(isinstance(root, str) for root in roots):
            raise strict.malformed(_WHAT, "'roots' is not a list of texts")
        found = {}
        for root in roots:
            data = root.encode()
            document = strict.parse_json(data, what="a root that came along", max_bytes=MAX_ROOT_BYTES)
            strict.check_metadata(document, what="a root that came along")
            found[file_name(ROOT, document["signed"].get("version", 0))] = data
        return found


def verify_time(answer: bytes, *, root: Root, device: DeviceId, nonce: str, floor_ms: int) -> int:
    """The time in milliseconds since 1970, if this answers our nonce, is authorised by the root and can be.

    Args:
        answer: as it came.
        root: the newest verified root; that it has expired is no reason to refuse.
        device: the name on this device's own certificate.
        nonce: what we asked with; drawn for this question and used for no other.
        floor_ms: the latest moment that signed documents prove has passed.

    Raises:
        TrustError: `trust.time.no_key`, `.endless_data`, `.malformed`, `.signature`, `.wrong_device`, `.replayed`,
            `.rollback`, `.too_far`.
    """
    if not names_time_key(root):
        raise TrustError(
            "the trusted root names no key that may attest the time",
            code="trust.time.no_key",
            hint="let the root's owners sign one that names the hub's time key",
        )
    with _renamed():
        time = _open(answer, root)
    check_asker(time, device)
    check_question(time, nonce)
    check_possible(time, root, floor_ms=floor_ms)
    return time.time_ms


def check_asker(time: AttestedTime, device: DeviceId) -> None:
    """Raise TrustError `trust.time.wrong_device` unless it was told to this device."""
    if time.device != device:
        raise TrustError(
            f"the time was attested to {time.device[:80]!r}, this device is {device!r}",
            code="trust.time.wrong_device",
            hint="someone shows this device what was signed for another one",
        )


def check_question(time: AttestedTime, nonce: str) -> None:
    """Raise TrustError `trust.time.replayed` unless it answers the question with this nonce."""
    if time.nonce != nonce:
        raise TrustError(
            "the attested time answers another question than this device asked",
            code="trust.time.replayed",
            hint="an answer from before is shown again; look at what stands between this device and the hub",
        )


def check_possible(time: AttestedTime, root: Root, *, floor_ms: int) -> None:
    """Raise TrustError unless it lies after what is proven (`.rollback`) and within the root's reach (`.too_far`)."""
    if time.time_ms < floor_ms:
        raise TrustError(
            f"the attested time lies {floor_ms - time.time_ms} ms before what signed documents prove",
            code="trust.time.rollback",
            hint="check the hub's clock; if it is right, documents were signed while it was ahead",
        )
    if time.time_ms >= expires_ms(root) + MAX_PAST_ROOT_MS:
        raise TrustError(
            "the attested time lies years ahead of what the root allows",
            code="trust.time.too_far",
            hint="check the hub's clock; if it is right, let the root be signed again",
        )


def names_time_key(root: Root) -> bool:
    """Whether devices that trust this root are to wait for an attestation."""
    extension = root.unrecognized_fields.get(EXTENSION)
    return isinstance(extension, dict) and TYPE in extension


def check_attested(root: Root, *, attested: bool) -> None:
    """Raise TrustError `trust.time.unattested` where the root names a time key and this boot has no attestation."""
    if names_time_key(root) and not attested:
        raise TrustError(
            "the time has not been attested since this device started, so nothing new is installed",
            code=UNATTESTED,
            hint="it goes on by itself once the hub has told the time; see `outrider-agent doctor`",
        )


@contextlib.contextmanager
def _renamed() -> Iterator[None]:
    """Put refusals of the answer itself below `trust.time`, so that they are told from those of metadata."""
    try:
        yield
    except TrustError as error:
        code = f"trust.time.{error.code.removeprefix('trust.')}"
        raise TrustError(error.message, code=code, hint=error.hint) from error


def _open(answer: bytes, root: Root) -> AttestedTime:
    envelope = strict.parse_json(answer, what=_WHAT, max_bytes=MAX_TIME_ANSWER_BYTES)
    strict.check_metadata(envelope, what=_WHAT)
    signed = envelope["signed"]
    signatures = {entry["keyid"]: Signature(entry["keyid"], entry["sig"]) for entry in envelope["signatures"]}
    if len(signatures) != len(envelope["signatures"]):
        raise strict.malformed(_WHAT, "it carries two signatures under one key identifier")
    keys, threshold = authorised_keys(root, TYPE)
    with translated(_WHAT):
        payload = _canonical(signed)
    check_threshold(keys, threshold=threshold, payload=payload, signatures=signatures, what=_WHAT)
    if signed.get("_type") != TYPE or signed.get("spec_version") != SPEC_VERSION:
        raise strict.malformed(_WHAT, "it is not an attestation of a version that this device knows")
    try:
        return msgspec.convert(signed, AttestedTime)
    except msgspec.ValidationError as error:
        raise strict.malformed(_WHAT, str(error)) from error


def _canonical(signed: dict[str, Any]) -> bytes:
    text = encode_canonical(signed)
    assert text is not None
    return text.encode()
