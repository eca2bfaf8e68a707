"""What really happened, kept beside the system, and the properties that are read from it.

The properties, each with the name under which a failing seed reports it:

- `lost`: every record whose append returned has its effect at the hub, or lies in a gap that the hub was told of. The
  only excuses are a gap that was refused too and buried under a reason, and a disk that was taken away.
- `twice`: no record has two effects, and none has an effect and lies in a gap that the hub counts.
- `spoiled`: a gap tells accepted records as damaged only where the disk has rotted.
- `invented`: nothing is at the hub that was not put, nothing under another number than it was given, nothing in other
  words; a record whose append failed may be there once, if a crash or a failing disk left that open.
- `reused`: no number of an epoch and class is given to two records.
- `undurable`: nothing is sent that a power cut at that moment could take back.
- `boundaries`: a batch that is sent again has the same numbers and digest; batches that were sent do not overlap. It
  may have grown only by records whose append failed: what failed behind a batch may be found as a part of it one day.
- `settled`: nothing is let go before the hub has committed it, or refused it.
- `refused`: the hub refuses nothing, unless a disk has rotted, or was set back so that numbers were given twice.
- `order`: first effects of an epoch and class come in ascending order. This is promised as long as no message of the
  device vanished or was overtaken between its line and the hub's commit: a line that is cut loses only what comes last,
  and the device goes back to the oldest. With two hubs, a hub that dies with messages in its hands, or a publish that
  was refused, later batches may be taken before earlier ones, and nothing is promised.
- `precious`: no gap says that records of class 0 were evicted or expired.
- `early`: no gap says that a record expired before its time, by true time; `late`: no record is loaded to be sent that
  is older than its time, counted while the machine was up, as far as its disk can know: to its last write before each
  power cut.
- `quota`: the files of the outbox never take more bytes than it was given; nothing is promised once the files were
  given another size, because those of the old size count like those of the new.
- `reported`: the hub has told that a device's store is another one, and that two records have one number.
- `epoch`: a store keeps its epoch until its disk is taken away.
- `pending`: some time after the faults have stopped, nothing waits on any device.
- `floors`, `unverified`, `quarantined`, `provisional`, `stuck`: the slots' (tests/sim/slots.py).
- `crash`: no exception that nobody expected.

Nothing here is known to the system, and nothing here decides what it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Batch

Stream = tuple[str, str, int]
"""Device, epoch, class."""


class Violation(AssertionError):
    """A property does not hold. `name` is the property's."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.name = name


@dataclass(slots=True)
class Birth:
    """When a record was accepted: true time, and how long its machine had been up in all."""

    at_ms: int
    up_ms: int


