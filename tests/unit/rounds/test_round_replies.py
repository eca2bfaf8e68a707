"""What a strategy gets to see of an answer: what was asked for and is finite; anything else is an error reply."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.rounds import checkpoint, replies
from edge_agent.adapters import samples
from shared import limits
from shared.errors import ProtocolViolation
from shared.federated import Array, ArrayRecord, FlowerError, FlowerMessage, FlowerRecord, Metadata, MetricRecord
from shared.wire.flower import encode_message
from tests.fakes.round_room import npy

pytest.importorskip("flwr")

TEMPLATE = {"head.weight": np.zeros((4, 3), np.float32), "head.bias": np.zeros(3, np.float32)}


def array(data: Any) -> Array:
    return Array(dtype=str(data.dtype), shape=data.shape, data=npy(data))


def records(**changes: FlowerRecord | None) -> dict[str, FlowerRecord]:
    """A good answer's records, some of them changed or left out."""
    made: dict[str, FlowerRecord | None] = {
        "arrays": ArrayRecord({name: array(value + 1) for name, value in TEMPLATE.items()}),
        "metrics": MetricRecord({"num-examples": 12, "loss": 0.5, "accuracy": 0.75}),
        **changes,
    }
    return {name: record for name, record in made.items() if record is not None}


def answer(content: dict[str, FlowerRecord] | None = None, *, error: FlowerError | None = None) -> bytes:
    metadata = Metadata(src_node_id=999, dst_node_id=998, reply_to_message_id="lie", message_type="query")
    return encode_message(FlowerMessage(metadata=metadata, content=content, error=error))


@pytest.fixture(scope="module")
def request_message() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flwr.app import Message, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        kept = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 1
        message = Message(RecordDict({}), 77, "train")
        message.metadata.__dict__["_message_id"] = "asked"
        yield message
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = kept


@pytest.fixture
def read(request_message: Any) -> Callable[..., Any]:
    def go(data: bytes, *, template: Any = TEMPLATE) -> Any:
        return replies.read_reply(data, request=request_message, template=template)

    return go


def test_a_good_answer_keeps_its_numbers_and_gets_the_requests_metadata(read: Callable[..., Any]) -> None:
    reply = read(answer(records()))
    assert reply.has_content()
    assert (reply.content["arrays"]["head.weight"].numpy() == 1).all()
    assert dict(reply.content["metrics"]) == {"num-examples": 12.0, "loss": 0.5, "accuracy": 0.75}
    found = reply.metadata
    assert (found.src_node_id, found.dst_node_id, found.reply_to_message_id) == (77, 1, "asked")
    assert (found.run_id, found.message_type) == (2, "train")


def test_a_device_weighs_as_much_as_it_may_hold_and_not_more(read: Callable[..., Any]) -> None:
    assert limits.MAX_ROUND_SAMPLES == samples.MAX_SAMPLES
    fullest = read(answer(records(metrics=MetricRecord({"num-examples": limits.MAX_ROUND_SAMPLES}))))
    assert dict(fullest.content["metrics"]) == {"num-examples": float(samples.MAX_SAMPLES)}
    claimed = read(answer(records(metrics=MetricRecord({"num-examples": limits.MAX_ROUND_SAMPLES + 1}))))
    assert "2001" in claimed.error.reason


def test_an_error_stays_an_error(read: Callable[..., Any]) -> None:
    reply = read(answer(error=FlowerError(6, "x" * 10_000)))
    assert reply.has_error()
    assert (reply.error.code, len(reply.error.reason)) == (6, 300)
    assert reply.metadata.src_node_id == 77


def test_a_measurement_needs_no_arrays(read: Callable[..., Any]) -> None:
    assert read(answer(records(arrays=None)), template=None).has_content()
    assert read(answer(records(arrays=None))).has_error()


def wide(data: Any) -> FlowerRecord:
    return ArrayRecord({"head.weight": array(data), "head.bias": array(TEMPLATE["head.bias"])})


