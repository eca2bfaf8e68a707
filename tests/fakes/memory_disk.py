"""A disk in memory: everything is on it at once, and nothing is lost. Power cuts are the simulator's matter."""

from __future__ import annotations

import errno


class MemoryDisk:
    """`edge_agent.ports.Disk` as a dictionary; passing it to a new owner is a restart."""

    def __init__(self, *, size: int = 2**30) -> None:
        self.files: dict[str, bytearray] = {}
        self.size = size
        self.calls: list[tuple[str, ...]] = []

    def names(self) -> list[str]:
        """In no order that anybody may rely on."""
        return sorted(self.files, reverse=True)

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """Zeros either way."""
        self.calls.append(("create", name, str(zeroed)))
        if name in self.files:
            raise FileExistsError(errno.EEXIST, "exists", name)
        if size > self.free_bytes():
            raise OSError(errno.ENOSPC, "full", name)
        self.files[name] = bytearray(size)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """From the file as it is."""
        self.calls.append(("read", name, str(size)))
        return bytes(self._file(name)[offset : offset + size])

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Into the file, which may grow."""
        self.calls.append(("write", name, str(len(data))))
        file = self._file(name)
        file.extend(bytes(max(0, offset - len(file))))
        file[offset : offset + len(data)] = data

    def sync(self, name: str) -> None:
        """Nothing to do."""
        self._file(name)
        self.calls.append(("sync", name))

    def rename(self, old: str, new: str) -> None:
        """At once."""
        self.calls.append(("rename", old, new))
        self.files[new] = self._file(old)
        if new != old:
            del self.files[old]

    def remove(self, name: str) -> None:
        """At once."""
        self.calls.append(("remove", name))
        self._file(name)
        del self.files[name]

    def sync_names(self) -> None:
        """Nothing to do."""
        self.calls.append(("sync_names",))

    def free_bytes(self) -> int:
        """Its size less what is on it."""
        return self.size - sum(map(len, self.files.values()))

    def close(self) -> None:
        """Nothing is open."""

    def _file(self, name: str) -> bytearray:
        try:
            return self.files[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "missing", name) from None
