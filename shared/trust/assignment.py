"""Assignments: what one device shall run, signed online by the hub with a key that the root authorises.

    {"signed": {"_type": "assignment", "spec_version": "1", "device": …, "version": …, …}, "signatures": [{keyid, sig}]}

signed over canonical JSON, in at most limits.MAX_ASSIGNMENT_BYTES. A model is `{family, version, digest, length}` of
its manifest; the manifest's path follows from family and version and is not written.

The root lists the keys in an extension field, so that rotating or revoking them needs the offline root keys:
`"x-outrider": {"assignment": {"keyids": […], "threshold": 1}}`, the keys among the root's own.

An assignment is bound to the device's name, never empty and monotone: without that, an empty or an old one could be
shown to any device (Uptane issue 202).
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from shared import limits
from shared.errors import InvalidValue, TrustError
from shared.ids import (
    DeviceId,
    Digest,
    FamilyName,
    ModelVersion,
    parse_device_id,
    parse_digest,
    parse_family,
    parse_version,
)
from shared.model import FileRef, manifest_path
from shared.release import AssignedModel, Assignment, Patch
from shared.trust import strict
from shared.trust.library import Key, Root, Signature, Signer, encode_canonical
from shared.trust.metadata import check_threshold, translated

EXTENSION: Final = "x-outrider"
TYPE: Final = "assignment"
SPEC_VERSION: Final = "2"

_SIGNATURE_BYTES: Final = len('{"keyid":"","sig":""},') + 64 + 128
"""Of one ed25519 signature in the document."""


class _Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it is signed."""

    family: FamilyName
    version: ModelVersion
    digest: Digest
    length: int


