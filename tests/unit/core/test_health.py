"""What the hub and the door are told of a slot."""

from __future__ import annotations

from edge_agent.core import health
from edge_agent.core.slot_values import AnswerBad
from tests.machines.slot_parts import PROBATION, empty_slot, file, key, offer
from tests.machines.slot_script import Script, committed, on_probation

V1, V2 = key("1.0.0"), key("2.0.0")


def test_an_empty_slot_serves_nothing() -> None:
    told = health.running_model(empty_slot(), None)
    assert (told.phase, told.version, told.manifest, told.candidate) == ("idle", "", "", "")
    assert health.model_state(empty_slot(), None).signature is None


def test_what_answers_is_told_not_what_was_installed() -> None:
    slot = Script().say(*committed("1.0.0", at=1)).slot
    told = health.running_model(slot, V1)
    assert (told.version, told.variant, told.manifest) == ("1.0.0", "int8", V1)
    assert told.digest == file("1.0.0", "int8.onnx").digest
    assert health.running_model(slot, None).version == ""
    state = health.model_state(slot, V1)
    assert (state.version, state.labels) == ("1.0.0", ("0", "1"))
    assert state.signature is not None


def test_on_probation_the_candidate_answers() -> None:
    slot = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)).slot
    told = health.running_model(slot, V2)
    assert (told.phase, told.version, told.candidate) == ("probation", "2.0.0", "2.0.0")


def test_what_is_on_its_way_out_is_no_candidate() -> None:
    bad = AnswerBad(key=V2, code="model.run", message="cannot")
    events = [*committed("1.0.0", at=1), *on_probation("2.0.0", at=2), *[bad] * PROBATION.max_failures]
    told = health.running_model(Script().say(*events).slot, V1)
    assert (told.phase, told.version, told.candidate) == ("rolling_back", "1.0.0", "")
    assert (told.error_code, told.error) == ("model.run", "cannot")


def test_a_candidate_that_comes_in_is_told() -> None:
    slot = Script().say(offer("1.0.0", at=1)).slot
    assert health.model_state(slot, None).candidate == "1.0.0"