@dataclass(slots=True)
class StreamTruth:
    """One stream.

    Attributes:
        tokens: of the accepted records, by number.
        births: the same, when.
        batches: the batches that were sent, by first number.
        committed: numbers that the hub has, as effects or in gaps.
        gapped: numbers of which the device told that they will not come.
        refused: numbers that the hub or the broker will never take, and that were buried.
        effects: numbers that had their effect; `highest` is the highest.
        former: tokens that a number had before its disk was set back.
        is_gone: the disk was taken away, with whatever was on it.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    births: dict[int, Birth] = field(default_factory=dict)
    batches: dict[int, BatchId] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    gapped: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    effects: set[int] = field(default_factory=set)
    highest: int = 0
    former: dict[int, set[int]] = field(default_factory=dict)
    is_gone: bool = False


class Truth:
    """All streams of a world.

    Attributes:
        ttl_ms: by class.
        ttl_slack_ms: how much later than its time a record may still be loaded.
        unordered: devices of which a message vanished or was overtaken.
        rotten: devices whose disk has rotted.
        set_back: devices whose disk was set back to an older image of it: they give numbers a second time.
        doubtful: tokens that were put and whose append did not return, or failed.
        reached: how often a situation came up that a good world of seeds must reach.
    """

    def __init__(self, *, ttl_ms: dict[RecordClass, int], ttl_slack_ms: int) -> None:
        self.streams: dict[Stream, StreamTruth] = {}
        self.ttl_ms = ttl_ms
        self.ttl_slack_ms = ttl_slack_ms
        self.unordered: set[str] = set()
        self.rotten: set[str] = set()
        self.set_back: set[str] = set()
        self.doubtful: set[int] = set()
        self.accepted: dict[int, Stream] = {}
        self.epochs: dict[str, str] = {}
        self.tokens = 0
        self.reached: Counter[str] = Counter()

    # The device says

    def token(self) -> int:
        """A new record's token."""
        self.tokens += 1
        self.doubtful.add(self.tokens)
        return self.tokens

    def opened(self, device: str, epoch: str) -> None:
        """A store was opened."""
        before = self.epochs.get(device)
        if before is not None and before != epoch:
            raise Violation("epoch", f"{device} opens epoch {epoch}, its store has {before}")
        self.epochs[device] = epoch

    def taken_away(self, device: str) -> None:
        """The device's disk is another one from here on."""
        self.epochs.pop(device, None)
        for (name, _, _), stream in self.streams.items():
            if name == device:
                stream.is_gone = True

    def was_set_back(self, device: str) -> None:
        """The device's disk is an older image of itself: what was on it is gone, and numbers are given again."""
        self.set_back.add(device)
        self.unordered.add(device)
        for (name, _, _), stream in self.streams.items():
            if name == device:
                for number, token in stream.tokens.items():
                    stream.former.setdefault(number, set()).add(token)
                stream.tokens.clear()
                stream.batches.clear()
                stream.births.clear()

    def accepted_at(self, stream: Stream, first: int, tokens: Sequence[int], birth: Birth) -> None:
        """An append returned: these records are durable under these numbers."""
        truth = self.of(stream)
        for number, token in enumerate(tokens, first):
            if number in truth.tokens:
                raise Violation("reused", f"{stream} gave {number} to {truth.tokens[number]} and to {token}")
            truth.tokens[number] = token
            truth.births[number] = birth
            self.accepted[token] = stream
            self.doubtful.discard(token)

    def sent(self, device: str, batch: Batch) -> bool:
        """A batch leaves the device; True when it is the first time."""
        claim = batch.batch
        truth = self.of((device, claim.epoch, claim.klass))
        if batch.gap is not None:
            self.reached[f"gap.{batch.gap.reason}"] += 1
            truth.gapped.update(range(claim.first, claim.last + 1))
            if claim.klass == RecordClass.EVENT and batch.gap.reason in ("evicted", "expired"):
                raise Violation("precious", f"{device} tells that events {claim.first}-{claim.last} {batch.gap.reason}")
            if batch.gap.reason == "damaged" and device not in self.rotten:
                spoiled = [number for number in range(claim.first, claim.last + 1) if number in truth.tokens]
                if spoiled:
                    raise Violation(
                        "spoiled", f"{_text(device, claim)} is told as damaged, and {spoiled[0]} was durable"
                    )
            return False
        before = truth.batches.get(claim.first)
        if before is not None:
            self.reached["sent_again"] += 1
            grown = [number for number in range(before.last + 1, claim.last + 1) if number in truth.tokens]
            if before != claim and device not in self.rotten and (grown or claim.last <= before.last):
                raise Violation("boundaries", f"{_text(device, claim)} was sent before as {before.first}-{before.last}")
            return False
        if device not in self.rotten:
            for other in truth.batches.values():
                if other.first <= claim.last and claim.first <= other.last:
                    raise Violation("boundaries", f"{_text(device, claim)} overlaps {other.first}-{other.last}")
        truth.batches[claim.first] = claim
        return True

    def expired(self, stream: Stream, first: int, last: int, *, now_ms: int) -> None:
        """The device says that these records have expired."""
        truth = self.of(stream)
        ttl_ms = self.ttl_ms.get(RecordClass(stream[2]), 0)
        for number in range(first, last + 1):
            birth = truth.births.get(number)
            if birth is not None and number not in truth.committed and now_ms - birth.at_ms < ttl_ms:
                raise Violation("early", f"{stream} {number} expired after {now_ms - birth.at_ms} of {ttl_ms} ms")

    def loaded(self, stream: Stream, first: int, last: int, *, up_ms: int) -> None:
        """The device is about to send these records, and has been up for so long in all."""
        ttl_ms = self.ttl_ms.get(RecordClass(stream[2]), 0)
        if not ttl_ms:
            return
        births = self.of(stream).births
        age_ms = min((up_ms - births[n].up_ms for n in range(first, last + 1) if n in births), default=0)
        if age_ms > ttl_ms + self.ttl_slack_ms:
            raise Violation("late", f"{stream} {first}-{last} is sent after {age_ms} of {ttl_ms} ms")

    def settled(self, device: str, claim: BatchId) -> None:
        """The device lets go of these numbers."""
        truth = self.of((device, claim.epoch, claim.klass))
        for number in range(claim.first, claim.last + 1):
            if number not in truth.committed and number not in truth.refused:
                raise Violation("settled", f"{_text(device, claim)} is let go, and the hub does not have {number}")

    # The hub says

    def committed(self, device: str, claim: BatchId, *, fresh: bool) -> None:
        """The hub has committed this batch; it had effects if it was `fresh`."""
        stream = (device, claim.epoch, claim.klass)
        truth = self.of(stream)
        numbers = range(claim.first, claim.last + 1)
        truth.committed.update(numbers)
        self.reached["batches"] += 1
        if not fresh:
            self.reached["batches_again"] += 1
            return
        new = [number for number in numbers if number not in truth.effects]
        if new and device not in self.unordered and new[0] <= truth.highest:
            raise Violation("order", f"{stream} {new[0]} comes after {truth.highest}")
        truth.effects.update(new)
        truth.highest = max(truth.highest, claim.last)

    def refused_by_hub(self, device: str, claim: BatchId, code: str) -> None:
        """The hub will never take this batch."""
        if device not in self.rotten and device not in self.set_back:
            raise Violation("refused", f"the hub refuses {_text(device, claim)}: {code}")
        self.reached["refused"] += 1
        self.buried(device, claim)

    def buried(self, device: str, claim: BatchId) -> None:
        """The hub or the broker has refused this batch for good."""
        self.reached["buried"] += 1
        self.of((device, claim.epoch, claim.klass)).refused.update(range(claim.first, claim.last + 1))

    def disordered(self, device: str) -> None:
        """A message of this device vanished or was overtaken while its line held."""
        self.unordered.add(device)

    def of(self, stream: Stream) -> StreamTruth:
        """What is true of this stream."""
        truth = self.streams.get(stream)
        if truth is None:
            truth = self.streams[stream] = StreamTruth()
        return truth

    # The end

    def judge(
        self,
        stored: dict[Stream, list[tuple[int, int]]],
        gaps: dict[Stream, list[tuple[int, int]]],
        aside: dict[Stream, set[int]],
    ) -> None:
        """Compare with what the hub has in the end.

        Args:
            stored: number and token of every record, as often as it is there.
            gaps: what the hub counts as lost.
            aside: gaps that the devices have buried, with a reason, because nobody took those either.
        """
        seen: set[int] = set()
        for stream, records in stored.items():
            truth = self.of(stream)
            numbers: set[int] = set()
            for number, token in records:
                if number in numbers:
                    raise Violation("twice", f"{stream} {number} has two effects")
                numbers.add(number)
                if token in seen:
                    raise Violation("twice", f"record {token} has two effects")
                seen.add(token)
                known = truth.tokens.get(number)
                if known == token or token in truth.former.get(number, ()):
                    continue
                if known is not None and not (stream[0] in self.set_back and token in self.doubtful):
                    raise Violation("invented", f"{stream} {number} is record {known}, and the hub has {token}")
                if token not in self.doubtful:
                    raise Violation("invented", f"{stream} {number} at the hub was given to nobody ({token})")
            self.reached["effects"] += len(numbers)
            self.reached["doubtful_effects"] += len(numbers - truth.tokens.keys())
            for first, last in gaps.get(stream, ()):
                both = next((n for n in range(first, last + 1) if n in numbers), None)
                if both is not None:
                    raise Violation("twice", f"{stream} {both} has its effect and is counted as lost")
        for stream, truth in self.streams.items():
            told = {n for first, last in gaps.get(stream, ()) for n in range(first, last + 1)}
            self.reached["lost"] += len(told)
            here = dict(stored.get(stream, ()))
            if truth.is_gone:
                continue
            excused = told | (truth.refused & aside.get(stream, set()))
            if stream[0] in self.set_back:
                excused |= truth.gapped  # the hub keeps what it has under a number that is told as lost
            lost = sorted(
                number for number, token in truth.tokens.items() if here.get(number) != token and number not in excused
            )
            if lost:
                raise Violation("lost", f"{stream} {lost[:8]} ({len(lost)}) are neither at the hub nor told as a gap")


def _text(device: str, claim: BatchId) -> str:
    return f"{device} {claim.klass}/{claim.first}-{claim.last}"


class Aftermath(Truth):
    """Looks only at what is at the hub in the end, at quotas and at what stays waiting: a fault must have consequences.

    For measuring how well the worlds bring consequences about; the checks on the way catch most faults earlier.
    """

    def opened(self, device: str, epoch: str) -> None:
        """Any epoch will do."""

    def sent(self, device: str, batch: Batch) -> bool:
        """Anything may be sent."""
        return False

    def expired(self, stream: Stream, first: int, last: int, *, now_ms: int) -> None:
        """Anything may expire."""

    def loaded(self, stream: Stream, first: int, last: int, *, up_ms: int) -> None:
        """Anything may be loaded."""

    def settled(self, device: str, claim: BatchId) -> None:
        """Anything may be let go."""
