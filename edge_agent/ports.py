"""What the driver needs from the outside, as protocols. Fakes and real adapters pass the same contract suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from edge_agent.core.lessons import Lesson
from edge_agent.core.spending import Spending
from shared.federated import Array
from shared.inference import TensorHead
from shared.model import Manifest, Variant
from shared.release import Floors, VerifiedAssignment
from shared.telemetry import BatchId, Body, Grade, Reading, RecordClass
from shared.wire.messages import Batch


class Courier(Protocol):
    """The MQTT link. Knows nothing of messages; moves bytes on topics and says when the link is lost.

    `on_message(topic, payload)` and `on_lost(reason)` are given to the constructor and run on the event loop.
    """

    async def connect(self, *, will_topic: str, will_payload: bytes, subscribe: str) -> None:
        """Connect, subscribe and return; raises Unreachable or TransferRefused within its deadline (10 s)."""
        ...

    def publish(self, topic: str, payload: bytes, *, ref: BatchId | None = None) -> bool:
        """Hand over one QoS 1 message; False when not connected or the window is full: keep it and try later.

        `ref` comes back in `on_refused(topic, ref, code, reason)` when the broker acknowledges with a failure, or when
        the message is larger than the broker takes (0x95), and in `on_taken(ref)` when it acknowledges without one.
        """
        ...

    def holds(self, ref: BatchId) -> bool:
        """Whether a message of this ref was handed over on this connection and the broker has yet to acknowledge it."""
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

    async def save_slots(self, states: Mapping[str, bytes]) -> None:
        """Save the states of these slots, replacing those before, in one transaction: all of them or none."""
        ...

    async def load_floors(self) -> Floors:
        """The floors; zeros on the first start. Raises StorageError `storage.floors_lost` when there were some once."""
        ...

    async def raise_floors(self, floors: Floors) -> Floors:
        """Raise each floor to the higher of what is saved and what is given, except roles the given one drops.

        What was attested stays as it is saved: documents do not carry it.
        """
        ...

    async def remember_time(self, time_ms: int) -> None:
        """Save what the hub attested, in place of what it attested before; no other floor changes."""
        ...

    async def load_verified(self) -> VerifiedAssignment | None:
        """The newest assignment that was accepted."""
        ...

    async def save_verified(self, verified: VerifiedAssignment) -> None:
        """Save the accepted assignment and raise the floors to its floors, in one transaction."""
        ...

    async def load_spending(self) -> Spending:
        """What was fetched, as saved; an empty record on the first start. Damaged: `storage.unreadable`."""
        ...

    async def save_spending(self, spending: Spending) -> None:
        """Save it, replacing the one before."""
        ...


class Wear(msgspec.Struct, frozen=True, kw_only=True):
    """What the outbox has cost the disk since the agent started: bytes handed to it, and syncs."""

    written_bytes: int
    syncs: int


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """How much waits for the hub, and what became of what did not wait long enough.

    Attributes:
        records: waiting, by class; what is not yet on the disk is not counted.
        bytes: on the disk, all files of the outbox together.
        oldest_ms: by class, how long the oldest has waited, by the store's own clock; absent where none waits.
        lost: records by reason (`evicted`, `expired`, `dropped`, `damaged`, `refused`) since the store was made.
        buried: batches put aside because the hub or the broker will never take them, as far as they are kept.
        buried_given_up: of those, how many went to make room since the start.
    """

    records: Mapping[RecordClass, int]
    bytes: int
    oldest_ms: Mapping[RecordClass, int]
    lost: Mapping[str, int]
    buried: int
    wear: Wear
    buried_given_up: int = 0


class Ticket(Protocol):
    """The promise for one record."""

    async def durable(self) -> int:
        """Wait until it is on the disk and return its number; raises StorageError, and keeps nothing then."""
        ...


class Outbox(Protocol):
    """Records that wait for the hub (docs/adr/0009-the-journal.md). Bounded by bytes; class 0 is never evicted.

    Nothing is sent before it is durable, and nothing is deleted before the hub acknowledged it.
    """

    @property
    def epoch(self) -> str:
        """16 hex digits, drawn when this store was created."""
        ...

    def put(self, body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> Ticket:
        """Append a record to its class; returns at once.

        Raises:
            InvalidValue: the record exceeds MAX_RECORD_BYTES.
            StorageFull: more waits for the disk than may be held in memory: try again after the next commit.
        """
        ...

    async def load(self, klass: RecordClass, *, after: int = 0) -> Batch | None:
        """The oldest batch or gap of the class that is not settled and begins above `after`.

        Its boundaries are durable before this returns. The same numbers come back, with the same content, until
        they are settled. None when nothing more is durable.
        """
        ...

    async def settle(self, batch: BatchId) -> bool:
        """Let go of what the hub acknowledged, in any order; False for what is not open (a late or repeated answer)."""
        ...

    async def bury(self, batch: BatchId, *, reason: str) -> bool:
        """Put aside what will never be taken, and leave a gap (a gap is only settled); False for what is not open."""
        ...

    async def flush(self) -> None:
        """Return once everything that was put before is on the disk; raises StorageError."""
        ...

    async def drop(self, klass: RecordClass) -> int:
        """Drop the class's waiting records at a person's word, leaving a gap; returns how many. Not class 0."""
        ...

    def depth(self) -> Depth:
        """How much waits; kept in memory, exact."""
        ...


class Disk(Protocol):
    """One directory of files, as the journal needs it. Every call raises OSError as the system gives it.

    Nothing is on the disk before `sync` (contents) or `sync_names` (creations, renames and removals) returned.
    """

    def names(self) -> list[str]:
        """The files there are."""
        ...

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """Make a file of this size: filled with zeros that are written, or only with room set aside for it."""
        ...

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to so many bytes from there; fewer at the end of the file."""
        ...

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write all of it there, or raise."""
        ...

    def sync(self, name: str) -> None:
        """Return once the file's contents are on the disk (`fdatasync`)."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what has it."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file."""
        ...

    def sync_names(self) -> None:
        """Return once creations, renames and removals are on the disk."""
        ...

    def free_bytes(self) -> int:
        """What the file system has left."""
        ...

    def close(self) -> None:
        """Let go of open files. Safe to call twice."""
        ...


