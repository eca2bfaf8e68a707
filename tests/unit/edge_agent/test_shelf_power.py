"""The shelf when the power goes, the disk is full, read-only or rotten, or someone exchanges a file behind its back.

The calls that `FileShelf` makes to the system are recorded while a file comes in; of every beginning of them, every
disk that a power cut may leave is made (`CutDisk`), and a new shelf looks at it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.adapters import shelf as module
from edge_agent.adapters.shelf import FileShelf
from shared.errors import StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest
from shared.model import FileRef
from tests.fakes.fault_disks import Call, CutDisk
from tests.fakes.memory_disk import MemoryDisk

DATA = bytes(range(256)) * 24
FILE = FileRef(path="models/a/1.0.0/int8.onnx", length=len(DATA), digest=Digest(hashlib.sha256(DATA).hexdigest()))
MOST_BYTES = 1200
PIECES = (DATA[:2000], DATA[2000:4100], DATA[4100:])


class Recorder:
    """Stands where the shelf looks for the system's calls: keeps those that change the disk, or makes one fail."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.log: list[Call] = []
        self.count = 0
        self._fails = (0, 0)

    def fail_at(self, number: int, code: int) -> None:
        """Raise this error at the call of this number, from 1."""
        self._fails = number, code

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _step(self) -> None:
        self.count += 1
        number, code = self._fails
        if self.count == number:
            raise OSError(code, os.strerror(code))

    def _name(self, fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(self._root))

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._step()
        is_new = bool(flags & os.O_CREAT) and not path.exists()
        fd = os.open(path, flags, mode)
        if is_new:
            self.log.append(("create", self._name(fd), 0))
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._step()
        written = os.pwrite(fd, data[:MOST_BYTES], offset)  # the system may always write less
        self.log.append(("write", self._name(fd), offset, bytes(data[:written])))
        return written

    def ftruncate(self, fd: int, length: int) -> None:
        self._step()
        os.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        self._step()
        name = self._name(fd)
        self.log.append(("sync_names",) if name == "." else ("sync", name))

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        os.rename(old, new)  # noqa: PTH104 - what is recorded is the call
        self.log.append(("rename", str(old.relative_to(self._root)), str(new.relative_to(self._root))))


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    FileShelf(tmp_path)
    made = Recorder(tmp_path / "blobs")
    monkeypatch.setattr(module, "os", made)
    monkeypatch.setattr(Path, "rename", lambda old, new: made.rename(old, new))
    return made


def bring(shelf: FileShelf) -> None:
    """What a transfer does, resuming."""
    offset = shelf.resume_at(FILE.digest)
    for piece in PIECES if offset == 0 else (DATA[offset:],):
        shelf.append(FILE.digest, piece, offset=offset)
        offset += len(piece)
    shelf.publish(FILE)


def is_sound(disk: MemoryDisk, folder: Path) -> bool:
    """Whether a shelf on this disk has the right file or does not have it, and can bring it in then."""
    (folder / "blobs" / "partial").mkdir(parents=True)
    for name, content in disk.files.items():
        (folder / "blobs" / name).write_bytes(bytes(content))
    shelf = FileShelf(folder)
    if shelf.has(FILE.digest):
        try:
            os.close(shelf.open(FILE))
        except TransferCorrupt:
            return False
        return True
    try:
        bring(shelf)
    except TransferCorrupt:
        bring(shelf)  # a part that the cut has damaged is dropped, and the file comes from its beginning
    return shelf.has(FILE.digest)


def unsound(log: list[Call], folder: Path) -> int:
    """After how many of the beginnings of these calls some disk may be left that is not sound."""
    cut, bad = CutDisk(), 0
    seen: set[frozenset[tuple[str, bytes]]] = set()
    for call in log:
        cut.follow(call)
        for disk in cut.left():
            content = frozenset((name, bytes(data)) for name, data in disk.files.items())
            if content not in seen:
                seen.add(content)
                bad += not is_sound(disk, folder / str(len(seen)))
    return bad


