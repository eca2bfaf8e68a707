"""What to do with assignments that arrive: verify one at a time, the newest next, and never lose one to a bad link.

Rules of this file:
1. At most one verification runs; of those that arrive meanwhile only the last one waits, because an assignment is
   the full desired state and a newer one replaces all before it.
2. A verification that could not get its files is repeated with growing pauses; one that was refused is not.
3. The hub is told of every refusal, and once for each document why its files did not come, unless nobody answered at
   all: a link that drips or stalls may be an attack (slow retrieval), and one that is down is none. A document that
   was refused last and is delivered again, for the same reason, is no new refusal: events are never dropped.
4. One that needs a time that nobody has attested waits until somebody has, however long; the models run on meanwhile.

Signatures and versions are not judged here (shared/trust does, in the verifier child), nor is anything saved.
"""

from __future__ import annotations

import hashlib
from enum import Enum, auto
from typing import Final

import msgspec
from msgspec.structs import replace

from shared.machine import Decision, Row, Table
from shared.release import VerifiedAssignment

FIRST_PAUSE_MS: Final = 1_000
LONGEST_PAUSE_MS: Final = 300_000
NOBODY_ANSWERED: Final = "transfer.unreachable"


class IntakePhase(Enum):
    """RESTING: nothing to do. VERIFYING: a child is at it. PAUSING: its files could not be had, so it waits.

    AWAITING_TIME: nothing new is accepted before the hub has attested the time in this boot.
    """

    RESTING = auto()
    VERIFYING = auto()
    PAUSING = auto()
    AWAITING_TIME = auto()


class Intake(msgspec.Struct, frozen=True):
    """What is at hand.

    Attributes:
        document: is being verified or waits to be.
        waiting: a newer one.
        failures: tries without files.
        told: the code that the hub was told last for this document.
        timed: the time was attested after this verification had begun.
        time_told: the hub was told that something waits for the time; once is enough.
        refused: SHA-256 and code of what was refused last.
    """

    phase: IntakePhase = IntakePhase.RESTING
    document: bytes = b""
    waiting: bytes | None = None
    failures: int = 0
    told: str = ""
    timed: bool = False
    time_told: bool = False
    refused: tuple[bytes, str] = (b"", "")


class Arrived(msgspec.Struct, frozen=True):
    """The hub sent an assignment; not yet trusted in anything."""

    document: bytes


class Accepted(msgspec.Struct, frozen=True):
    """Both signatures agree, and what they agreed on is on disk."""

    verified: VerifiedAssignment


class Refused(msgspec.Struct, frozen=True):
    """The trust rules said no; `code` names the attack that this stops."""

    code: str
    message: str


class Unavailable(msgspec.Struct, frozen=True):
    """The metadata could not be fetched, or the verifier itself could not run."""

    message: str
    code: str = NOBODY_ANSWERED


class Untimed(msgspec.Struct, frozen=True):
    """The trust rules accept nothing before the time was attested."""

    message: str


class TimeTrusted(msgspec.Struct, frozen=True):
    """The hub has attested the time."""


class PauseOver(msgspec.Struct, frozen=True):
    """The timer of PAUSING fired, or the link came back."""


IntakeEvent = Arrived | Accepted | Refused | Unavailable | Untimed | TimeTrusted | PauseOver


class Verify(msgspec.Struct, frozen=True):
    """Start a verifier for this document."""

    document: bytes


class OfferModels(msgspec.Struct, frozen=True):
    """Offer each model of the assignment to its slot."""

    verified: VerifiedAssignment


class NoteRefusal(msgspec.Struct, frozen=True):
    """Keep an event for the hub, and show the refusal in the status."""

    code: str
    message: str


class NoteDelay(msgspec.Struct, frozen=True):
    """Keep an event for the hub: why an assignment cannot be verified yet."""

    code: str
    message: str


class AskTime(msgspec.Struct, frozen=True):
    """Have the hub asked for the time now."""


class NoteWaiting(msgspec.Struct, frozen=True):
    """Keep an event for the hub that an assignment waits for the time."""

    message: str


class ShowWaiting(msgspec.Struct, frozen=True):
    """Show in the status what waits for the time; empty for nothing."""

    message: str


class Pause(msgspec.Struct, frozen=True):
    """Fire PauseOver after this many milliseconds."""

    delay_ms: int


IntakeEffect = Verify | OfferModels | NoteRefusal | NoteDelay | AskTime | NoteWaiting | ShowWaiting | Pause
_Decision = Decision[Intake, IntakeEffect]


