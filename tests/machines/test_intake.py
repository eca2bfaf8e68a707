"""Assignments that arrive: one verification at a time, the newest next, none lost to a bad link."""

from __future__ import annotations

import pytest

from edge_agent.core.intake import (
    INTAKE,
    LONGEST_PAUSE_MS,
    Accepted,
    Arrived,
    AskTime,
    Intake,
    IntakeEvent,
    IntakePhase,
    NoteDelay,
    NoteRefusal,
    NoteWaiting,
    OfferModels,
    Pause,
    PauseOver,
    Refused,
    ShowWaiting,
    TimeTrusted,
    Unavailable,
    Untimed,
    Verify,
)
from shared.ids import DeviceId
from shared.machine import UnexpectedEvent
from shared.release import Assignment, Floors, VerifiedAssignment

VERIFIED = VerifiedAssignment(
    assignment=Assignment(device=DeviceId("d"), version=1, issued_ms=0, expires_ms=1, models=()),
    models=(),
    floors=Floors(),
)


def play(*events: IntakeEvent) -> tuple[Intake, list[object]]:
    state, effects = Intake(), list[object]()
    for event in events:
        decision = INTAKE.decide(state, event)
        state = decision.state
        effects += decision.effects
    return state, effects


def test_an_assignment_is_verified_then_offered() -> None:
    state, effects = play(Arrived(b"1"), Accepted(VERIFIED))
    assert effects == [Verify(b"1"), OfferModels(VERIFIED)]
    assert state == Intake()


def test_of_those_that_arrive_during_a_verification_only_the_last_is_verified_next() -> None:
    state, effects = play(Arrived(b"1"), Arrived(b"2"), Arrived(b"3"), Accepted(VERIFIED))
    assert effects == [Verify(b"1"), OfferModels(VERIFIED), Verify(b"3")]
    assert state.phase is IntakePhase.VERIFYING


def test_a_refusal_is_noted_and_not_tried_again() -> None:
    state, effects = play(Arrived(b"1"), Refused("trust.rollback", "older"))
    assert effects == [Verify(b"1"), NoteRefusal("trust.rollback", "older")]
    assert state.phase is IntakePhase.RESTING


def test_a_refused_document_that_is_delivered_again_is_no_new_refusal() -> None:
    older = Refused("trust.rollback", "older")
    told = NoteRefusal("trust.rollback", "older")
    events: list[IntakeEvent] = [Arrived(b"1"), older]
    state, effects = play(*events * 60)
    assert effects.count(told) == 1
    assert effects.count(Verify(b"1")) == 60
    assert state.phase is IntakePhase.RESTING
    _, effects = play(Arrived(b"1"), older, Arrived(b"2"), Accepted(VERIFIED), Arrived(b"1"), older)
    assert effects.count(told) == 1
    _, effects = play(Arrived(b"1"), older, Arrived(b"1"), Unavailable("no link"), PauseOver(), older)
    assert effects.count(told) == 1
    _, effects = play(Arrived(b"1"), older, Arrived(b"1"), Untimed("no time"), TimeTrusted(), older)
    assert effects.count(told) == 1
    _, effects = play(Arrived(b"1"), older, Arrived(b"1"), Arrived(b"2"), older, older)
    assert effects.count(told) == 2, "another document"


def test_a_refused_document_that_is_refused_for_another_reason_is_told_again() -> None:
    events: list[IntakeEvent] = [Arrived(b"1"), Refused("trust.rollback", "older"), Arrived(b"1")]
    _, effects = play(*events, Refused("trust.freeze", "expired"))
    assert effects.count(NoteRefusal("trust.freeze", "expired")) == 1


def test_what_could_not_be_fetched_is_tried_again_after_growing_pauses() -> None:
    events: list[IntakeEvent] = [Arrived(b"1")]
    for _ in range(12):
        events += [Unavailable("no link"), PauseOver()]
    _, effects = play(*events)
    pauses = [effect.delay_ms for effect in effects if isinstance(effect, Pause)]
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[1]
    assert pauses[-1] == LONGEST_PAUSE_MS
    assert effects.count(Verify(b"1")) == 13


