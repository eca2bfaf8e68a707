"""How the files of a release come to this device: whole or by a patch, and whether there is room for them.

Rules of this file:
1. A patch is only ever a help: it is taken where its base is here, it is shorter than what is still to come of the
   whole file, and nothing is held against it.
2. Room is asked for before a byte is fetched: on the file system, and within what the profile allows to model files.

Not here: fetching and applying (`edge_agent/driver/bringing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Literal

import msgspec

from shared.ids import Digest
from shared.limits import MIB
from shared.model import FileRef
from shared.release import Patch

PatchPolicy = Literal["prefer_patch", "patch_only", "full"]
"""`prefer_patch`: a patch where it is shorter. `patch_only`: nothing is fetched whole. `full`: no patches."""

MARGIN_PERCENT: Final = 110
"""Of what is to be written: file systems take some of their own, and others write meanwhile."""


class Way(msgspec.Struct, frozen=True):
    """How one file comes: by this patch, or whole where there is none."""

    file: FileRef
    patch: Patch | None


class Shortage(msgspec.Struct, frozen=True):
    """What there is too little of, in a sentence, and what a person can do about it."""

    message: str
    hint: str


def choose_way(
    file: FileRef,
    patches: Iterable[Patch],
    *,
    policy: PatchPolicy,
    is_here: Callable[[Digest], bool],
    part_bytes: Callable[[Digest], int],
    is_barred: Callable[[str], bool],
) -> Way | None:
    """How this file comes; None when the policy allows no way.

    Args:
        patches: of the assignment.
        is_here: whether a finished file is on the shelf.
        part_bytes: how much of an unfinished one is.
        is_barred: whether a file or patch has come wrong and is left alone.
    """
    usable = [
        patch
        for patch in patches
        if policy != "full" and patch.result == file.digest and is_here(patch.base) and not is_barred(patch.digest)
    ]
    best = min(usable, key=lambda patch: patch.length, default=None)
    if policy == "patch_only":
        return None if best is None else Way(file, best)
    rest_bytes = file.length - part_bytes(file.digest)
    if best is not None and best.length - part_bytes(best.digest) >= rest_bytes:
        best = None
    return Way(file, best)


def bytes_to_write(ways: Iterable[Way], *, part_bytes: Callable[[Digest], int]) -> int:
    """What the disk must take until all files are here; a patch lies beside the file that it makes."""
    total = 0
    for way in ways:
        if way.patch is None:
            total += max(0, way.file.length - part_bytes(way.file.digest))
        else:
            total += max(0, way.patch.length - part_bytes(way.patch.digest)) + way.file.length
    return total


def against_room(*, write_bytes: int, free_bytes: int, kept_bytes: int, models_bytes: int) -> Shortage | None:
    """What stands against fetching; None when there is room.

    Args:
        write_bytes: what is to be written.
        free_bytes: what the file system has left; what is kept for a rollback lies there already.
        kept_bytes: all files that slots run, may go back to or bring in, together.
        models_bytes: what the profile allows to them.
    """
    if kept_bytes > models_bytes:
        return Shortage(
            f"the releases that are kept, those before the ones in service included, and the new one need "
            f"{_mib(kept_bytes)} MiB together, the profile allows {_mib(models_bytes)} MiB",
            hint="raise disk.models_bytes of the profile, assign smaller releases, or withdraw the model and assign it "
            "anew, which lets go of what is kept",
        )
    needed_bytes = write_bytes * MARGIN_PERCENT // 100
    if needed_bytes > free_bytes:
        return Shortage(
            f"{_mib(needed_bytes)} MiB must be free for it, {_mib(free_bytes)} MiB are",
            hint="free disk space; the agent goes on by itself then",
        )
    return None


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}"
