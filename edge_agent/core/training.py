"""The training machine: one task of a federated run at a time, answered once and remembered.

    decision = decide(training, event)     nothing is saved: the hub repeats what was not answered

Rules of this file:
1. A task is answered: with what was learned, or with an error that says why not, also when its deadline passes. The
   one exception is a task that cannot be had now (its content is unreachable): the hub says it again.
2. A task that was answered is answered again from what was kept, never learned twice; one that is at work or waits
   is not taken a second time.
3. One task is at work. Others wait, a few of them; what is beyond is left to the hub, which says it again.
4. The trainer stays warm between the tasks of a run and ends when none came for a while.

Not here: what a task asks for (edge_agent/core/lessons.py), clocks, processes, and what is sent where.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

import msgspec
from msgspec.structs import replace

from shared import limits
from shared.errors import InvalidValue, ProtocolViolation
from shared.federated import PRECONDITION, FlowerError, FlowerRecord
from shared.ids import parse_digest
from shared.machine import Decision, Row, Table

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_WAITING_TASKS: Final = 4
WARM_MS: Final = 120_000
"""How long a trainer without work is kept: longer than a round whose slowest device takes its time."""

Outcome = dict[str, FlowerRecord] | FlowerError
"""What a task is answered with: records, or why there are none."""


class TrainingPhase(Enum):
    """IDLE: no task. FETCHING: its content is on its way. TRAINING: a child learns. REPLYING: the answer is kept."""

    IDLE = "idle"
    FETCHING = "fetching"
    TRAINING = "training"
    REPLYING = "replying"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A message of a run for this device.

    Attributes:
        run, message: name it; the hub repeats it under the same names.
        until_ms: monotonic time after which nobody waits for the answer.
        content: its bytes; empty when they are to be fetched.
        blob, length: SHA-256 and size of what is to be fetched.
    """

    run: str
    message: str
    until_ms: int
    content: bytes = b""
    blob: str = ""
    length: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What tells tasks apart."""
        return self.run, self.message


Key = tuple[str, str]


class Training(msgspec.Struct, frozen=True):
    """`task` is the one at work, with its content once that is here; `waiting` are the next ones, oldest first."""

    phase: TrainingPhase = TrainingPhase.IDLE
    task: Task | None = None
    waiting: tuple[Task, ...] = ()


# Events


class TaskArrived(msgspec.Struct, frozen=True, kw_only=True):
    """The hub wants this; `answered` says whether an answer to it is kept."""

    task: Task
    answered: bool
    now_ms: int


class ContentHere(msgspec.Struct, frozen=True):
    """The task's content was fetched and is what was promised."""

    key: Key
    content: bytes


class ContentMissing(msgspec.Struct, frozen=True, kw_only=True):
    """The task's content did not come; `retry` says whether it may come later."""

    key: Key
    reason: str
    retry: bool
    now_ms: int


class Worked(msgspec.Struct, frozen=True):
    """The task's work is over, well or not."""

    key: Key
    outcome: Outcome


class Replied(msgspec.Struct, frozen=True):
    """The answer is kept, and was sent if it could be."""

    key: Key
    now_ms: int


class DeadlinePassed(msgspec.Struct, frozen=True):
    """Nobody waits for the task's answer any more."""

    key: Key


class WarmthOver(msgspec.Struct, frozen=True):
    """No task came for a while."""


TrainingEvent = TaskArrived | ContentHere | ContentMissing | Worked | Replied | DeadlinePassed | WarmthOver


# Effects


class FetchContent(msgspec.Struct, frozen=True):
    """Fetch the task's content; answered by ContentHere or ContentMissing."""

    task: Task


class Work(msgspec.Struct, frozen=True):
    """Do what the task's content asks for; answered by Worked."""

    task: Task


class GiveUp(msgspec.Struct, frozen=True):
    """Stop fetching and working, and end the trainer: it may be in the middle of something. Not answered."""


class Reply(msgspec.Struct, frozen=True):
    """Keep the answer, then send it; answered by Replied."""

    task: Task
    outcome: Outcome


