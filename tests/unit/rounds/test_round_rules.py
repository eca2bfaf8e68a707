"""What a run may be, and when a round begins."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.rounds import rules
from cloud_hub.rounds.rules import Spec
from shared.errors import InvalidValue
from shared.ids import DeviceId, FamilyName, ModelVersion

ONE, TWO, THREE = (DeviceId(name) for name in ("one", "two", "three"))


def spec(**fields: Any) -> Spec:
    given: dict[str, Any] = {
        "family": FamilyName("digits"), "base": ModelVersion("1.0.0"), "version": ModelVersion("1.1.0")
    }  # fmt: skip
    return Spec(**{**given, **fields})


def test_a_plain_request_is_taken() -> None:
    rules.check_spec(spec())
    assert spec(min_devices=5).needed == 5
    assert spec(min_devices=5, quorum=3).needed == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "1.0.0"),
        ("version", "one"),
        ("strategy", "fedmagic"),
        ("rounds", 0),
        ("rounds", 1001),
        ("min_devices", 0),
        ("quorum", 3),
        ("quorum", 0),
        ("round_timeout_s", 0.5),
        ("round_timeout_s", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("epochs", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("selector", {str(number): "x" for number in range(17)}),
    ],
)
def test_what_cannot_be_held_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue):
        rules.check_spec(spec(**{field: value}))


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_a_node_is_a_positive_number_that_the_database_can_hold(name: str) -> None:
    node = rules.node_of(DeviceId(name))
    assert 0 < node < 2**63
    assert node == rules.node_of(DeviceId(name))
    message = rules.message_of("r-0123456789", number=1000, phase="train", attempt=3, node=node)
    assert len(message) <= 64


def test_messages_of_different_tasks_have_different_names() -> None:
    names = {
        rules.message_of(run, number=number, phase=phase, attempt=attempt, node=node)
        for run in ("r-1", "r-11")
        for number in (1, 11)
        for phase in ("train", "evaluate")
        for attempt in (1, 2)
        for node in (1, 16)
    }
    assert len(names) == 32


@pytest.mark.parametrize(
    ("labels", "online", "models", "takes_part"),
    [
        ({}, True, [{"family": "digits", "version": "1.0.0"}], True),
        ({}, False, [{"family": "digits", "version": "1.0.0"}], False),
        ({}, True, [{"family": "digits", "version": "0.9.0"}], False),
        ({}, True, [{"family": "letters", "version": "1.0.0"}], False),
        ({}, True, [], False),
        ({"site": "b"}, True, [{"family": "digits", "version": "1.0.0"}], True),
    ],
)
def test_who_takes_part(labels: dict[str, str], online: bool, models: list[Any], takes_part: bool) -> None:
    reported = {"models": models}
    assert rules.takes_part(spec(), labels=labels, online=online, reported=reported) is takes_part
    for standing in ("quarantined", "revoked"):
        assert not rules.takes_part(spec(), labels=labels, online=online, reported=reported, standing=standing)
    picky = spec(selector={"site": "a"})
    assert not rules.takes_part(picky, labels=labels, online=online, reported=reported)
    assert rules.takes_part(picky, labels={"site": "a"}, online=online, reported=reported) is (
        takes_part or labels == {"site": "b"}
    )


def test_a_device_without_a_report_takes_no_part() -> None:
    assert not rules.takes_part(spec(), labels={}, online=True, reported={})


def test_a_round_begins_when_the_last_rounds_devices_are_back_or_had_their_time() -> None:
    begin = rules.may_begin
    assert begin(spec(), [ONE, TWO], expected=[], waited=False)
    assert not begin(spec(), [ONE], expected=[], waited=True)
    assert not begin(spec(), [ONE, TWO], expected=[ONE, TWO, THREE], waited=False)
    assert begin(spec(), [ONE, TWO], expected=[ONE, TWO, THREE], waited=True)
    assert begin(spec(), [ONE, TWO, THREE], expected=[TWO], waited=False)
