"""A second look at what was accepted earlier, when a device starts: offline, so expiry does not count.

Never stop answering because metadata has grown old; stop only installing. Pure and light, so that the core can ask.
Not here: whether the files are on the shelf and unchanged, which the shelf says by digest.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import InvalidValue, TrustError
from shared.ids import DeviceId, Digest
from shared.model import FileRef, check_manifest, manifest_path
from shared.release import VerifiedAssignment


def reverify_installed(verified: VerifiedAssignment, *, device: DeviceId) -> Mapping[Digest, FileRef]:
    """Every file that the accepted releases consist of, by digest, if what was stored still agrees with itself.

    Raises:
        TrustError: `trust.wrong_device` when the state came from another device, `trust.digest` when assignment and
            releases no longer belong together, `trust.malformed` when a manifest is damaged.
    """
    if verified.assignment.device != device:
        raise TrustError(
            f"the stored assignment is for {verified.assignment.device!r}, this device is {device!r}",
            code="trust.wrong_device",
            hint="the state directory was copied from another device; enrol this one anew",
        )
    assigned = {(m.family, m.version, m.manifest.digest, m.manifest.path) for m in verified.assignment.models}
    stored = {
        (
            m.manifest.family,
            m.manifest.version,
            m.manifest_digest,
            manifest_path(m.manifest.family, m.manifest.version),
        )
        for m in verified.models
    }
    if assigned != stored or len(verified.models) != len(verified.assignment.models):
        raise TrustError(
            "the stored releases are not those that the stored assignment names",
            code="trust.digest",
            hint="the state was damaged; the hub will send the assignment again",
        )
    files: dict[Digest, FileRef] = {}
    for model in verified.models:
        try:
            check_manifest(model.manifest)
        except InvalidValue as error:
            raise TrustError(
                f"a stored manifest is damaged: {error.message}", code="trust.malformed", hint=error.hint
            ) from error
        for file in (model.manifest.golden.file, *(variant.file for variant in model.manifest.variants)):
            if files.setdefault(file.digest, file).length != file.length:
                raise TrustError("two stored files share a digest but not a length", code="trust.digest")
    return files
