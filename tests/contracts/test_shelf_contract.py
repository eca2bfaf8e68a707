"""What every shelf does, on the fake and on files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.adapters.shelf import FileShelf
from edge_agent.update_ports import Shelf
from shared.errors import StorageError, TransferCorrupt
from shared.ids import Digest
from shared.model import FileRef
from tests.fakes.shelf import FakeShelf

DATA = bytes(range(256)) * 40
Spoil = Callable[[Digest, bytes], None]


@pytest.fixture(params=["fake", "files"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Shelf, Spoil]:
    """A shelf and a way to change a kept file behind its back."""
    if request.param == "fake":
        fake = FakeShelf()
        return fake, fake.spoil

    def spoil(digest: Digest, data: bytes) -> None:
        path = tmp_path / "blobs" / digest
        path.chmod(0o644)
        path.write_bytes(data)

    return FileShelf(tmp_path), spoil


def ref(data: bytes) -> FileRef:
    return FileRef(path="models/a/1.0.0/int8.onnx", length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))


def shelved(shelf: Shelf, data: bytes) -> FileRef:
    file = ref(data)
    shelf.append(file.digest, data, offset=0)
    shelf.publish(file)
    return file


def content(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as stream:
        return stream.read()


def test_a_file_arrives_in_pieces_and_is_readable_when_published(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    file = ref(DATA)
    assert not shelf.has(file.digest)
    assert shelf.resume_at(file.digest) == 0
    shelf.append(file.digest, DATA[:5000], offset=0)
    assert shelf.resume_at(file.digest) == 5000
    assert not shelf.has(file.digest)
    shelf.append(file.digest, DATA[5000:], offset=5000)
    shelf.publish(file)
    assert shelf.has(file.digest)
    assert shelf.resume_at(file.digest) == 0
    assert content(shelf.open(file)) == DATA
    shelf.publish(file)


def test_an_unfinished_file_can_be_written_by_its_descriptor(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    file = ref(DATA)
    shelf.append(file.digest, b"of a transfer", offset=0)
    fd = shelf.part(file.digest)
    assert shelf.resume_at(file.digest) == 0
    with os.fdopen(fd, "wb") as stream:
        stream.write(DATA)
    assert shelf.resume_at(file.digest) == len(DATA)
    shelf.publish(file)
    assert content(shelf.open(file)) == DATA


def test_what_was_written_by_descriptor_is_hashed_and_can_be_begun_anew(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    file = ref(DATA)
    with os.fdopen(shelf.part(file.digest), "wb") as stream:
        stream.write(DATA[:-1])
    with pytest.raises(TransferCorrupt):
        shelf.publish(file)
    with os.fdopen(shelf.part(file.digest), "wb") as stream:
        stream.write(b"half")
    shelf.append(file.digest, DATA, offset=0)
    shelf.publish(file)
    assert content(shelf.open(file)) == DATA


def test_starting_again_drops_what_was_there(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    file = ref(DATA)
    shelf.append(file.digest, b"x" * 20_000, offset=0)
    shelf.append(file.digest, DATA, offset=0)
    shelf.publish(file)
    assert content(shelf.open(file)) == DATA


@pytest.mark.parametrize("wrong", [DATA[:-1], DATA + b"!", b"!" + DATA[1:]], ids=["short", "long", "altered"])
def test_what_is_not_the_promised_file_is_dropped(kit: tuple[Shelf, Spoil], wrong: bytes) -> None:
    shelf, _ = kit
    file = ref(DATA)
    shelf.append(file.digest, wrong, offset=0)
    with pytest.raises(TransferCorrupt):
        shelf.publish(file)
    assert not shelf.has(file.digest)
    assert shelf.resume_at(file.digest) == 0


def test_a_file_that_the_disk_changed_is_not_opened_and_can_be_fetched_again(kit: tuple[Shelf, Spoil]) -> None:
    shelf, spoil = kit
    file = shelved(shelf, DATA)
    spoil(file.digest, b"!" + DATA[1:])
    with pytest.raises(TransferCorrupt):
        shelf.open(file)
    assert not shelf.has(file.digest)
    assert shelved(shelf, DATA) == file


def test_what_is_not_there_cannot_be_opened_or_published(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    with pytest.raises(StorageError):
        shelf.open(ref(DATA))
    with pytest.raises(StorageError):
        shelf.publish(ref(DATA))


def test_collecting_keeps_what_is_named_and_says_what_it_freed(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    kept, gone = shelved(shelf, DATA), shelved(shelf, b"other")
    unfinished, wanted = ref(b"unfinished"), ref(b"wanted part")
    shelf.append(unfinished.digest, b"unf", offset=0)
    shelf.append(wanted.digest, b"wan", offset=0)
    assert shelf.collect(frozenset({kept.digest, wanted.digest})) == 5 + 3
    assert shelf.has(kept.digest)
    assert not shelf.has(gone.digest)
    assert shelf.resume_at(unfinished.digest) == 0
    assert shelf.resume_at(wanted.digest) == 3
    assert shelf.collect(frozenset({kept.digest, wanted.digest})) == 0


def test_one_file_is_dropped_finished_or_not_and_no_other(kit: tuple[Shelf, Spoil]) -> None:
    shelf, _ = kit
    whole, other = shelved(shelf, DATA), shelved(shelf, DATA[:100])
    part, kept = ref(DATA[:200]), ref(DATA[:300])
    for file in (part, kept):
        shelf.append(file.digest, DATA[:50], offset=0)
    for file in (whole, part, whole):
        shelf.drop(file.digest)
    assert not shelf.has(whole.digest)
    assert shelf.resume_at(part.digest) == 0
    assert shelf.has(other.digest)
    assert shelf.resume_at(kept.digest) == 50
