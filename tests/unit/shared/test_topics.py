"""Topics: a device's own are taken apart as they were built, everything else is a violation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolViolation
from shared.ids import RESERVED_DEVICE_IDS, DeviceId
from shared.wire import topics

devices = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True).filter(
    lambda name: name not in RESERVED_DEVICE_IDS
)


@given(devices, st.sampled_from(sorted(topics.UP_LEAVES)))
def test_what_a_device_sends_on_is_taken_apart_as_it_was_built(name: str, leaf: topics.UpLeaf) -> None:
    parsed = topics.parse_up(topics.up(DeviceId(name), leaf))
    assert (parsed.device, parsed.leaf) == (name, leaf)
    with pytest.raises(ProtocolViolation):
        topics.parse_down(topics.up(DeviceId(name), leaf))


@given(devices, st.sampled_from(sorted(topics.DOWN_LEAVES)))
def test_what_the_hub_sends_on_is_taken_apart_as_it_was_built(name: str, leaf: topics.DownLeaf) -> None:
    assert topics.parse_down(topics.down(DeviceId(name), leaf)) == leaf
    with pytest.raises(ProtocolViolation):
        topics.parse_up(topics.down(DeviceId(name), leaf))


levels = st.sampled_from(["outrider", "1", "2", "up", "down", "birth", "ack", "hub", "+", "#", "", "dev-1", "UP"])


@given(st.lists(levels, max_size=7).map("/".join) | st.text(max_size=60))
def test_any_other_topic_is_a_violation_and_nothing_else(topic: str) -> None:
    try:
        parsed = topics.parse_up(topic)
    except ProtocolViolation as error:
        assert error.code == "protocol.topic"
    else:
        assert topic == f"outrider/1/{parsed.device}/up/{parsed.leaf}"
    try:
        leaf = topics.parse_down(topic)
    except ProtocolViolation as error:
        assert error.code == "protocol.topic"
    else:
        assert leaf in topics.DOWN_LEAVES


def test_a_reserved_or_unusable_device_name_is_a_violation() -> None:
    for name in ("hub", "Dev", "a+b", ""):
        with pytest.raises(ProtocolViolation):
            topics.parse_up(f"outrider/1/{name}/up/birth")


def test_filters_and_patterns_confine_a_device_to_its_own_tree() -> None:
    assert topics.down_filter(DeviceId("dev-1")) == "outrider/1/dev-1/down/+"
    assert topics.up_filter() == "outrider/1/+/up/#"
    assert topics.acl_patterns() == ("outrider/1/%u/up/#", "outrider/1/%u/down/#")
