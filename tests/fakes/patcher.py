"""A `Patcher` whose patches are the base's digest and then the result, and nothing that is worth shipping."""

from __future__ import annotations

import asyncio
import hashlib
import os

from edge_agent.update_ports import Shelf
from shared.errors import OutriderError, PatchFailed
from shared.ids import Digest
from shared.model import FileRef
from shared.release import Patch

_MAGIC = b"fake patch from "


def build_fake_patch(base: bytes, result: bytes) -> bytes:
    """What `FakePatcher` makes `result` of, where `base` is on the shelf."""
    return _MAGIC + hashlib.sha256(base).hexdigest().encode() + b"\n" + result


class FakePatcher:
    """Applies what `build_fake_patch` built. `hangs` never ends; `error` is raised instead of working."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.applied: list[Digest] = []
        self.hangs = False
        self.error: OutriderError | None = None

    async def apply(self, patch: Patch, *, base: FileRef, result: FileRef) -> None:
        """Publish the result."""
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        if (patch.base, patch.result) != (base.digest, result.digest):
            raise PatchFailed("the patch is for other files")
        try:
            old = _read(self._shelf, base)
            data = _read(self._shelf, FileRef(path="a patch", length=patch.length, digest=patch.digest))
            head, _, made = data.partition(b"\n")
            if head != _MAGIC + hashlib.sha256(old).hexdigest().encode():
                raise PatchFailed("the patch does not begin where the base is")
            self._shelf.append(result.digest, made[: result.length], offset=0)
            self._shelf.publish(result)
        except PatchFailed:
            raise
        except OutriderError as error:
            raise PatchFailed(f"the patch cannot be applied: {error.message}") from error
        self.applied.append(patch.digest)


def _read(shelf: Shelf, file: FileRef) -> bytes:
    with os.fdopen(shelf.open(file), "rb") as stream:
        return stream.read()