def test_the_hub_is_told_once_for_each_document_why_its_files_do_not_come() -> None:
    drips = Unavailable("3 bytes in 15 s", "transfer.stalled")
    told = NoteDelay("transfer.stalled", "3 bytes in 15 s")
    _, effects = play(Arrived(b"1"), drips, PauseOver(), drips, PauseOver(), Unavailable("no link"), PauseOver(), drips)
    assert effects.count(told) == 1
    _, effects = play(Arrived(b"1"), drips, Arrived(b"2"), drips)
    assert effects.count(told) == 2
    _, effects = play(Arrived(b"1"), drips, Arrived(b"1"), Arrived(b"1"), drips)
    assert effects.count(told) == 1
    _, effects = play(Arrived(b"1"), Unavailable("no link"))
    assert not [effect for effect in effects if isinstance(effect, NoteDelay)]


def test_a_newer_assignment_ends_the_pause_and_takes_its_place() -> None:
    state, effects = play(Arrived(b"1"), Unavailable("no link"), Arrived(b"2"), PauseOver())
    assert effects[-1] == Verify(b"2")
    assert state.document == b"2"


def test_a_newer_assignment_waits_through_a_failed_verification() -> None:
    state, _ = play(Arrived(b"1"), Arrived(b"2"), Unavailable("no link"))
    assert state.document == b"2"


def test_a_verdict_without_a_verification_is_a_defect() -> None:
    with pytest.raises(UnexpectedEvent):
        play(Accepted(VERIFIED))


WAITS = [ShowWaiting("no time"), NoteWaiting("no time"), AskTime()]


def test_what_nobody_may_accept_yet_waits_and_goes_on_by_itself() -> None:
    state, effects = play(Arrived(b"1"), Untimed("no time"), PauseOver(), TimeTrusted(), Accepted(VERIFIED))
    assert effects == [Verify(b"1"), *WAITS, ShowWaiting(""), Verify(b"1"), OfferModels(VERIFIED)]
    assert state.phase is IntakePhase.RESTING


def test_nothing_but_the_time_ends_the_wait() -> None:
    events: list[IntakeEvent] = [Arrived(b"1"), Untimed("no time")]
    events += [PauseOver(), Arrived(b"2"), PauseOver(), Arrived(b"3")] * 5
    state, effects = play(*events)
    assert effects == [Verify(b"1"), *WAITS]
    assert (state.phase, state.document) == (IntakePhase.AWAITING_TIME, b"3")
    _, effects = play(*events, TimeTrusted())
    assert effects[-1] == Verify(b"3")


def test_the_hub_is_told_once_that_something_waits() -> None:
    _, effects = play(Arrived(b"1"), Untimed("no time"), TimeTrusted(), Untimed("no time"), TimeTrusted())
    assert effects.count(NoteWaiting("no time")) == 1
    _, effects = play(
        Arrived(b"1"), Untimed("no time"), TimeTrusted(), Refused("trust.freeze", ""), Arrived(b"2"), Untimed("no time")
    )
    assert effects.count(NoteWaiting("no time")) == 1
    assert effects[-1] == AskTime()


def test_a_time_that_came_during_the_verification_is_not_missed() -> None:
    state, effects = play(Arrived(b"1"), TimeTrusted(), Arrived(b"2"), Untimed("no time"))
    assert effects == [Verify(b"1"), Verify(b"2")]
    assert state.phase is IntakePhase.VERIFYING


def test_with_the_time_a_pause_ends() -> None:
    _, effects = play(Arrived(b"1"), Unavailable("the certificate seems to have expired"), TimeTrusted())
    assert effects[-1] == Verify(b"1")


def test_the_time_alone_begins_nothing() -> None:
    assert play(TimeTrusted(), PauseOver()) == (Intake(), [])
