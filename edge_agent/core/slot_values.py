"""The words of the slot machine: phases, the persisted state, events and effects.

Rules of this file:
1. `active` is a committed release or None; a candidate becomes active by committing and in no other way.
2. An event about work on a release carries that release's `key`, so that what comes late is recognised and ignored.
3. Every effect can be carried out twice with the same result as once: after a crash it may well be.

Not here: what leads to what (edge_agent/core/slots.py), the state's bytes (edge_agent/core/slot_bytes.py).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec

from shared.ids import Digest, FamilyName
from shared.model import FileRef, Manifest, Variant
from shared.profile import Probation
from shared.release import Ground, Patch, VerifiedModel

STATE_SCHEMA: Final = 1
MAX_LOADS: Final = 4
"""How often a candidate is loaded before it is given up; counted before each load, so that a power cut counts."""
MAX_TRANSITIONS: Final = 28
"""Steps a candidate may take in all; what needs more runs in a circle."""
MAX_QUARANTINED: Final = 64
MAX_REFETCHES: Final = 2
"""How often files are brought in anew because the disk changed them before they were loaded."""
MAX_EXTENSIONS: Final = 10
"""How often probation is prolonged for want of answers before the release is given up."""
EXTENSION_MS: Final = 2_000
MAX_ROLLBACK_STARTS: Final = 3
MAX_GATHERING_MS: Final = 7 * 24 * 3_600_000
"""How long verified files wait for those of the other members of their set, in one life of the process."""
MAX_READY_MS: Final = 1_800_000
"""How long a host that is up waits for those of the other members of its set."""
CRASH_LOOP: Final = 5
"""Crashes of the active host without a good answer in between from which on the model counts as degraded."""
FIRST_DELAY_MS: Final = 1_000
MIN_FETCH_DELAY_MS: Final = 100
MAX_FETCH_DELAY_MS: Final = 300_000
MAX_RESTART_DELAY_MS: Final = 60_000
MAX_ERROR_CHARS: Final = 400


class Phase(Enum):
    """Where a slot stands. COMMITTED: the active release serves. IDLE: nothing does. All others have a candidate."""

    IDLE = "idle"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    STAGED = "staged"
    WARMUP = "warmup"
    READY = "ready"
    PROBATION = "probation"
    COMMITTED = "committed"
    ROLLING_BACK = "rolling_back"


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A verified release, the variant of it that this device runs, and shorter ways to its files.

    Attributes:
        ground: of a learned release, what its file is held against before it is first loaded.
    """

    manifest: Manifest
    manifest_digest: Digest
    variant: str
    assignment_version: int
    patches: tuple[Patch, ...] = ()
    ground: Ground | None = None

    @property
    def key(self) -> str:
        """Names the release: hosts, fetches and late events are told apart by it."""
        return self.manifest_digest

    @property
    def served(self) -> Variant:
        """The variant that is loaded."""
        return next(variant for variant in self.manifest.variants if variant.name == self.variant)

    @property
    def files(self) -> tuple[FileRef, ...]:
        """What must lie on the shelf for it to run: the model's file and the golden set."""
        return self.served.file, self.manifest.golden.file

    @property
    def brought(self) -> tuple[FileRef, ...]:
        """What must lie on the shelf while it is taken in: its files, and what a learned one is held against."""
        return self.files if self.ground is None else (*self.files, self.ground.file)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One of the releases that change together: of which family, and the digest of its manifest."""

    family: FamilyName
    manifest: Digest


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counters of a probation.

    Attributes:
        good, failed: answers; `good` stops counting once there are enough.
        started: how often the candidate was switched to.
        extensions: how often the time was prolonged for want of answers.
        passed: the probation is over and went well; the other members of the set are waited for.
    """

    good: int = 0
    failed: int = 0
    started: int = 0
    extensions: int = 0
    passed: bool = False


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """The persisted state of one model family.

    Attributes:
        probation: the profile's policy, as of the last start.
        active: the committed release that serves, or that is gone back to.
        previous: the committed release before it, kept for the operator; None when the signed floor forbids it.
        candidate: the release on its way in; in ROLLING_BACK the one on its way out.
        together: every member of the set that the candidate belongs to, itself included; empty when it changes alone.
        is_gathered: every member of that set had its verified files, in this life of the process.
        changed_with: the families whose releases were committed in one step with `active`, its own included; empty
            when it came alone. They are gone back from as one too.
        tries: loads of the candidate, counted before each; what stood the test and waits is not counted.
        fetch_tries: failed fetches in a row.
        refetches: how often the disk changed the candidate's files before they were loaded.
        transitions: steps that the candidate took.
        crashes: losses of the active host since its last good answer.
        quarantine: manifest digests that this device will not run again, oldest first.
        refused: newest assignment version whose quarantined release was refused aloud.
        error_code, error: why the last attempt ended, until one succeeds; `failed` is the digest of its manifest.
        revision: grows with every change that the hub is told of.
    """

    family: FamilyName
    probation: Probation
    phase: Phase = Phase.IDLE
    active: Installed | None = None
    previous: Installed | None = None
    candidate: Installed | None = None
    together: tuple[Member, ...] = ()
    is_gathered: bool = False
    changed_with: tuple[FamilyName, ...] = ()
    tries: int = 0
    fetch_tries: int = 0
    refetches: int = 0
    transitions: int = 0
    crashes: int = 0
    trial: Trial = Trial()
    quarantine: tuple[Digest, ...] = ()
    refused: int = 0
    error_code: str = ""
    error: str = ""
    failed: str = ""
    revision: int = 0
    schema: int = STATE_SCHEMA