class ReplyAgain(msgspec.Struct, frozen=True):
    """Send the answer that is kept. Not answered."""

    task: Task


class LeaveToHub(msgspec.Struct, frozen=True):
    """Too many tasks wait, or this one cannot be had now: the hub will say it again."""

    task: Task
    reason: str


class StartDeadline(msgspec.Struct, frozen=True):
    """Say DeadlinePassed(key) after this time."""

    key: Key
    delay_ms: int


class StopDeadline(msgspec.Struct, frozen=True):
    """Forget the deadline's timer."""


class KeepWarm(msgspec.Struct, frozen=True):
    """Say WarmthOver after this time, unless there is work before."""

    delay_ms: int


class StopWarmth(msgspec.Struct, frozen=True):
    """Forget the warmth's timer."""


class EndTrainer(msgspec.Struct, frozen=True):
    """End the trainer, if one runs."""


TrainingEffect = (
    FetchContent
    | Work
    | GiveUp
    | Reply
    | ReplyAgain
    | LeaveToHub
    | StartDeadline
    | StopDeadline
    | KeepWarm
    | StopWarmth
    | EndTrainer
)
_Step = Decision[Training, TrainingEffect]


def check_name(name: str) -> str:
    """The name of a run or a message, which is also a part of a path; raises ProtocolViolation."""
    if not _NAME.fullmatch(name):
        raise ProtocolViolation(f"{name[:80]!r} names no run and no message", code="protocol.round")
    return name


def check_blob(digest: str, length: int) -> str:
    """The digest of a content that is to be fetched; raises ProtocolViolation unless it and its length can be."""
    try:
        parse_digest(digest)
    except InvalidValue as error:
        raise ProtocolViolation("a task without content names no blob", code="protocol.round") from error
    if not 0 < length <= limits.MAX_ROUND_MESSAGE_BYTES:
        raise ProtocolViolation(f"a task of {length} bytes", code="protocol.too_large")
    return digest


def decide(training: Training, event: TrainingEvent) -> _Step:
    """The training after this event, and what to do."""
    return TRAINING.decide(training, event)


def _first(training: Training, event: TaskArrived) -> _Step:
    if event.answered:
        return Decision(training, (ReplyAgain(event.task),))
    return _begin(training, event.task, event.now_ms, StopWarmth())


def _further(training: Training, event: TaskArrived) -> _Step:
    known = {task.key for task in (training.task, *training.waiting) if task is not None}
    if event.task.key in known:
        return Decision(training)
    if event.answered:
        return Decision(training, (ReplyAgain(event.task),))
    if len(training.waiting) >= MAX_WAITING_TASKS:
        return Decision(training, (LeaveToHub(event.task, "too many tasks wait"),))
    return Decision(replace(training, waiting=(*training.waiting, event.task)))


def _begin(training: Training, task: Task, now_ms: int, *before: TrainingEffect) -> _Step:
    delay_ms = task.until_ms - now_ms
    if delay_ms <= 0:
        after = replace(training, phase=TrainingPhase.REPLYING, task=task)
        return Decision(after, (*before, Reply(task, _TOO_LATE)))
    timer = StartDeadline(task.key, delay_ms)
    if task.blob:
        return Decision(
            replace(training, phase=TrainingPhase.FETCHING, task=task), (*before, timer, FetchContent(task))
        )
    return Decision(replace(training, phase=TrainingPhase.TRAINING, task=task), (*before, timer, Work(task)))


def _next(training: Training, now_ms: int, *before: TrainingEffect) -> _Step:
    if training.waiting:
        rest = replace(training, waiting=training.waiting[1:])
        return _begin(rest, training.waiting[0], now_ms, *before)
    return Decision(Training(), (*before, KeepWarm(WARM_MS)))


def _content(training: Training, event: ContentHere) -> _Step:
    task = training.task
    if task is None or task.key != event.key:
        return Decision(training)
    task = replace(task, content=event.content)
    return Decision(replace(training, phase=TrainingPhase.TRAINING, task=task), (Work(task),))