def _outlived(state: Intake) -> Intake:
    """What is known beyond the document at hand."""
    return Intake(time_told=state.time_told, refused=state.refused)


def _verify(state: Intake, document: bytes, *effects: IntakeEffect) -> _Decision:
    # The hub sends a document again until the device has it: that is no new reason to tell it the same.
    told = state.told if document == state.document else ""
    verifying = replace(_outlived(state), phase=IntakePhase.VERIFYING, document=document, told=told)
    return Decision(verifying, (*effects, Verify(document)))


def _start(state: Intake, event: Arrived) -> _Decision:
    return _verify(state, event.document)


def _remember(state: Intake, event: Arrived) -> _Decision:
    return Decision(replace(state, waiting=event.document))


def _next(state: Intake, *effects: IntakeEffect) -> _Decision:
    if state.waiting is None:
        return Decision(_outlived(state), effects)
    return _verify(state, state.waiting, *effects)


def _accepted(state: Intake, event: Accepted) -> _Decision:
    return _next(state, OfferModels(event.verified))


def _refused(state: Intake, event: Refused) -> _Decision:
    refused = (hashlib.sha256(state.document).digest(), event.code)
    if refused == state.refused:
        return _next(state)
    return _next(replace(state, refused=refused), NoteRefusal(event.code, event.message))


def _unavailable(state: Intake, event: Unavailable) -> _Decision:
    failures = state.failures + 1
    delay_ms = min(FIRST_PAUSE_MS * 2 ** min(failures - 1, 16), LONGEST_PAUSE_MS)
    effects: tuple[IntakeEffect, ...] = (Pause(delay_ms),)
    told = state.told
    if event.code not in (NOBODY_ANSWERED, told):
        effects = (NoteDelay(event.code, event.message), *effects)
        told = event.code
    newest = state.document if state.waiting is None else state.waiting
    if newest != state.document:
        told = ""
    pausing = replace(_outlived(state), phase=IntakePhase.PAUSING, document=newest, failures=failures, told=told)
    return Decision(pausing, effects)


def _again(state: Intake, _: PauseOver | TimeTrusted) -> _Decision:
    return Decision(replace(state, phase=IntakePhase.VERIFYING), (Verify(state.document),))


def _stale(state: Intake, _: PauseOver | TimeTrusted) -> _Decision:
    return Decision(state)


def _untimed(state: Intake, event: Untimed) -> _Decision:
    newest = state.document if state.waiting is None else state.waiting
    if state.timed:
        return _verify(state, newest)
    told = () if state.time_told else (NoteWaiting(event.message),)
    waiting = replace(_outlived(state), phase=IntakePhase.AWAITING_TIME, document=newest, time_told=True)
    return Decision(waiting, (ShowWaiting(event.message), *told, AskTime()))


def _replace_waiting(state: Intake, event: Arrived) -> _Decision:
    return Decision(replace(state, document=event.document))


def _note_time(state: Intake, _: TimeTrusted) -> _Decision:
    return Decision(replace(state, timed=True))


def _time_came(state: Intake, _: TimeTrusted) -> _Decision:
    return _verify(state, state.document, ShowWaiting(""))


_R, _V, _P, _T = IntakePhase

INTAKE: Final[Table[IntakePhase, Intake, IntakeEvent, IntakeEffect]] = Table(
    "intake",
    phase_of=lambda state: state.phase,
    rows={
        (_R, Arrived): Row((_V,), _start),
        (_V, Arrived): Row((_V,), _remember),
        # A newer document may name files that can be had; its arrival also proves that the link is back.
        (_P, Arrived): Row((_V,), _start),
        (_V, Accepted): Row((_R, _V), _accepted),
        (_V, Refused): Row((_R, _V), _refused),
        (_V, Unavailable): Row((_P,), _unavailable),
        (_P, PauseOver): Row((_V,), _again),
        # The timer of a pause that an arrival ended may still fire.
        (_V, PauseOver): Row((_V,), _stale),
        (_R, PauseOver): Row((_R,), _stale),
        (_T, PauseOver): Row((_T,), _stale),
        (_V, Untimed): Row((_V, _T), _untimed),
        # It could not be accepted either; the newest is verified when the time has come.
        (_T, Arrived): Row((_T,), _replace_waiting),
        (_T, TimeTrusted): Row((_V,), _time_came),
        (_V, TimeTrusted): Row((_V,), _note_time),
        # With the time, certificates that seemed wrong may be right.
        (_P, TimeTrusted): Row((_V,), _again),
        (_R, TimeTrusted): Row((_R,), _stale),
    },
)
