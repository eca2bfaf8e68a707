"""The slot's state as bytes, what it keeps, and when it has something to report."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.core import slots
from edge_agent.core.slot_bytes import decode_state, encode_state
from edge_agent.core.slot_values import (
    FilesHere,
    Report,
    Timer,
    backoff_ms,
    timer_event,
)
from shared.errors import StorageError
from tests.machines.slot_parts import empty_slot, installed, key, model, offer
from tests.machines.slot_script import Script, committed


def test_what_may_still_be_needed_is_kept() -> None:
    script = Script().say(*committed("1.0.0", at=1), *committed("2.0.0", at=2), offer("3.0.0", at=3))
    releases = [installed("1.0.0", at=1), installed("2.0.0", at=2), installed("3.0.0", at=3)]
    assert slots.files_to_keep([script.slot, empty_slot()]) == {f.digest for r in releases for f in r.files}


def test_the_revision_grows_with_what_is_reported_and_only_then() -> None:
    script = Script().say(offer("1.0.0", at=1))
    revision = script.slot.revision
    script.say(offer("1.0.0", at=2))
    assert script.slot.revision == revision
    script.say(FilesHere(key("1.0.0")))
    assert script.slot.revision == revision + 1
    assert script.effects.count(Report()) == 1


def test_state_survives_its_bytes() -> None:
    slot = Script().say(*committed("1.0.0", at=1), offer("2.0.0", at=2)).slot
    assert decode_state(encode_state(slot)) == slot


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", encode_state(empty_slot())[:-3]])
def test_damaged_state_is_refused(data: bytes) -> None:
    with pytest.raises(StorageError):
        decode_state(data)


def test_state_of_a_newer_agent_is_refused_with_a_hint() -> None:
    newer = msgspec.msgpack.encode({"schema": 2})
    with pytest.raises(StorageError) as caught:
        decode_state(newer)
    assert caught.value.code == "storage.schema"
    assert "newer" in caught.value.hint


def test_every_timer_has_its_event() -> None:
    assert len({type(timer_event(timer)) for timer in Timer}) == len(Timer)


def test_back_off_never_overflows() -> None:
    assert backoff_ms(0, most_ms=10) == 10
    assert backoff_ms(10**9, most_ms=300_000) == 300_000


def test_a_release_is_told_apart_by_its_manifest() -> None:
    assert model("1.0.0", floor=1).manifest_digest != model("1.0.0").manifest_digest
