"""The real patcher child over the real shelf: results, refusals, limits, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent import patcher as child
from edge_agent.adapters.patcher import LivePatcher, Outcome
from edge_agent.adapters.shelf import FileShelf
from shared.errors import PatchFailed, StorageFull
from shared.ids import Digest
from shared.limits import MIB
from shared.model import FileRef
from shared.patch import format as form
from shared.patch.making import make
from shared.release import Patch

pytestmark = pytest.mark.live


def ref(data: bytes) -> FileRef:
    return FileRef(path="models/m/1.0.0/int8.onnx", length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))


class Place:
    """A shelf with a base and a patch on it."""

    def __init__(self, root: Path, *, base: bytes, result: bytes, patch: bytes | None = None) -> None:
        self.root = root
        self.shelf = FileShelf(root)
        data = make(base, result) if patch is None else patch
        self.base, self.result, file = ref(base), ref(result), ref(data)
        self.patch = Patch(base=self.base.digest, result=self.result.digest, digest=file.digest, length=file.length)
        for content, known in ((base, self.base), (data, file)):
            self.shelf.append(known.digest, content, offset=0)
            self.shelf.publish(known)

    async def apply(self, patcher: LivePatcher | None = None) -> None:
        await (patcher or LivePatcher(shelf=self.shelf)).apply(self.patch, base=self.base, result=self.result)

    def refused(self, patcher: LivePatcher | None = None) -> str:
        """The refusal's code; nothing is published, and no unfinished byte is left."""
        with pytest.raises(PatchFailed) as caught:
            asyncio.run(self.apply(patcher))
        assert not self.shelf.has(self.result.digest)
        assert self.shelf.resume_at(self.result.digest) == 0
        assert caught.value.hint
        return caught.value.code

    def path(self, file: FileRef) -> Path:
        return self.root / "blobs" / file.digest


def pair(size: int = 400_000) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(1)
    old = rng.integers(0, 256, size, dtype=np.uint8)
    return old.tobytes(), (old + (rng.random(size) < 0.08)).astype(np.uint8).tobytes()


def test_a_patch_makes_the_file_on_the_shelf(tmp_path: Path) -> None:
    base, result = pair()
    place = Place(tmp_path, base=base, result=result)
    before = len(list(Path("/proc/self/fd").iterdir()))
    asyncio.run(place.apply())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    fd = place.shelf.open(place.result)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == result


def test_a_damaged_patch_is_refused_by_its_digest_before_it_is_read(tmp_path: Path) -> None:
    place = Place(tmp_path, base=pair()[0], result=pair()[1])
    path = place.root / "blobs" / place.patch.digest
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert place.refused() == "transfer.patch.source"


def test_a_base_swapped_on_the_disk_is_refused_before_it_is_read(tmp_path: Path) -> None:
    place = Place(tmp_path, base=pair()[0], result=pair()[1])
    path = place.path(place.base)
    path.unlink()
    path.write_bytes(random.Random(1).randbytes(place.base.length))
    assert place.refused() == "transfer.patch.source"


def test_a_base_swapped_after_it_was_hashed_does_not_reach_the_child(tmp_path: Path) -> None:
    base, result = pair()
    place = Place(tmp_path, base=base, result=result)

    class Swapping(FileShelf):
        def part(self, digest: Digest) -> int:
            place.path(place.base).unlink()
            place.path(place.base).write_bytes(bytes(len(base)))
            return super().part(digest)

    asyncio.run(place.apply(LivePatcher(shelf=Swapping(tmp_path))))
    assert place.shelf.has(place.result.digest)


def test_a_patch_for_another_result_is_refused(tmp_path: Path) -> None:
    base, result = pair()
    place = Place(tmp_path, base=base, result=result, patch=make(base, result[::-1]))
    assert place.refused() == "transfer.patch.terms"


def test_a_patch_that_lies_about_its_result_is_refused(tmp_path: Path) -> None:
    base, result = pair()
    patch = bytearray(make(base, result[:-1] + bytes([result[-1] ^ 1])))
    at = len(form.MAGIC) + 40
    patch[at : at + 32] = hashlib.sha256(result).digest()
    place = Place(tmp_path, base=base, result=result, patch=bytes(patch))
    assert place.refused() == "transfer.patch.result"


