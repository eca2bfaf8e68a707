"""The blob store on a real disk."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_hub.ground.arrivals import BUFFER_BYTES
from cloud_hub.releases.blobs import Blobs
from shared.errors import InvalidValue, StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest

DATA = b"some bytes" * 100


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    blobs = Blobs(tmp_path / "blobs", max_bytes=4 * BUFFER_BYTES)
    blobs.open()
    return blobs


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def receive(blobs: Blobs, digest: Digest, length: int, *parts: bytes) -> bool:
    return asyncio.run(blobs.receive(digest, length, pieces(*parts)))


def incoming(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "blobs" / "incoming").iterdir())


def test_an_upload_is_found_under_its_digest(blobs: Blobs, tmp_path: Path) -> None:
    data = os.urandom(2 * BUFFER_BYTES + 17)
    digest = digest_of(data)
    assert blobs.find(digest) is None
    assert receive(blobs, digest, len(data), data[:5], b"", data[5:BUFFER_BYTES], data[BUFFER_BYTES:]) is True
    blob = blobs.find(digest)
    assert blob is not None
    assert blob.length == len(data)
    assert blob.path == tmp_path / "blobs" / digest[:2] / digest
    assert blob.path.read_bytes() == data
    assert incoming(tmp_path) == []


def test_the_same_upload_again_reads_nothing(blobs: Blobs) -> None:
    receive(blobs, digest_of(DATA), len(DATA), DATA)

    async def unread() -> AsyncIterator[bytes]:
        for _ in range(1):
            raise AssertionError("was read")
        yield b""

    assert asyncio.run(blobs.receive(digest_of(DATA), len(DATA), unread())) is False


@pytest.mark.parametrize(
    ("length", "sent", "words"),
    [
        (len(DATA), DATA[:-1], "did not arrive"),
        (len(DATA), DATA + b"x", "more than the announced"),
        (len(DATA), DATA[:-1] + b"x", "hash to"),
    ],
)
def test_what_is_not_as_announced_leaves_nothing(
    blobs: Blobs, tmp_path: Path, length: int, sent: bytes, words: str
) -> None:
    with pytest.raises(TransferCorrupt, match=words):
        receive(blobs, digest_of(DATA), length, sent)
    assert blobs.find(digest_of(DATA)) is None
    assert incoming(tmp_path) == []


@pytest.mark.parametrize("length", [0, 4 * BUFFER_BYTES + 1])
def test_lengths_out_of_bounds_are_refused_before_a_byte_is_read(blobs: Blobs, length: int) -> None:
    with pytest.raises(InvalidValue) as refusal:
        receive(blobs, digest_of(DATA), length, DATA)
    assert refusal.value.code == "invalid.length"


def test_an_upload_that_is_cut_off_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield DATA
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        asyncio.run(blobs.receive(digest_of(DATA), 2 * len(DATA), broken()))
    assert incoming(tmp_path) == []


def test_a_start_removes_what_a_crash_left(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "blobs" / "incoming" / "stray").write_bytes(b"half")
    kept = blobs.put(DATA)
    blobs.open()
    assert incoming(tmp_path) == []
    assert blobs.find(kept.digest) == kept


def test_put_and_adopt_give_the_same_blob(blobs: Blobs, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(DATA)
    assert blobs.adopt(file) == blobs.put(DATA)
    assert blobs.read(digest_of(DATA), max_bytes=len(DATA)) == DATA


def test_reading_refuses_what_is_missing_too_long_or_rotten(blobs: Blobs) -> None:
    blob = blobs.put(DATA)
    with pytest.raises(StorageError):
        blobs.read(digest_of(b"other"), max_bytes=100)
    with pytest.raises(StorageError):
        blobs.read(blob.digest, max_bytes=len(DATA) - 1)
    blob.path.write_bytes(b"y" + DATA[1:])
    with pytest.raises(StorageError) as refusal:
        blobs.read(blob.digest, max_bytes=len(DATA))
    assert refusal.value.code == "storage.corrupt"


def test_a_full_disk_is_told_as_such_and_leaves_nothing(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cloud_hub.ground.arrivals.os.fsync", full)
    with pytest.raises(StorageFull) as refusal:
        receive(blobs, digest_of(DATA), len(DATA), DATA)
    assert refusal.value.code == "storage.full"
    assert blobs.find(digest_of(DATA)) is None
    assert incoming(tmp_path) == []


def test_two_uploads_of_the_same_file_at_once_both_succeed(blobs: Blobs, tmp_path: Path) -> None:
    async def both() -> list[bool]:
        one = blobs.receive(digest_of(DATA), len(DATA), pieces(DATA[:3], DATA[3:]))
        other = blobs.receive(digest_of(DATA), len(DATA), pieces(DATA))
        return list(await asyncio.gather(one, other))

    assert any(asyncio.run(both()))
    assert incoming(tmp_path) == []