# Events


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """A verified assignment names this release.

    Attributes:
        force: lifts its quarantine.
        patches: shorter ways to its files.
        together: the set that it changes with, itself included; empty when it changes alone.
        refusal_code, refusal: why it is not to be taken in although it may be trusted; empty when nothing stands
            against it.
    """

    model: VerifiedModel
    variant: str
    assignment_version: int
    force: bool = False
    patches: tuple[Patch, ...] = ()
    together: tuple[Member, ...] = ()
    refusal_code: str = ""
    refusal: str = ""


class Withdrawn(msgspec.Struct, frozen=True):
    """The newest verified assignment no longer names this family."""


class FilesHere(msgspec.Struct, frozen=True):
    """The fetch has brought all files onto the shelf."""

    key: str


class FetchFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The fetch ended without the files.

    `retry` is the error's: whether the same can succeed later. `jitter` is drawn from 0 to 1, so that devices that
    fail together do not try again together.
    """

    key: str
    code: str
    message: str
    retry: bool
    jitter: float = 1.0


class FetchDue(msgspec.Struct, frozen=True):
    """Time to fetch again; also said when the link came back, to cut the waiting short."""


class FilesVerified(msgspec.Struct, frozen=True):
    """The files on the shelf are what was signed."""

    key: str


class FilesBad(msgspec.Struct, frozen=True, kw_only=True):
    """The disk changed files that were right when they were published: seen at verification, or at a host's start.

    With `retry` it is the disk that refused to show them, and they may be all right.
    """

    key: str
    code: str
    message: str
    retry: bool = False


class FilesRefused(msgspec.Struct, frozen=True, kw_only=True):
    """The file is what was signed, and holds what may not be signed that way: it moved further than its base allows."""

    key: str
    code: str
    message: str


class WarmUpAllowed(msgspec.Struct, frozen=True):
    """There is room to load the candidate beside what runs."""

    key: str


class WarmUpDue(msgspec.Struct, frozen=True):
    """Time to try loading the candidate again."""


class HostReady(msgspec.Struct, frozen=True):
    """The host of this release has loaded, warmed up and passed the golden check, or was up already."""

    key: str


class HostFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The host of this release did not come up, failed the golden check (`retry` False), or was lost (`retry` True)."""

    key: str
    code: str
    message: str
    retry: bool


class RestartDue(msgspec.Struct, frozen=True):
    """Time to start the active release's host again."""


class AnswerGood(msgspec.Struct, frozen=True):
    """The host answered a request or a probe."""

    key: str


class AnswerBad(msgspec.Struct, frozen=True, kw_only=True):
    """The model failed on an acceptable input, or gave a wrong answer to a probe; the host is still there."""

    key: str
    code: str
    message: str


class ProbationTimedOut(msgspec.Struct, frozen=True):
    """The probation's time, or its prolongation, is over."""


class Restarted(msgspec.Struct, frozen=True):
    """The process has started and read this state from disk; no host runs, no timer, no fetch."""

    probation: Probation


class OperatorRollback(msgspec.Struct, frozen=True):
    """Someone at the device wants the release before."""


class Stopping(msgspec.Struct, frozen=True):
    """The agent ends in order, and the hosts with it."""


class NoLongerTrusted(msgspec.Struct, frozen=True, kw_only=True):
    """A release that was accepted does not hold any more: it stops serving, and is not quarantined."""

    key: str
    code: str
    message: str


# Events of a set (edge_agent/core/sets.py says them; each is ignored where it comes late)


class Gathered(msgspec.Struct, frozen=True):
    """Every member of the candidate's set has its verified files: their hosts may be loaded."""

    key: str


class SwitchAllowed(msgspec.Struct, frozen=True):
    """Every member's host is ready: requests go to the candidate from now on, on trial."""

    key: str


class SteppedBack(msgspec.Struct, frozen=True):
    """Another member on trial has lost its host: the release before serves until all are ready again."""

    key: str