def test_attack_34_after_a_power_cut_at_every_write_the_file_is_there_whole_or_not_at_all(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(FileShelf(tmp_path))
    log = recorder.log
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what follows reads what was recorded
    kinds = [call[0] for call in log]
    assert kinds[-3:] == ["sync", "rename", "sync_names"]
    assert kinds.count("write") > len(PIECES)
    assert unsound(log, tmp_path / "cut") == 0
    without_sync = [call for call in log if call[0] != "sync"]
    assert unsound(without_sync, tmp_path / "unsynced") > 0  # so the sync is what makes it sound


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_attack_35_a_disk_that_refuses_any_call_leaves_nothing_that_is_not_verified(
    recorder: Recorder, tmp_path: Path, code: int
) -> None:
    bring(FileShelf(tmp_path / "blobs" / "dry"))
    calls = recorder.count
    for number in range(1, calls + 1):
        folder = tmp_path / "blobs" / str(number)
        recorder.fail_at(recorder.count + number, code)
        shelf = FileShelf(folder)
        with pytest.raises(StorageError) as caught:
            bring(shelf)
        assert isinstance(caught.value, StorageFull) == (code == errno.ENOSPC)
        recorder.fail_at(0, 0)
        assert not shelf.has(FILE.digest) or hash_of(folder) == FILE.digest
        if not shelf.has(FILE.digest):
            bring(shelf)
        assert hash_of(folder) == FILE.digest


def hash_of(folder: Path) -> str:
    return hashlib.sha256((folder / "blobs" / FILE.digest).read_bytes()).hexdigest()


def test_attack_33_a_file_that_is_exchanged_between_hash_and_rename_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = FileShelf(tmp_path)
    shelf.append(FILE.digest, DATA, offset=0)
    part = tmp_path / "blobs" / "partial" / f"{FILE.digest}.part"
    verify = module._verify

    def verify_and_exchange(fd: int, file: FileRef) -> None:
        verify(fd, file)
        part.unlink()
        part.write_bytes(b"!" + DATA[1:])

    monkeypatch.setattr(module, "_verify", verify_and_exchange)
    with pytest.raises(TransferCorrupt):
        shelf.publish(FILE)
    assert not shelf.has(FILE.digest)


def test_attack_33_what_is_read_is_what_was_hashed_whatever_has_the_name_by_then(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    bring(shelf)
    fd = shelf.open(FILE)
    path = tmp_path / "blobs" / FILE.digest
    other = tmp_path / "other"
    other.write_bytes(b"!" + DATA[1:])
    other.replace(path)
    with os.fdopen(fd, "rb") as stream:
        assert stream.read() == DATA


@pytest.mark.parametrize("at", [0, len(DATA) // 2, len(DATA) - 1])
def test_attack_35_a_bit_that_rots_is_found_before_the_file_is_loaded(tmp_path: Path, at: int) -> None:
    shelf = FileShelf(tmp_path)
    bring(shelf)
    path = tmp_path / "blobs" / FILE.digest
    path.chmod(0o600)
    rotten = bytearray(DATA)
    rotten[at] ^= 1
    path.write_bytes(rotten)
    with pytest.raises(TransferCorrupt):
        shelf.open(FILE)
    assert not shelf.has(FILE.digest)


def test_the_free_bytes_are_the_file_systems(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    assert 0 <= FileShelf(tmp_path).free_bytes() <= state.f_blocks * state.f_frsize


@pytest.mark.parametrize("ask", ["has", "resume_at", "append", "publish", "open", "drop", "collect"])
def test_whatever_the_disk_says_nobody_hears_another_error_than_the_shelfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    shelf = FileShelf(tmp_path)

    def refuses(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls: dict[str, Callable[[], object]] = {
        "has": lambda: shelf.has(FILE.digest),
        "resume_at": lambda: shelf.resume_at(FILE.digest),
        "append": lambda: shelf.append(FILE.digest, DATA, offset=0),
        "publish": lambda: shelf.publish(FILE),
        "open": lambda: shelf.open(FILE),
        "drop": lambda: shelf.drop(FILE.digest),
        "collect": lambda: shelf.collect(frozenset()),
    }
    (tmp_path / "blobs" / "old").write_bytes(b"to be collected")
    with monkeypatch.context() as patched:
        for name in ("lstat", "unlink"):
            patched.setattr(Path, name, refuses)
        patched.setattr(os, "open", refuses)
        with pytest.raises(StorageError) as caught:
            calls[ask]()
    assert caught.value.code == "storage"


def test_a_file_that_the_disk_changed_and_keeps_is_told_as_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = FileShelf(tmp_path)
    (tmp_path / "blobs" / FILE.digest).write_bytes(b"!" + DATA[1:])

    def refuses(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(TransferCorrupt):
        shelf.open(FILE)