class Vitals(Protocol):
    """How the machine is."""

    def read(self) -> tuple[Reading, ...]:
        """All readings that this machine offers; quick, and never raises for one that it does not."""
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


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A labelled input, as the application sent it.

    Attributes:
        number: ascends over all samples of the device and is never used twice; 0 until it is kept.
        label: what it is.
        inputs: heads of the tensors in `payload`, one row each.
    """

    label: str
    inputs: tuple[TensorHead, ...]
    payload: bytes
    number: int = 0


class Samples(Protocol):
    """Labelled samples for learning on this device. They are never sent anywhere.

    Bounded by count and bytes for each family; the oldest makes room for the newest.
    """

    async def keep(self, family: str, sample: Sample, *, at_ms: int) -> int:
        """Keep a sample and return its number once it is durable; raises InvalidValue when it is too large."""
        ...

    async def load(self, family: str, *, after: int = 0, at_most: int = 256) -> tuple[Sample, ...]:
        """Kept samples with a number above `after`, oldest first."""
        ...

    async def oldest(self, family: str) -> int:
        """The number of the family's oldest sample; 0 when there is none."""
        ...

    async def drop(self, family: str) -> int:
        """Forget every sample of the family; returns how many there were."""
        ...


class RoundReplies(Protocol):
    """Answers to tasks of federated runs, durable before they are sent; one for each run, and none for long."""

    async def load(self, run: str, message: str) -> bytes | None:
        """The answer to this message, if it is kept."""
        ...

    async def keep(self, run: str, message: str, content: bytes, *, at_ms: int) -> None:
        """Keep this answer, and forget the run's earlier ones and every run's that are older than a day."""
        ...


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What a lesson came to: the head's arrays (none when it was only measured), and figures."""

    arrays: Mapping[str, Array]
    metrics: Mapping[str, float]


