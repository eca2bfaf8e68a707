"""What every patcher does, whatever its format: adapters are listed in `MAKERS` with how a patch of theirs is built."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.adapters.patcher import LivePatcher
from edge_agent.adapters.shelf import FileShelf
from edge_agent.update_ports import Patcher, Shelf
from shared.errors import PatchFailed
from shared.ids import Digest
from shared.model import FileRef
from shared.patch.making import make
from shared.release import Patch
from tests.fakes.patcher import FakePatcher, build_fake_patch

BASE = bytes(range(256)) * 200
RESULT = BASE[:20_000] + b"changed" + BASE[20_000:] + b"more"


@dataclass(frozen=True)
class Maker:
    """An implementation: its patcher over a shelf, and what builds patches for it."""

    patcher: Callable[[Shelf], Patcher]
    build: Callable[[bytes, bytes], bytes]


def build_patch(base: bytes, result: bytes) -> bytes:
    """A real patch."""
    return make(base, result)


MAKERS: dict[str, Maker] = {
    "fake": Maker(patcher=FakePatcher, build=build_fake_patch),
    "live": Maker(patcher=lambda shelf: LivePatcher(shelf=shelf), build=build_patch),
}


class Kit:
    """A patcher over a real shelf."""

    def __init__(self, maker: Maker, folder: Path) -> None:
        self.shelf = FileShelf(folder)
        self.folder = folder
        self.patcher = maker.patcher(self.shelf)
        self.build = maker.build

    def put(self, data: bytes) -> FileRef:
        """On the shelf."""
        file = ref(data)
        self.shelf.append(file.digest, data, offset=0)
        self.shelf.publish(file)
        return file

    def apply(self, patch: bytes, *, base: bytes = BASE, result: bytes = RESULT) -> None:
        """Apply these bytes as the patch from one to the other."""
        made = self.put(patch)
        wanted = Patch(base=ref(base).digest, result=ref(result).digest, digest=made.digest, length=made.length)
        asyncio.run(self.patcher.apply(wanted, base=ref(base), result=ref(result)))

    def content(self, file: FileRef) -> bytes:
        """What is on the shelf."""
        return (self.folder / "blobs" / file.digest).read_bytes()


def ref(data: bytes) -> FileRef:
    return FileRef(path="models/a/1.0.0/int8.onnx", length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))


@pytest.fixture(params=sorted(MAKERS))
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    return Kit(MAKERS[request.param], tmp_path)


def test_a_patch_makes_the_result_and_leaves_the_base(kit: Kit) -> None:
    base = kit.put(BASE)
    patch = kit.build(BASE, RESULT)
    kit.apply(patch)
    assert kit.content(ref(RESULT)) == RESULT
    assert kit.content(base) == BASE
    kit.apply(patch)  # what is there already is no error


@pytest.mark.parametrize("result", [BASE, b"x", BASE * 3], ids=["the same", "tiny", "longer"])
def test_results_of_every_length_come_out_whole(kit: Kit, result: bytes) -> None:
    kit.put(BASE + b"!")
    kit.apply(kit.build(BASE + b"!", result), base=BASE + b"!", result=result)
    assert kit.content(ref(result)) == result


def test_without_its_base_nothing_is_made(kit: Kit) -> None:
    with pytest.raises(PatchFailed):
        kit.apply(kit.build(BASE, RESULT))
    assert not kit.shelf.has(ref(RESULT).digest)


def test_a_base_that_the_disk_changed_is_not_patched(kit: Kit) -> None:
    base = kit.put(BASE)
    path = kit.folder / "blobs" / base.digest
    path.chmod(0o600)
    path.write_bytes(b"!" + BASE[1:])
    with pytest.raises(PatchFailed):
        kit.apply(kit.build(BASE, RESULT))
    assert not kit.shelf.has(ref(RESULT).digest)


def test_a_patch_that_is_not_on_the_shelf_fails(kit: Kit) -> None:
    kit.put(BASE)
    missing = Patch(base=ref(BASE).digest, result=ref(RESULT).digest, digest=Digest("0" * 64), length=10)
    with pytest.raises(PatchFailed):
        asyncio.run(kit.patcher.apply(missing, base=ref(BASE), result=ref(RESULT)))


@pytest.mark.parametrize("harm", ["empty", "junk", "cut", "altered", "of another base", "to another result"])
def test_what_does_not_make_the_signed_result_makes_nothing(kit: Kit, harm: str) -> None:
    kit.put(BASE)
    patch = kit.build(BASE, RESULT)
    harmed = {
        "empty": b"",
        "junk": b"\xff" * 1000,
        "cut": patch[: len(patch) // 2],
        "altered": patch[: len(patch) // 2] + bytes([patch[len(patch) // 2] ^ 0x55]) + patch[len(patch) // 2 + 1 :],
        "of another base": kit.build(BASE[::-1], RESULT),
        "to another result": kit.build(BASE, RESULT[::-1]),
    }[harm]
    with pytest.raises(PatchFailed):
        kit.apply(harmed)
    assert not kit.shelf.has(ref(RESULT).digest)
    kit.apply(patch)  # and nothing of it is left in the way of a good one
    assert kit.content(ref(RESULT)) == RESULT


def test_a_patch_between_other_files_is_refused(kit: Kit) -> None:
    kit.put(BASE)
    made = kit.put(kit.build(BASE, RESULT))
    other = Patch(base=Digest("1" * 64), result=ref(RESULT).digest, digest=made.digest, length=made.length)
    with pytest.raises(PatchFailed):
        asyncio.run(kit.patcher.apply(other, base=ref(BASE), result=ref(RESULT)))