BAD: dict[str, dict[str, Any]] = {
    "wrong shape": {"arrays": wide(np.zeros((3, 4), np.float32))},
    "wrong type": {"arrays": wide(np.zeros((4, 3), np.float64))},
    "objects": {"arrays": wide(np.full((4, 3), 1j))},
    "not a number": {"arrays": wide(np.full((4, 3), np.nan, np.float32))},
    "infinite": {"arrays": wide(np.full((4, 3), np.inf, np.float32))},
    "key missing": {"arrays": ArrayRecord({"head.bias": array(TEMPLATE["head.bias"])})},
    "key too many": {"arrays": ArrayRecord({**{k: array(v) for k, v in TEMPLATE.items()}, "x": array(np.zeros(1))})},
    "two array records": {"more": wide(TEMPLATE["head.weight"])},
    "two metric records": {"more": MetricRecord({"num-examples": 1})},
    "no metrics": {"metrics": None},
    "no examples": {"metrics": MetricRecord({"num-examples": 0, "loss": 1.0})},
    "examples below zero": {"metrics": MetricRecord({"num-examples": -3})},
    "examples not a number": {"metrics": MetricRecord({"num-examples": float("nan")})},
    "examples without end": {"metrics": MetricRecord({"num-examples": 10**12})},
    "more examples than a device holds": {"metrics": MetricRecord({"num-examples": 2_001})},
    "examples in a list": {"metrics": MetricRecord({"num-examples": [1, 2]})},
    "a tensor of another kind": {
        "arrays": ArrayRecord(
            {k: Array(dtype="float32", shape=v.shape, data=npy(v), stype="torch") for k, v in TEMPLATE.items()}
        )
    },
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_usable_becomes_an_error_reply(kind: str, read: Callable[..., Any]) -> None:
    reply = read(answer(records(**BAD[kind])))
    assert reply.has_error()
    assert reply.error.reason
    assert reply.metadata.reply_to_message_id == "asked"


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_become_an_error_reply(request_message: Any, data: bytes) -> None:
    assert replies.read_reply(data, request=request_message, template=TEMPLATE).has_error()


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_an_array_file_that_was_tampered_with_is_read_or_refused(at: int, noise: bytes) -> None:
    good = npy(np.ones((4, 3), np.float32))
    data = good[: at % len(good)] + noise + good[at % len(good) + len(noise) :]
    try:
        found = replies.read_npy(data, like=TEMPLATE["head.weight"], what="x")
    except ProtocolViolation:
        return
    assert found.shape == (4, 3)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_a_header_that_promises_more_than_comes_allocates_nothing() -> None:
    good = npy(np.zeros((4, 3), np.float32))
    header = good.replace(b"(4, 3), }      ", b"(400000000, 9),}")[: len(good)]
    with pytest.raises(ProtocolViolation):
        replies.read_npy(header, like=TEMPLATE["head.weight"], what="x")


def test_replies_keep_only_the_metrics_that_all_have(read: Callable[..., Any]) -> None:
    full = read(answer(records()))
    lean = read(answer(records(metrics=MetricRecord({"num-examples": 3, "accuracy": 0.5}))))
    failed = read(b"")
    replies.level([full, lean, failed])
    assert set(full.content["metrics"]) == set(lean.content["metrics"]) == {"num-examples", "accuracy"}
    replies.level([failed])


def test_what_a_strategy_makes_comes_back_in_the_types_it_was_given() -> None:
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord as FlowerArrays

    doubles = FlowerArrays({name: FlowerArray(value.astype(np.float64) + 2) for name, value in TEMPLATE.items()})
    found = replies.restored(doubles, TEMPLATE)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(TEMPLATE, np.dtype(np.float32))
    diverged = FlowerArrays({name: FlowerArray(np.full_like(value, np.nan)) for name, value in TEMPLATE.items()})
    with pytest.raises(ProtocolViolation) as refused:
        replies.restored(diverged, TEMPLATE)
    assert refused.value.code == "rounds.diverged"
    with pytest.raises(ProtocolViolation):
        replies.restored(FlowerArrays({}), TEMPLATE)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Any) -> None:
    memory = {"m_t": {name: value + 0.1 for name, value in TEMPLATE.items()}}
    data = checkpoint.pack(7, TEMPLATE, memory)
    digest = checkpoint.write(tmp_path / "a", data)
    number, arrays, found = checkpoint.unpack(checkpoint.read(tmp_path / "a", digest=digest))
    assert number == 7
    assert all(arrays[name].tobytes() == value.tobytes() for name, value in TEMPLATE.items())
    assert all(found["m_t"][name].tobytes() == value.tobytes() for name, value in memory["m_t"].items())
    (tmp_path / "a").write_bytes(data[:-1])
    with pytest.raises(Exception, match="digest"):
        checkpoint.read(tmp_path / "a", digest=digest)