class Trainer(Protocol):
    """One child process with one release's features in it."""

    @property
    def pid(self) -> int:
        """The child's process id."""
        ...

    @property
    def newest(self) -> int:
        """The number of the newest sample that it was fed; 0 for none."""
        ...

    async def feed(self, samples: Sequence[Sample], *, newest: int, forget_before: int) -> None:
        """Hand over samples, oldest first, no faster than they are taken.

        `newest` is the number up to which all that are usable were handed over now; those with a lower number than
        `forget_before` are forgotten.
        """
        ...

    async def learn(self, lesson: Lesson) -> Learned:
        """Do the lesson on what was fed; raises ModelError (CannotLearn for what the task is to blame), HostLost.

        Takes as long as it takes: whoever calls has a deadline, and ends the trainer when it passes.
        """
        ...

    async def stop(self) -> None:
        """End and reap the child. Safe to call twice."""
        ...


class Trainers(Protocol):
    """Starts trainers."""

    async def start(
        self, *, manifest: Manifest, variant: Variant, features: str, model_fd: int, on_lost: Callable[[str], None]
    ) -> Trainer:
        """Start a child and load the model in it; closes the descriptor. Raises ModelError, CannotLearn or HostLost.

        `on_lost(reason)` is called once, on the event loop, if the child ends without having been stopped.
        """
        ...


class CloudAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub's larger model says to one row; `payload` holds one buffer for each of `outputs`.

    Attributes:
        model, version, variant, digest: what answered, in 128 characters each; empty where the hub does not say.
        size_bytes: of the response's body.
        took_ms: from the question being sent on a connection that was open to the answer being read.
    """

    model: str
    version: str
    variant: str
    digest: str
    label: str
    confidence: float
    outputs: tuple[TensorHead, ...]
    payload: tuple[bytes | bytearray | memoryview, ...]
    size_bytes: int
    took_ms: int


class CloudRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """The hub said no, with its HTTP status; `retry_after_ms` is what it asked for, None where it did not."""

    status: int
    message: str
    retry_after_ms: int | None = None


class Cloud(Protocol):
    """The hub's larger models, by the Open Inference Protocol over HTTPS with the device's certificate."""

    async def ask(
        self,
        model: str,
        inputs: tuple[TensorHead, ...],
        payload: bytes | bytearray | memoryview,
        *,
        deadline_ms: int,
        within_ms: int,
    ) -> CloudAnswer | CloudRefusal:
        """Ask about one row; returns or raises within `within_ms`, whatever the hub does.

        Args:
            model: the hub's name for it.
            deadline_ms: told to the hub, so that it does not work on what comes too late anyway.
            within_ms: how long an answer is waited for.

        Raises:
            InputRefused: the payload does not fit its heads; nothing was sent.
            Unreachable: nobody answered in time, or the connection broke.
            TransferRefused: the hub's certificate or this device's is not accepted.
            TransferCorrupt: what came is no answer to this question.
        """
        ...

    def close(self) -> None:
        """Give up what is on its way and hang up. Safe to call twice."""
        ...


class CertificateLife(msgspec.Struct, frozen=True, kw_only=True):
    """From when to when the device's certificate is good, milliseconds since 1970; zeros while nobody has looked."""

    not_before_ms: int = 0
    not_after_ms: int = 0


class Renewer(Protocol):
    """Has the device's certificate renewed, in a short-lived child."""

    async def renew(self) -> CertificateLife:
        """Trade the certificate for one with a new key; when this returns, the new pair is on disk and counts.

        Raises:
            OutriderError: nothing was changed; a code of `shared.renewal.REFUSED_FOR_GOOD` will not pass by itself.
        """
        ...

    async def look(self) -> CertificateLife:
        """The dates of the certificate at hand; raises OutriderError."""
        ...