def test_no_patch_at_all_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, base=b"abc", result=b"abd", patch=b"not a patch")
    assert place.refused() == "transfer.patch.malformed"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import time; time.sleep(60)", "transfer.patch.deadline"),
        ("raise SystemExit(3)", "transfer.patch.lost"),
        ("print('{' * 100000)", "transfer.patch.lost"),
        ("print('{}')", "transfer.patch.result"),
    ],
)
def test_a_child_that_fails_in_its_own_way_is_ended_and_costs_a_download(
    tmp_path: Path, code: str, expected: str
) -> None:
    place = Place(tmp_path, base=b"abc", result=b"abd")
    command = (sys.executable, "-I", "-c", code)
    assert place.refused(LivePatcher(shelf=place.shelf, deadline_ms=1500, command=command)) == expected
    assert place.refused(LivePatcher(shelf=place.shelf, command=("/nonexistent",))) == "transfer.patch.start"


def test_a_full_disk_stays_a_full_disk(tmp_path: Path) -> None:
    place = Place(tmp_path, base=b"abc", result=b"abd")
    command = (sys.executable, "-I", "-c", """print('{"code":"errno.28"}')""")
    with pytest.raises(StorageFull):
        asyncio.run(place.apply(LivePatcher(shelf=place.shelf, command=command)))


def test_a_cancelled_patch_leaves_no_child(tmp_path: Path) -> None:
    place = Place(tmp_path, base=b"abc", result=b"abd")
    note = tmp_path / "pid"
    code = f"import os, time, pathlib; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    patcher = LivePatcher(shelf=place.shelf, command=(sys.executable, "-I", "-c", code))

    async def scenario() -> None:
        task = asyncio.ensure_future(place.apply(patcher))
        async with asyncio.timeout(20):
            while not (note.exists() and note.read_text()):
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert not Path(f"/proc/{note.read_text()}").exists()


def run_limited(code: str, *, output_bytes: int = 1000) -> dict[str, object]:
    """What this code finds in a process that has given up what the patcher gives up."""
    program = (
        "import json, os, sys\n"
        "from edge_agent import patcher\n"
        "from edge_agent.host import confine\n"
        "import shared.patch.applying\n"
        "status = os.open('/proc/self/status', os.O_RDONLY)\n"
        f"patcher.limit(parent=os.getppid(), output_bytes={output_bytes})\n"
        "found = {}\n" + code + "\nprint(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=30, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_child_has_given_up_further_files_and_most_memory() -> None:
    found = run_limited(
        "try:\n    open('/etc/hostname')\nexcept OSError as error:\n    found['open'] = error.errno\n"
        f"try:\n    bytearray({child.DATA_LIMIT_BYTES})\nexcept MemoryError:\n    found['memory'] = True\n"
    )
    assert found["open"] == 24
    assert found["memory"] is True


def test_delta_bomb_cannot_grow_the_output_beyond_what_was_signed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    program = (
        "import os, sys\n"
        "from edge_agent import patcher\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY)\n"
        "patcher.limit(parent=os.getppid(), output_bytes=1000)\n"
        "total = 0\n"
        "try:\n    while True:\n        total += os.write(fd, bytes(300))\n"
        "except OSError as error:\n    print(error.errno, total)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(out)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split() == ["27", "1000"], done.stderr
    assert out.stat().st_size == 1000


def test_a_large_file_is_patched_in_bounded_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    old = rng.integers(0, 256, 12 * MIB, dtype=np.uint8)
    new = old.copy()
    new[: 1 * MIB] += (rng.random(1 * MIB) < 0.08).astype(np.uint8)
    place = Place(tmp_path, base=old.tobytes(), result=new.tobytes())
    idle = run_limited("found['peak'] = patcher.peak_bytes(status)")["peak"]
    peaks: list[int] = []

    class Noting(LivePatcher):
        async def _attend(self, order: bytes, descriptors: list[int]) -> Outcome:
            outcome = await super()._attend(order, descriptors)
            peaks.append(outcome.peak_bytes)
            return outcome

    asyncio.run(place.apply(Noting(shelf=place.shelf)))
    assert isinstance(idle, int)
    assert peaks[0] - idle < 12 * MIB
