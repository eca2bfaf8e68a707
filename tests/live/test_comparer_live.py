"""The comparer as a real child over a real shelf: what who stole the hub's learned key can put into a file."""

from __future__ import annotations

import asyncio
import hashlib
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.adapters.comparer import LiveComparer
from edge_agent.adapters.shelf import FileShelf
from shared.errors import OutriderError, StorageError, TransferCorrupt, TrustError
from shared.ids import Digest
from shared.model import FileRef, Learning
from shared.release import Ground

pytestmark = pytest.mark.live
onnx: Any = pytest.importorskip("onnx")

from tests.fakes.releases import sign_classifier  # noqa: E402 - after the skip, because it needs onnx

MODEL = sign_classifier().model
WEIGHTS = struct.pack("<4f", 1, -1, -1, 1)
BOUNDS = Learning(variant="fp32", tensors=("w",), max_shift=1.0)


def put(shelf: FileShelf, data: bytes) -> FileRef:
    file = FileRef(path="models/x/1/fp32.onnx", length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))
    shelf.append(file.digest, data, offset=0)
    shelf.publish(file)
    return file


def moved(*weights: float) -> bytes:
    return MODEL.replace(WEIGHTS, struct.pack("<4f", *weights))


def compare(folder: Path, learned: bytes, *, base: bytes = MODEL, bounds: Learning = BOUNDS, **options: Any) -> None:
    shelf = FileShelf(folder)
    file, ground = put(shelf, learned), Ground(file=put(shelf, base), bounds=bounds)
    asyncio.run(LiveComparer(shelf=shelf, **options).compare(file, ground))


def refusal(folder: Path, learned: bytes, **options: Any) -> str:
    with pytest.raises(TrustError) as caught:
        compare(folder, learned, **options)
    assert caught.value.code == "trust.learned"
    return caught.value.message


def test_a_head_within_its_bound_passes(tmp_path: Path) -> None:
    compare(tmp_path, moved(1.5, -0.5, -1, 1))


def test_a_head_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    assert "moved by" in refusal(tmp_path, moved(1.9, -0.1, -1, 1))
    assert "moved by" in refusal(tmp_path, moved(float("nan"), -1, -1, 1))


def test_another_graph_is_refused(tmp_path: Path) -> None:
    at = MODEL.index(b"MatMul") if b"MatMul" in MODEL else MODEL.index(WEIGHTS) - 1
    other = MODEL[:at] + bytes([MODEL[at] ^ 1]) + MODEL[at + 1 :]
    assert "graph is another" in refusal(tmp_path, other)
    assert "another length" in refusal(tmp_path, MODEL + b"\0")


def test_other_tensors_than_those_that_were_opened_are_refused(tmp_path: Path) -> None:
    names = Learning(variant="fp32", tensors=("v",), max_shift=1.0)
    assert "does not hold" in refusal(tmp_path, moved(1.1, -1, -1, 1), bounds=names)


def test_a_base_that_is_no_graph_lets_nothing_pass(tmp_path: Path) -> None:
    refusal(tmp_path, b"\xff" * 64, base=b"\xff" * 63 + b"\xfe")


def test_a_file_that_the_disk_changed_is_not_compared(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    file, ground = put(shelf, moved(1.5, -1, -1, 1)), Ground(file=put(shelf, MODEL), bounds=BOUNDS)
    path = next(path for path in tmp_path.rglob(file.digest))
    path.chmod(0o600)
    path.write_bytes(moved(9, -1, -1, 1))
    with pytest.raises(TransferCorrupt):
        asyncio.run(LiveComparer(shelf=shelf).compare(file, ground))
    with pytest.raises(StorageError):
        asyncio.run(LiveComparer(shelf=shelf).compare(file, ground))


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("print('{}')", "comparer.lost"),
        ("raise SystemExit(3)", "comparer.lost"),
        ("print('no JSON')", "comparer.lost"),
        ('print(\'{"code": "storage.damaged", "message": "", "shift": 0}\')', "comparer.lost"),
    ],
)
def test_a_child_that_does_not_say_so_plainly_lets_nothing_pass(tmp_path: Path, program: str, code: str) -> None:
    with pytest.raises(OutriderError) as caught:
        compare(tmp_path, moved(1.5, -0.5, -1, 1), command=(sys.executable, "-I", "-c", program))
    assert caught.value.code == code
    assert not isinstance(caught.value, TrustError)


def test_a_child_that_cannot_be_started_says_nothing_against_the_release(tmp_path: Path) -> None:
    with pytest.raises(OutriderError) as caught:
        compare(tmp_path, moved(1.5, -0.5, -1, 1), command=("/nowhere",))
    assert caught.value.code == "comparer.start"


def test_the_child_loads_no_library_that_computes() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            "import sys, edge_agent.comparer; print('numpy' in sys.modules, 'onnx' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["False", "False"]