def _missing(training: Training, event: ContentMissing) -> _Step:
    task = training.task
    if task is None or task.key != event.key:
        return Decision(training)
    if event.retry:
        return _next(training, event.now_ms, StopDeadline(), LeaveToHub(task, event.reason))
    return _reply(training, task, FlowerError(PRECONDITION, event.reason), StopDeadline())


def _worked(training: Training, event: Worked) -> _Step:
    task = training.task
    if task is None or task.key != event.key:
        return Decision(training)
    return _reply(training, task, event.outcome, StopDeadline())


def _late(training: Training, event: DeadlinePassed) -> _Step:
    task = training.task
    if task is None or task.key != event.key:
        return Decision(training)
    return _reply(training, task, _TOO_LATE, GiveUp())


def _reply(training: Training, task: Task, outcome: Outcome, *before: TrainingEffect) -> _Step:
    light = replace(task, content=b"")  # from here on only its name is needed
    return Decision(replace(training, phase=TrainingPhase.REPLYING, task=light), (*before, Reply(light, outcome)))


def _replied(training: Training, event: Replied) -> _Step:
    if training.task is None or training.task.key != event.key:
        return Decision(training)
    return _next(training, event.now_ms)


def _cool(training: Training, _: WarmthOver) -> _Step:
    return Decision(training, (EndTrainer(),))


def _stay(training: Training, _: TrainingEvent) -> _Step:
    return Decision(training)


_TOO_LATE: Final = FlowerError(PRECONDITION, "the deadline passed before the device was done")
_IDLE, _FETCH = TrainingPhase.IDLE, TrainingPhase.FETCHING
_TRAIN, _REPLY = TrainingPhase.TRAINING, TrainingPhase.REPLYING
_ANY: Final = (_IDLE, _FETCH, _TRAIN, _REPLY)

TRAINING: Final[Table[TrainingPhase, Training, TrainingEvent, TrainingEffect]] = Table(
    "training",
    phase_of=lambda training: training.phase,
    rows={
        (_IDLE, TaskArrived): Row(_ANY, _first),
        (_FETCH, TaskArrived): Row((_FETCH,), _further),
        (_TRAIN, TaskArrived): Row((_TRAIN,), _further),
        (_REPLY, TaskArrived): Row((_REPLY,), _further),
        (_FETCH, ContentHere): Row((_FETCH, _TRAIN), _content),
        (_FETCH, ContentMissing): Row(_ANY, _missing),
        (_TRAIN, Worked): Row((_TRAIN, _REPLY), _worked),
        (_REPLY, Replied): Row(_ANY, _replied),
        (_FETCH, DeadlinePassed): Row((_FETCH, _REPLY), _late),
        (_TRAIN, DeadlinePassed): Row((_TRAIN, _REPLY), _late),
        (_IDLE, WarmthOver): Row((_IDLE,), _cool),
        # Late news of work that was given up, or of a task that is answered already.
        (_IDLE, ContentHere): Row((_IDLE,), _stay),
        (_TRAIN, ContentHere): Row((_TRAIN,), _stay),
        (_REPLY, ContentHere): Row((_REPLY,), _stay),
        (_IDLE, ContentMissing): Row((_IDLE,), _stay),
        (_TRAIN, ContentMissing): Row((_TRAIN,), _stay),
        (_REPLY, ContentMissing): Row((_REPLY,), _stay),
        (_IDLE, Worked): Row((_IDLE,), _stay),
        (_FETCH, Worked): Row((_FETCH,), _stay),
        (_REPLY, Worked): Row((_REPLY,), _stay),
        (_IDLE, DeadlinePassed): Row((_IDLE,), _stay),
        (_REPLY, DeadlinePassed): Row((_REPLY,), _stay),
        (_IDLE, Replied): Row((_IDLE,), _stay),
        (_FETCH, Replied): Row((_FETCH,), _stay),
        (_TRAIN, Replied): Row((_TRAIN,), _stay),
        # Work came in the moment when the warmth was over.
        (_FETCH, WarmthOver): Row((_FETCH,), _stay),
        (_TRAIN, WarmthOver): Row((_TRAIN,), _stay),
        (_REPLY, WarmthOver): Row((_REPLY,), _stay),
    },
)
