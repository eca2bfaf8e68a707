"""Who answers a request, why not, and what becomes of feedback."""

from __future__ import annotations

import math

import msgspec
import pytest

from edge_agent.core.serving import MAX_LABEL_BYTES, PATIENT_MS, Recent, Route, admit, is_models_fault
from shared.inference import Answer, Feedback, Infer, Refusal
from shared.limits import MAX_RECORD_BYTES, MAX_REQUEST_ID_CHARS, MAX_WAITING_REQUESTS
from shared.telemetry import Outcome
from tests.machines.slot_parts import installed

RELEASE = installed("1.0.0", at=1)
UP = {"digits": Route(release=RELEASE, up=True)}


def ask(model: str = "digits", *, deadline_ms: int = 100) -> Infer:
    """A request."""
    return Infer(model=model, inputs=(), id="r1", deadline_ms=deadline_ms)


def test_a_request_goes_to_the_release_that_serves() -> None:
    assert admit(ask(), routes=UP, waiting=0) == RELEASE
    assert admit(ask(), routes=UP, waiting=MAX_WAITING_REQUESTS - 1, waited_ms=99) == RELEASE


@pytest.mark.parametrize(
    ("code", "retry", "refusal"),
    [
        ("model.unknown", False, admit(ask("dogs"), routes=UP, waiting=0)),
        ("model.unknown", False, admit(ask(), routes={}, waiting=0)),
        ("model.not_loaded", True, admit(ask(), routes={"digits": Route()}, waiting=0)),
        ("model.not_loaded", True, admit(ask(), routes={"digits": Route(release=RELEASE)}, waiting=0)),
        ("overload", True, admit(ask(), routes=UP, waiting=MAX_WAITING_REQUESTS)),
        ("overload", True, admit(ask(), routes=UP, waiting=2, limit=2)),
        ("deadline", True, admit(ask(), routes=UP, waiting=0, waited_ms=100)),
        ("deadline", True, admit(ask(deadline_ms=0), routes=UP, waiting=0)),
    ],
)
def test_every_no_has_its_reason(code: str, retry: bool, refusal: object) -> None:
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retry, refusal.id) == (code, retry, "r1")
    assert refusal.hint


def test_an_unknown_model_is_told_which_there_are() -> None:
    refusal = admit(ask("x" * 1000), routes=UP, waiting=0)
    assert isinstance(refusal, Refusal)
    assert "digits" in refusal.hint
    assert len(refusal.message) < 200


def answer(request: str, *labels: str) -> Answer:
    """An answer."""
    return Answer(
        id=request,
        model="digits",
        version="1.0.0",
        variant="int8",
        digest="d",
        rung="full",
        labels=labels,
        confidences=tuple(0.9 for _ in labels),
        outputs=(),
        took_us=250,
    )


def recent(*answers: Answer, capacity: int = 10) -> Recent:
    """A memory of these answers."""
    made = Recent(capacity=capacity)
    for one in answers:
        made.remember(one)
    return made


def known(**given: object) -> dict[str, object]:
    """Fields of an outcome about the answer `r1`."""
    return {"request": "r1", "model": "digits", "version": "1.0.0", "variant": "int8", "latency_us": 250, **given}


@pytest.mark.parametrize(
    ("feedback", "fields"),
    [
        (Feedback(request="r1", label="7"), {"label": "7", "correct": True}),
        (Feedback(request="r1", label="3"), {"label": "3", "correct": False}),
        (Feedback(request="r1", label="3", correct=True), {"label": "3", "correct": True}),
        (Feedback(request="r1", correct=False), {"correct": False}),
        (Feedback(request="r1", value=1.5), {"value": 1.5}),
    ],
)
def test_feedback_is_completed_with_what_answered(feedback: Feedback, fields: dict[str, object]) -> None:
    outcome = recent(answer("r1", "7")).outcome(feedback)
    assert outcome == Outcome(**known(**fields))  # type: ignore[arg-type]


def test_a_label_for_many_rows_does_not_say_whether_all_were_right() -> None:
    outcome = recent(answer("r1", "7", "3")).outcome(Feedback(request="r1", label="7"))
    assert isinstance(outcome, Outcome)
    assert outcome.correct is None


def test_feedback_on_a_forgotten_answer_is_kept_as_it_is() -> None:
    memory = recent(*(answer(f"r{n}", "7") for n in range(5)), capacity=3)
    assert len(memory) == 3
    assert memory.outcome(Feedback(request="r1", label="7")) == Outcome(request="r1", label="7")
    kept = memory.outcome(Feedback(request="r2", label="7"))
    assert isinstance(kept, Outcome)
    assert kept.correct is True


def test_a_repeated_id_names_the_newer_answer() -> None:
    outcome = recent(answer("r1", "7"), answer("r2", "1"), answer("r1", "3")).outcome(Feedback(request="r1", label="3"))
    assert isinstance(outcome, Outcome)
    assert outcome.correct is True


def test_feedback_that_says_nothing_is_refused() -> None:
    refusal = recent().outcome(Feedback(request="r1", id="f1"))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.id) == ("invalid.feedback", "f1")


@pytest.mark.parametrize(
    ("feedback", "words"),
    [
        (Feedback(request="r1", id="f1", value=math.nan), "value is nan"),
        (Feedback(request="r1", id="f1", correct=True, value=-math.inf), "value is -inf"),
        (Feedback(request="r1", id="f1", label="é" * 20_000), "40000 bytes, at most 30720"),
    ],
)
def test_feedback_that_cannot_be_kept_is_refused(feedback: Feedback, words: str) -> None:
    refusal = recent(answer("r1", "7")).outcome(feedback)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.id, refusal.retry) == ("invalid.feedback", "f1", False)
    assert words in refusal.message
    assert refusal.hint


def test_the_longest_label_fits_into_a_record_with_the_longest_names() -> None:
    request = "r" * MAX_REQUEST_ID_CHARS
    longest = msgspec.structs.replace(
        answer(request, "7"), model="m" * 63, version=f"1.0.0-{'b' * 58}", variant="v" * 63
    )
    outcome = recent(longest).outcome(Feedback(request=request, label="x" * MAX_LABEL_BYTES, value=1.5))
    assert isinstance(outcome, Outcome)
    assert len(msgspec.msgpack.encode(outcome)) <= MAX_RECORD_BYTES


@pytest.mark.parametrize(
    ("expected", "had_ms", "ahead", "usual_ms"),
    [
        (True, 50, 0, 5.0),  # ten times what it takes otherwise
        (False, 50, 1, 5.0),  # it had something else to do
        (False, 8, 0, 5.0),  # the application is in a hurry
        (False, 900, 0, -1.0),  # nobody knows what is usual here
        (True, PATIENT_MS, 0, -1.0),
        (True, PATIENT_MS, 0, 5_000.0),
        (False, 60_000, 1, 5.0),
    ],
)
def test_a_missed_deadline_speaks_against_a_model_that_had_time_and_nothing_else_to_do(
    expected: bool, had_ms: float, ahead: int, usual_ms: float
) -> None:
    assert is_models_fault(had_ms=had_ms, ahead=ahead, usual_ms=usual_ms) is expected
