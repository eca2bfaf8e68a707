"""Patches against the whole file and against bsdiff4, their memory on a device, and a whole refresh on loopback.

The reference for a share is the smaller of lzma (preset 9) and zstd -19 of the whole new file.

    int8_delta_vs_full    the worse of int8 dynamic and static (QDQ): patch bytes by compressed bytes
    head_delta_vs_full    the same where only the last layer changed
    delta_vs_bsdiff       worst of all cases: our patch's bytes by bsdiff4's
    make_fp32_vs_bsdiff   how many times faster a patch of the fp32 model is made than by bsdiff4
    apply_peak_mb         the most that the patcher child held for a file of 200 MB, interpreter and numpy included
    refresh_ms            from assigning a release with a file of 2 MB to the device answering with it committed, median
"""

from __future__ import annotations

import asyncio
import hashlib
import lzma
import mmap
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.adapters import patcher as patcher_room
from edge_agent.adapters.patcher import LivePatcher
from edge_agent.adapters.shelf import FileShelf
from shared.ids import Digest
from shared.limits import MIB
from shared.model import FileRef
from shared.patch.making import make
from shared.release import Patch
from tests.bench import _update_models, _update_peer, _update_refresh

LARGE_BYTES: Final = 200 * 10**6
CHANGED_BYTES: Final = 12 * MIB


def run() -> dict[str, float]:
    """The figures by key."""
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as place:
        folder = Path(place)
        figures = _deltas(folder)
        figures["apply_peak_mb"] = apply_peak_mb(folder)
    figures["refresh_ms"] = _update_refresh.median_ms()
    return figures


def _deltas(folder: Path) -> dict[str, float]:
    shares: dict[str, float] = {}
    against: dict[str, float] = {}
    figures: dict[str, float] = {}
    for case, (old, new) in _update_models.make_pair(folder).items():
        (folder / "old").write_bytes(old)
        (folder / "new").write_bytes(new)
        peer = _update_peer.measure(folder / "old", folder / "new")
        began = time.perf_counter()
        patch = make(old, new)
        took_s = time.perf_counter() - began
        full = min(peer.zstd, len(lzma.compress(new, preset=9)))
        shares[case], against[case] = len(patch) / full, len(patch) / peer.patch
        figures[f"{case}_bytes"] = len(patch)
        figures[f"{case}_bsdiff_bytes"] = peer.patch
        figures[f"{case}_vs_full"] = shares[case]
        if case == "fp32":
            figures["make_fp32_vs_bsdiff"] = peer.took_s / took_s
    return {
        "int8_delta_vs_full": max(shares["int8_dynamic"], shares["int8_static"], shares["shifted"]),
        "head_delta_vs_full": shares["head"],
        "delta_vs_bsdiff": max(against.values()),
        **figures,
    }


def apply_peak_mb(folder: Path) -> float:
    """What the patcher child held at most, in MB of 10**6 bytes, for a file of 200 MB with every kind of change."""
    rng = np.random.default_rng(1)
    old = rng.integers(0, 2**32, LARGE_BYTES // 4, dtype=np.uint32).astype("<u4")
    new = old.copy()
    count = CHANGED_BYTES // 4
    new[:count] += rng.integers(0, 5000, count, dtype=np.uint32)
    view = new.view(np.uint8)
    view[2 * CHANGED_BYTES : 3 * CHANGED_BYTES] += (rng.random(CHANGED_BYTES) < 0.08).astype(np.uint8)
    halves = new.view("<u2")
    halves[2 * CHANGED_BYTES : 2 * CHANGED_BYTES + count] += rng.integers(0, 9, count).astype(np.uint16)
    shelf = FileShelf(folder)
    text = b"".join(b"%d " % number for number in range(MIB))
    view[-len(text) :] = np.frombuffer(text, np.uint8)
    base = _shelve(shelf, old.tobytes())
    wanted = new.tobytes()
    del old, new, view, halves
    result = FileRef(path="large", length=len(wanted), digest=Digest(hashlib.sha256(wanted).hexdigest()))
    with (folder / "blobs" / base.digest).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        patch = _shelve(shelf, make(bytes(data), wanted))
    peaks: list[int] = []

    class Noting(LivePatcher):
        async def _attend(self, order: bytes, descriptors: list[int]) -> patcher_room.Outcome:
            outcome = await super()._attend(order, descriptors)
            peaks.append(outcome.peak_bytes)
            return outcome

    told = Patch(base=base.digest, result=result.digest, digest=patch.digest, length=patch.length)
    asyncio.run(Noting(shelf=shelf).apply(told, base=base, result=result))
    return peaks[0] / 1e6


def _shelve(shelf: FileShelf, data: bytes) -> FileRef:
    file = FileRef(path="file", length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))
    shelf.append(file.digest, data, offset=0)
    shelf.publish(file)
    return file
