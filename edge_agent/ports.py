"""What the driver needs from the outside, as protocols. Fakes and real adapters pass the same contract suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from shared.ids import Digest
from shared.inference import TensorHead
from shared.model import FileRef, Manifest, Variant
from shared.release import Floors, VerifiedAssignment
from shared.telemetry import BatchId, Body, Reading, RecordClass
from shared.wire.messages import Batch


class Courier(Protocol):
    """The MQTT link. Knows nothing of messages; moves bytes on topics and says when the link is lost.

    `on_message(topic, payload)` and `on_lost(reason)` are given to the constructor and run on the event loop.
    """

    async def connect(self, *, will_topic: str, will_payload: bytes, subscribe: str) -> None:
        """Connect, subscribe and return; raises Unreachable or TransferRefused within its deadline (10 s)."""
        ...

    def publish(self, topic: str, payload: bytes) -> bool:
        """Hand over one QoS 1 message; False when not connected or the window is full: keep it and try later."""
        ...

    async def disconnect(self) -> None:
        """Leave without triggering the last will. Safe to call at any time."""
        ...


class Ledger(Protocol):
    """The agent's small durable state. Every write is on disk (synchronous=FULL) when its call returns."""

    async def next_boot(self) -> int:
        """Count this start; the first is 1."""
        ...

    async def load_slots(self) -> dict[str, bytes]:
        """Slot states by family, as saved."""
        ...

    async def save_slot(self, family: str, state: bytes) -> None:
        """Save one slot's state, replacing the one before."""
        ...

    async def load_floors(self) -> Floors:
        """The floors; zeros on the first start."""
        ...

    async def raise_floors(self, floors: Floors) -> Floors:
        """Raise each floor to the higher of what is saved and what is given, except roles the given one drops."""
        ...

    async def load_verified(self) -> VerifiedAssignment | None:
        """The newest assignment that was accepted."""
        ...

    async def save_verified(self, verified: VerifiedAssignment) -> None:
        """Save the accepted assignment and raise the floors to its floors, in one transaction."""
        ...


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """How much waits for the hub: records by class, and bytes in all."""

    records: Mapping[RecordClass, int]
    bytes: int


class Outbox(Protocol):
    """Records that wait for the hub. Bounded by bytes; class 0 is never evicted.

    Nothing is sent before it is durable, and nothing is deleted before the hub acknowledged it.
    """

    @property
    def epoch(self) -> str:
        """16 hex digits, drawn when this outbox was created."""
        ...

    async def put(self, *, at_ms: int, body: Body) -> int:
        """Append a record to its class and return its number once it is durable; raises StorageFull for class 0."""
        ...

    async def next_batch(self, klass: RecordClass) -> Batch | None:
        """The oldest batch of the class that is not acknowledged; its boundaries are durable before this returns.

        The same batch, byte for byte, comes back until `settle` is called for it.
        """
        ...

    async def settle(self, batch: BatchId) -> bool:
        """Delete what the hub acknowledged; False when no such batch is open (a late or repeated answer)."""
        ...

    async def drop(self, klass: RecordClass, *, at_ms: int) -> int:
        """Drop the class's unsealed records at a person's word, leaving a note; returns how many. Not class 0."""
        ...

    def depth(self) -> Depth:
        """How much waits; kept in memory, exact."""
        ...


class Vitals(Protocol):
    """How the machine is."""

    def read(self) -> tuple[Reading, ...]:
        """All readings that this machine offers; quick, and never raises for one that it does not."""
        ...


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

    def publish(self, file: FileRef) -> None:
        """Sync, hash from the same descriptor, rename, sync the directory; TransferCorrupt drops the file."""
        ...

    def open(self, file: FileRef) -> int:
        """A read-only descriptor whose content was just hashed again; TransferCorrupt when the disk changed it."""
        ...

    def collect(self, keep: frozenset[Digest]) -> int:
        """Remove every file that is not to be kept and return how many bytes that freed."""
        ...


class Fetcher(Protocol):
    """HTTPS to the hub with the device's certificate."""

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        """A metadata file, None where the hub has none of that name; raises TransferError."""
        ...

    async def blob(self, file: FileRef, shelf: Shelf) -> None:
        """Bring a file onto the shelf, resuming where an earlier try stopped, and publish it."""
        ...


class Verifier(Protocol):
    """Decides, in a short-lived child, whether an assignment and the releases that it names are to be trusted."""

    async def verify(self, document: bytes, *, floors: Floors, wall_ms: int) -> VerifiedAssignment:
        """The verified assignment; raises TrustError with the attack's name; any other error is no word on it."""
        ...


class HostAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a model host says to a request; `payload` holds the outputs' elements in the order of `outputs`."""

    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    outputs: tuple[TensorHead, ...]
    payload: bytes | bytearray | memoryview


class HostReady(msgspec.Struct, frozen=True, kw_only=True):
    """A model host has loaded, warmed up and passed the golden check.

    Attributes:
        agreement: share of golden rows on which it gave the recorded answer, 0 to 1.
        load_ms: from the start of the process to ready.
        rss_bytes: its resident size then.
    """

    agreement: float
    load_ms: int
    rss_bytes: int


class ModelHost(Protocol):
    """One child process with one model in it."""

    @property
    def pid(self) -> int:
        """The child's process id."""
        ...

    async def infer(
        self, inputs: tuple[TensorHead, ...], payload: bytes | bytearray | memoryview, *, deadline_ms: int
    ) -> HostAnswer:
        """Run the model; raises InputRefused, ModelError, HostLost; TimeoutError past the deadline."""
        ...

    async def probe(self) -> bool:
        """Run a golden sample and say whether the answer is the recorded one; raises HostLost and TimeoutError."""
        ...

    async def stop(self) -> None:
        """Drain, end and reap the child; kills it after a grace period. Safe to call twice."""
        ...


class Hosts(Protocol):
    """Starts model hosts."""

    async def start(
        self, *, manifest: Manifest, variant: Variant, model_fd: int, golden_fd: int, on_lost: Callable[[str], None]
    ) -> tuple[ModelHost, HostReady]:
        """Start a child, load, warm up and check; closes both descriptors. Raises ModelError or HostLost.

        `on_lost(reason)` is called once, on the event loop, if the child ends without having been stopped.
        """
        ...