class CommitAllowed(msgspec.Struct, frozen=True, kw_only=True):
    """Every member has passed its probation; `changed` are the families that change in this step."""

    key: str
    changed: tuple[FamilyName, ...]


class SetFailed(msgspec.Struct, frozen=True, kw_only=True):
    """Another member has failed: the candidate goes, without blame.

    `by_count` says that the other one was given up for the number of its loads, without a failure that was seen.
    """

    key: str
    code: str
    message: str
    by_count: bool = False


class WaitOver(msgspec.Struct, frozen=True):
    """The other members of the set were waited for long enough."""


class SetRolledBack(msgspec.Struct, frozen=True, kw_only=True):
    """What was committed in one step with `active` is gone back from, so that `active` is too."""

    code: str
    message: str


Event = (
    Offered | Withdrawn | FilesHere | FetchFailed | FetchDue | FilesVerified | FilesBad | FilesRefused | WarmUpAllowed
    | WarmUpDue | HostReady | HostFailed | RestartDue | AnswerGood | AnswerBad | ProbationTimedOut | Restarted
    | OperatorRollback | NoLongerTrusted | Gathered | SwitchAllowed | SteppedBack | CommitAllowed | SetFailed | WaitOver
    | SetRolledBack | Stopping
)  # fmt: skip


# Effects


class Timer(Enum):
    """A slot's timers: at most one of each runs; starting it again replaces it."""

    FETCH = "fetch"
    WARM_UP = "warm_up"
    PROBATION = "probation"
    RESTART = "restart"
    WAIT = "wait"


class Fetch(msgspec.Struct, frozen=True):
    """Bring these files onto the shelf; answered by FilesHere or FetchFailed. Replaces this slot's earlier fetch.

    `patches` are shorter ways to some of them.
    """

    key: str
    files: tuple[FileRef, ...]
    patches: tuple[Patch, ...] = ()


class VerifyFiles(msgspec.Struct, frozen=True):
    """Hash the files on the shelf once more; answered by FilesVerified or FilesBad.

    With `ground` the first of them is held against it too; answered by FilesRefused if it does not keep to its bounds.
    """

    key: str
    files: tuple[FileRef, ...]
    ground: Ground | None = None


class RequestWarmUp(msgspec.Struct, frozen=True):
    """Answer WarmUpAllowed as soon as no other slot is in WARMUP, so that at most one host is loaded on top."""

    key: str


class CancelWork(msgspec.Struct, frozen=True):
    """Stop this release's fetch, verification, warm-up request and probes; nothing need be answered."""

    key: str


class StartHost(msgspec.Struct, frozen=True):
    """See that the release's host runs; answered by HostReady (at once when it is up), HostFailed or FilesBad.

    FilesBad is the answer when a file has changed since it was verified or is gone, with `retry` when the disk refuses.
    """

    release: Installed


class StopHost(msgspec.Struct, frozen=True):
    """Drain, then end the release's host, if it runs."""

    key: str


class SwitchTo(msgspec.Struct, frozen=True):
    """New requests go to this release's host, and are refused with `retry` while it is not up; None serves nothing."""

    key: str | None


class Probe(msgspec.Struct, frozen=True):
    """Run that many golden samples on the candidate's host; each is answered by AnswerGood or AnswerBad."""

    key: str
    count: int


class StartTimer(msgspec.Struct, frozen=True):
    """After this time, say the timer's event (`timer_event`)."""

    timer: Timer
    delay_ms: int


class StopTimer(msgspec.Struct, frozen=True):
    """Forget this timer."""

    timer: Timer


class Report(msgspec.Struct, frozen=True):
    """Tell the hub the device's state soon; several may be merged into one."""


class Note(msgspec.Struct, frozen=True):
    """Put a DeviceEvent into the outbox, class 0. Lost if the power goes right before; `Report` makes up for it."""

    name: str
    detail: dict[str, str] = {}


class CollectGarbage(msgspec.Struct, frozen=True):
    """Let the shelf drop every file that no slot keeps (`slots.files_to_keep` over all slots)."""


Effect = (
    Fetch | VerifyFiles | RequestWarmUp | CancelWork | StartHost | StopHost | SwitchTo | Probe | StartTimer | StopTimer
    | Report | Note | CollectGarbage
)  # fmt: skip


def timer_event(timer: Timer) -> Event:
    """The event to say when this timer fires."""
    match timer:
        case Timer.FETCH:
            return FetchDue()
        case Timer.WARM_UP:
            return WarmUpDue()
        case Timer.PROBATION:
            return ProbationTimedOut()
        case Timer.RESTART:
            return RestartDue()
        case Timer.WAIT:
            return WaitOver()


def backoff_ms(tries: int, *, most_ms: int) -> int:
    """1 s after the first failure, twice as long after each further one, at most `most_ms`."""
    return min(most_ms, FIRST_DELAY_MS << min(max(tries, 1) - 1, 20))