class _Signed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An assignment as it is signed; the fields are those of shared.release.Assignment."""

    device: DeviceId
    version: int
    issued_ms: int
    expires_ms: int
    models: tuple[_Model, ...]
    force: tuple[FamilyName, ...] = ()
    together: tuple[tuple[FamilyName, ...], ...] = ()
    patches: tuple[Patch, ...] = ()


def fit_assignment(assignment: Assignment, *, signatures: int = 1) -> Assignment:
    """The assignment with as many of its patches, first to last, as the document has room for.

    A patch only ever saves bytes, so one that is left out costs a longer download and nothing else.

    Args:
        assignment: with the patches that are worth most first.
        signatures: how many the document will carry.

    Raises:
        InvalidValue: `invalid.assignment_size` when it does not fit without any patch, or breaks its own rules.
    """
    for count in range(min(len(assignment.patches), limits.MAX_PATCHES_PER_ASSIGNMENT), -1, -1):
        fitting = msgspec.structs.replace(assignment, patches=assignment.patches[:count])
        if _document_bytes(fitting, signatures) <= limits.MAX_ASSIGNMENT_BYTES:
            return fitting
    raise _too_large(_document_bytes(fitting, signatures))


def sign_assignment(assignment: Assignment, *signers: Signer) -> bytes:
    """The signed document; raises InvalidValue when the assignment breaks its own rules or is too large."""
    try:
        check_assignment(assignment)
    except TrustError as error:
        raise InvalidValue(error.message, code="invalid.assignment") from error
    signed = _signed_form(assignment)
    made = [signer.sign(_canonical(signed)) for signer in signers]
    data = _encode({"signed": signed, "signatures": [{"keyid": each.keyid, "sig": each.signature} for each in made]})
    if len(data) > limits.MAX_ASSIGNMENT_BYTES:
        raise _too_large(len(data))
    return data


def verify_assignment(
    document: bytes, *, root: Root, device: DeviceId, now_ms: int, floor: int, previous: bytes | None = None
) -> Assignment:
    """The assignment, if it is for this device, is authorised by the root, has not expired and is not an older one.

    Args:
        document: as it came.
        root: the newest verified root.
        device: the name on this device's own certificate.
        now_ms: the latest of the clock and the time floor.
        floor: the newest version accepted from the keys that the root lists.
        previous: the document accepted last. One of the same version is the same only with the same content; without
            it, the same version is accepted again.

    Raises:
        TrustError: `trust.malformed`, `.endless_data`, `.signature`, `.wrong_device`, `.rollback`, `.freeze`.
    """
    assignment, signed = open_assignment(document, root)
    check_device(assignment, device)
    check_assignment(assignment)
    check_newer(assignment, floor)
    if assignment.version == floor and previous is not None:
        _check_same(assignment, signed, previous)
    check_expiry(assignment, now_ms=now_ms)
    return assignment


def open_assignment(document: bytes, root: Root) -> tuple[Assignment, dict[str, Any]]:
    """Parse and check the signatures only; returns the assignment and its signed part as it was written."""
    what = "the assignment"
    envelope = strict.parse_json(document, what=what, max_bytes=limits.MAX_ASSIGNMENT_BYTES)
    strict.check_metadata(envelope, what=what)
    signed = envelope["signed"]
    signatures = {entry["keyid"]: Signature(entry["keyid"], entry["sig"]) for entry in envelope["signatures"]}
    if len(signatures) != len(envelope["signatures"]):
        raise strict.malformed(what, "it carries two signatures under one key identifier")
    keys, threshold = authorised_keys(root)
    with translated(what):
        payload = _canonical(signed)
    check_threshold(keys, threshold=threshold, payload=payload, signatures=signatures, what=what)
    if signed.get("_type") != TYPE or signed.get("spec_version") != SPEC_VERSION:
        raise strict.malformed(what, "it is not an assignment of a version that this device knows")
    try:
        return _read(msgspec.convert(signed, _Signed)), signed
    except msgspec.ValidationError as error:
        raise strict.malformed(what, str(error)) from error


def check_device(assignment: Assignment, device: DeviceId) -> None:
    """Raise TrustError `trust.wrong_device` unless it is for this device."""
    if assignment.device != device:
        raise TrustError(
            f"the assignment is for {assignment.device!r}, this device is {device!r}",
            code="trust.wrong_device",
            hint="someone shows this device what was signed for another one; look at the broker's access rules",
        )


def check_newer(assignment: Assignment, floor: int) -> None:
    """Raise TrustError `trust.rollback` when a newer one was accepted before."""
    if assignment.version < floor:
        raise TrustError(
            f"assignment {assignment.version} is older than {floor}, which was accepted before",
            code="trust.rollback",
            hint="to go back to an older release, assign it again: the new assignment gets a higher version",
        )


def check_expiry(assignment: Assignment, *, now_ms: int) -> None:
    """Raise TrustError `trust.freeze` when it has expired at this moment, or by its own dates."""
    if max(now_ms, assignment.issued_ms) >= assignment.expires_ms:
        raise TrustError(
            f"assignment {assignment.version} has expired",
            code="trust.freeze",
            hint="check the device's clock; if it is right, let the hub sign the assignment again",
        )


def check_assignment(assignment: Assignment) -> None:
    """Raise TrustError `trust.malformed` unless names, versions, times, paths, sets and patches are in bounds."""
    what = f"assignment {assignment.version}"
    try:
        parse_device_id(assignment.device)
        for model in assignment.models:
            parse_family(model.family)
            parse_version(model.version)
            parse_digest(model.manifest.digest)
        for family in assignment.force:
            parse_family(family)
    except InvalidValue as error:
        raise strict.malformed(what, error.message) from error
    families = [model.family for model in assignment.models]
    if not 1 <= len(families) <= limits.MAX_MODELS_PER_DEVICE or len(set(families)) != len(families):
        raise strict.malformed(what, f"it names {len(families)} models, one to {limits.MAX_MODELS_PER_DEVICE} may be")
    if not set(assignment.force) <= set(families):
        raise strict.malformed(what, "it forces a family that it does not assign")
    joined = [family for members in assignment.together for family in members]
    if not set(joined) <= set(families) or len(set(joined)) != len(joined):
        raise strict.malformed(what, "its sets hold a family that it does not assign, or one twice")
    if any(len(members) < 2 for members in assignment.together):
        raise strict.malformed(what, "it has a set of less than two families")
    if not 1 <= assignment.version < strict.MAX_INTEGER:
        raise strict.malformed(what, "its version is out of bounds")
    if not 0 <= assignment.issued_ms < assignment.expires_ms:
        raise strict.malformed(what, "it expires before it is issued")
    for model in assignment.models:
        if model.manifest.path != manifest_path(model.family, model.version):
            raise strict.malformed(what, f"{model.manifest.path[:120]!r} is not the manifest of {model.family}")
        if not 0 < model.manifest.length <= limits.MAX_MANIFEST_BYTES:
            raise strict.malformed(what, f"the manifest of {model.family} has a length of {model.manifest.length}")
    _check_patches(assignment.patches, what)


def _check_patches(patches: tuple[Patch, ...], what: str) -> None:
    if len(patches) > limits.MAX_PATCHES_PER_ASSIGNMENT:
        raise strict.malformed(what, f"it has {len(patches)} patches, {limits.MAX_PATCHES_PER_ASSIGNMENT} may be")
    if len({patch.result for patch in patches}) != len(patches):
        raise strict.malformed(what, "two patches make one file")
    for patch in patches:
        try:
            for digest in (patch.base, patch.result, patch.digest):
                parse_digest(digest)
        except InvalidValue as error:
            raise strict.malformed(what, error.message) from error
        if patch.base == patch.result or not 0 < patch.length <= limits.MAX_MODEL_BYTES:
            raise strict.malformed(what, "a patch changes nothing, or has no possible length")


def authorised_keys(root: Root, kind: str = TYPE) -> tuple[dict[str, Key], int]:
    """The online keys that may sign this kind and how many of them must; raises TrustError when the root names none."""
    with translated(f"the root's list of {kind} keys"):
        entry = root.unrecognized_fields[EXTENSION][kind]
        keyids, threshold = entry["keyids"], entry["threshold"]
        if type(threshold) is not int or threshold < 1 or not isinstance(keyids, list) or not keyids:
            raise ValueError("keyids and threshold are required")
        return {keyid: root.keys[keyid] for keyid in keyids}, threshold


def _check_same(assignment: Assignment, signed: dict[str, Any], previous: bytes) -> None:
    """Raise TrustError `trust.rollback` when the accepted document of the same version said something else."""
    try:
        stored = strict.parse_json(previous, what="the last assignment", max_bytes=limits.MAX_ASSIGNMENT_BYTES)
        before = stored["signed"]
        if before["version"] != assignment.version:
            return
    except (TrustError, KeyError, TypeError):
        return  # damaged on disk: the version floor still stands
    if before != signed:
        raise TrustError(
            f"assignment {assignment.version} differs from the one of the same version that was accepted before",
            code="trust.rollback",
            hint="if the hub was restored from a backup, assign again so that its versions pass the older ones",
        )


def _signed_form(assignment: Assignment) -> dict[str, Any]:
    signed = _Signed(
        device=assignment.device,
        version=assignment.version,
        issued_ms=assignment.issued_ms,
        expires_ms=assignment.expires_ms,
        models=tuple(
            _Model(
                family=model.family,
                version=model.version,
                digest=model.manifest.digest,
                length=model.manifest.length,
            )
            for model in assignment.models
        ),
        force=assignment.force,
        together=assignment.together,
        patches=assignment.patches,
    )
    return {**msgspec.to_builtins(signed), "_type": TYPE, "spec_version": SPEC_VERSION}


def _read(signed: _Signed) -> Assignment:
    return Assignment(
        device=signed.device,
        version=signed.version,
        issued_ms=signed.issued_ms,
        expires_ms=signed.expires_ms,
        models=tuple(
            AssignedModel(
                family=model.family,
                version=model.version,
                manifest=FileRef(
                    path=manifest_path(model.family, model.version), length=model.length, digest=model.digest
                ),
            )
            for model in signed.models
        ),
        force=signed.force,
        together=signed.together,
        patches=signed.patches,
    )


def _document_bytes(assignment: Assignment, signatures: int) -> int:
    empty = _encode({"signed": _signed_form(assignment), "signatures": []})
    return len(empty) + signatures * _SIGNATURE_BYTES


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def _too_large(size_bytes: int) -> InvalidValue:
    return InvalidValue(
        f"an assignment of {size_bytes} bytes is too large, {limits.MAX_ASSIGNMENT_BYTES} may be",
        code="invalid.assignment_size",
        hint="assign fewer families to this device, or give families and versions shorter names",
    )


def _canonical(signed: dict[str, Any]) -> bytes:
    text = encode_canonical(signed)
    assert text is not None
    return text.encode()
