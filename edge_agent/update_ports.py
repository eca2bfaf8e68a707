"""What bringing a release in asks of the outside: files, the hub's files, patches and a verdict on what came.

Beside `ports.py`, which holds every other port; the rules are the same: adapters promise what is written here, and one
contract suite holds the fakes and the real ones to it.
"""

from __future__ import annotations

from typing import Protocol

from shared.ids import Digest
from shared.model import FileRef
from shared.release import Floors, Ground, Patch, VerifiedAssignment
from shared.wire.verification import Judged, StoredRelease


class Shelf(Protocol):
    """Content-addressed files below the state directory, written, synced, verified and renamed."""

    def has(self, digest: Digest) -> bool:
        """Whether a verified file with this digest is there."""
        ...

    def resume_at(self, digest: Digest) -> int:
        """How many bytes of an unfinished file are there."""
        ...

    def append(self, digest: Digest, data: bytes, *, offset: int) -> None:
        """Write at this offset of the unfinished file; raises StorageFull or StorageError."""
        ...

    def part(self, digest: Digest) -> int:
        """A descriptor for writing, of the unfinished file of this digest, which is empty then; raises StorageFull."""
        ...

    def publish(self, file: FileRef) -> None:
        """Sync, hash from the same descriptor, rename, sync the directory; TransferCorrupt drops the file."""
        ...

    def open(self, file: FileRef) -> int:
        """A read-only descriptor whose content was just hashed again; TransferCorrupt when the disk changed it."""
        ...

    def drop(self, digest: Digest) -> None:
        """Remove this file, finished or not, if it is there."""
        ...

    def collect(self, keep: frozenset[Digest]) -> int:
        """Remove every file that is not to be kept and return how many bytes that freed."""
        ...

    def free_bytes(self) -> int:
        """What the file system has left for files."""
        ...


class Fetcher(Protocol):
    """Brings the hub's files; how (HTTPS, another transport, several sources) is the adapter's affair."""

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        """A metadata file, None where the hub has none of that name; raises TransferError."""
        ...

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        """Bring a file onto the shelf, resuming where an earlier try stopped, and publish it.

        With `up_to`, no more of it than up to this byte: it is published only when that is its end.
        """
        ...

    async def upload(self, path: str, data: bytes) -> None:
        """PUT these bytes at this path of the hub; the same bytes may be put there twice. Raises TransferError."""
        ...


class Patcher(Protocol):
    """Makes a file from one that is on the shelf, in a short-lived child with bounded memory."""

    async def apply(self, patch: Patch, *, base: FileRef, result: FileRef) -> None:
        """Publish `result`; base and patch are on the shelf. Raises PatchFailed: fetch the whole file instead."""
        ...


class Comparer(Protocol):
    """Holds a learned release's file against its base, in a short-lived child."""

    async def compare(self, file: FileRef, ground: Ground) -> None:
        """Return if `file` differs from its ground within the bounds; both are on the shelf.

        Raises TrustError `trust.learned` if not; any other error is no word on it.
        """
        ...


class Verifier(Protocol):
    """Decides, in a short-lived child, whether an assignment and the releases that it names are to be trusted."""

    async def verify(
        self, document: bytes, *, floors: Floors, wall_ms: int, time_attested: bool = False
    ) -> VerifiedAssignment:
        """The verified assignment; raises TrustError with the attack's name; any other error is no word on it.

        `wall_ms` is the trusted time. Where the root names a time key, nothing is accepted (`trust.time.unattested`)
        before the time was attested.
        """
        ...

    async def judge(self, releases: tuple[StoredRelease, ...], *, floors: Floors) -> Judged:
        """What of these releases no longer holds, from what is stored, without the hub and whatever has expired.

        Raises OutriderError where that cannot be looked into at all, which is no word on any of them.
        """
        ...


class TimeSource(Protocol):
    """The hub's word on what time it is."""

    async def ask(self, *, floors: Floors) -> int:
        """What the hub's clock says, in milliseconds since 1970, to a question with a nonce of its own.

        Raises:
            TrustError: what came is not to be trusted; the code is below `trust.time` unless a root is to blame.
            TransferRefused: `transfer.not_found` where the hub attests no time.
            OutriderError: nobody answered, or the answer could not be checked.
        """
        ...
