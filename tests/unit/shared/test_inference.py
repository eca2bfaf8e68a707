"""The door's headers: they round-trip, and a request that does not fit the signature is refused with the reason."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared import inference, limits
from shared.errors import InputRefused
from shared.inference import TensorHead, check_inputs, decode_reply, decode_request, encode_header, tensor_bytes
from shared.model import ITEM_BYTES, DType, Signature, TensorSpec

OUTPUT = (TensorSpec(name="y", dtype="fp32", shape=(-1, 10)),)
DIGITS = Signature(inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 64)),), outputs=OUTPUT)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
dtypes = st.sampled_from(get_args(DType))
sizes = st.integers(1, 5)
heads = st.builds(TensorHead, name=texts, dtype=dtypes, shape=st.lists(sizes, max_size=4).map(tuple))
requests: st.SearchStrategy[inference.Request] = st.one_of(
    st.builds(inference.Infer, model=texts, inputs=st.lists(heads, max_size=3).map(tuple), id=texts),
    st.builds(inference.Feedback, request=texts, label=st.none() | texts, correct=st.none() | st.booleans()),
    st.builds(inference.Measure, name=texts, value=st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(inference.Describe, model=texts),
    st.builds(inference.Status, id=texts),
    st.builds(inference.Control, command=texts, argument=texts),
)


@given(requests)
def test_a_request_survives(request: inference.Request) -> None:
    assert decode_request(encode_header(request)) == request


def test_replies_survive() -> None:
    replies: list[inference.Reply] = [
        inference.Done(id="1"),
        inference.Refusal(id="1", code="overload", message="full", retry=True),
        inference.Description(id="1", models=(inference.ModelState(family="d", phase="committed", signature=DIGITS),)),
        inference.Answer(
            id="1", model="digits", version="1.0.0", variant="int8", digest="ab", rung="full", labels=("7",),
            confidences=(0.5,), outputs=(), took_us=3,
        ),
    ]  # fmt: skip
    assert [decode_reply(encode_header(reply)) for reply in replies] == replies


@given(st.binary(max_size=100))
def test_bytes_that_are_no_header_are_refused(data: bytes) -> None:
    try:
        decode_request(data)
    except InputRefused as error:
        assert error.code == "model.request"
    try:
        decode_reply(data)
    except InputRefused as error:
        assert error.code == "model.reply"


def test_odd_text_and_deep_nesting_are_refused() -> None:
    for data in (encode_header(inference.Status(id="abcd")).replace(b"abcd", b"\xff" * 4), b"\x91" * 60_000):
        with pytest.raises(InputRefused):
            decode_request(data)


@st.composite
def fitting(draw: st.DrawFn) -> tuple[Signature, tuple[TensorHead, ...]]:
    """A signature and inputs that fit it, in any order."""
    specs, inputs = [], []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(sizes, max_size=4)))
        declared = tuple(-1 if draw(st.booleans()) else size for size in shape)
        dtype = draw(dtypes)
        specs.append(TensorSpec(name=f"x{number}", dtype=dtype, shape=declared))
        inputs.append(TensorHead(name=f"x{number}", dtype=dtype, shape=shape))
    return Signature(inputs=tuple(specs), outputs=OUTPUT), tuple(draw(st.permutations(inputs)))


@given(fitting())
def test_inputs_that_fit_are_taken_and_their_rows_counted(
    given_inputs: tuple[Signature, tuple[TensorHead, ...]],
) -> None:
    signature, inputs = given_inputs
    payload_bytes = sum(math.prod(head.shape) * ITEM_BYTES[head.dtype] for head in inputs)
    assert payload_bytes == sum(map(tensor_bytes, inputs))
    assert check_inputs(signature, inputs, payload_bytes) == (inputs[0].shape[0] if inputs[0].shape else 1)
    for wrong in (payload_bytes - 1, payload_bytes + 1):
        with pytest.raises(InputRefused, match="bytes"):
            check_inputs(signature, inputs, wrong)


@given(st.lists(heads, max_size=3).map(tuple), st.integers(0, 10_000))
def test_whatever_is_sent_is_taken_or_refused_and_never_breaks(inputs: tuple[TensorHead, ...], payload: int) -> None:
    assume([head.name for head in inputs] != ["x"])
    with pytest.raises(InputRefused):
        check_inputs(DIGITS, inputs, payload)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (TensorHead(name="z", dtype="fp32", shape=(1, 64)), r"\['x'\] are expected"),
        (TensorHead(name="x", dtype="fp64", shape=(1, 64)), r"is fp64, expected fp32\[any, 64\]"),
        (TensorHead(name="x", dtype="fp32", shape=(1, 63)), r"shape \[1, 63\]"),
        (TensorHead(name="x", dtype="fp32", shape=(64,)), r"shape \[64\]"),
        (TensorHead(name="x", dtype="fp32", shape=(0, 64)), r"shape \[0, 64\]"),
        (TensorHead(name="x", dtype="fp32", shape=(-1, 64)), r"shape \[-1, 64\]"),
        (TensorHead(name="x", dtype="fp32", shape=(2**62, 64)), "bytes"),
    ],
)
def test_a_refusal_names_what_came_and_what_was_expected(head: TensorHead, says: str) -> None:
    with pytest.raises(InputRefused, match=says) as caught:
        check_inputs(DIGITS, (head,), 256)
    assert caught.value.hint


def test_an_empty_batch_is_told_what_is_wrong_with_it() -> None:
    with pytest.raises(InputRefused) as caught:
        check_inputs(DIGITS, (TensorHead(name="x", dtype="fp32", shape=(0, 64)),), 0)
    assert "at least one element" in caught.value.hint


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reading_is_a_number(value: float) -> None:
    with pytest.raises(InputRefused, match="no number") as caught:
        decode_request(encode_header(inference.Measure(name="cpu_temp_c", value=value, id="r1")))
    assert caught.value.code == "invalid.reading"
    assert caught.value.hint


def test_an_input_sent_twice_or_too_often_is_refused() -> None:
    head = TensorHead(name="x", dtype="fp32", shape=(1, 64))
    for count in (0, 2, limits.MAX_TENSORS + 1):
        with pytest.raises(InputRefused):
            check_inputs(DIGITS, (head,) * count, 256 * count)


def test_a_request_id_is_a_name_and_not_a_document() -> None:
    longest = "x" * limits.MAX_REQUEST_ID_CHARS
    assert decode_request(encode_header(inference.Status(id=longest))).id == longest
    for request in (inference.Status(id=longest + "x"), inference.Infer(model="m", inputs=(), id=longest + "x")):
        with pytest.raises(InputRefused, match="id"):
            decode_request(encode_header(request))
    with pytest.raises(InputRefused, match="request"):
        decode_request(encode_header(inference.Feedback(request=longest + "x", correct=True)))


@pytest.mark.parametrize(("asked_ms", "given_ms"), [(50, 50), (3_600_000, 3_600_000), (2**63 - 1, 3_600_000), (-5, -5)])
def test_a_deadline_beyond_an_hour_is_an_hour(asked_ms: int, given_ms: int) -> None:
    request = decode_request(encode_header(inference.Infer(model="m", inputs=(), deadline_ms=asked_ms)))
    assert isinstance(request, inference.Infer)
    assert request.deadline_ms == given_ms


@pytest.mark.parametrize(
    ("shapes", "payload_bytes"),
    [([(1, 4)], 15), ([(1, 4)], 17), ([(-1, -4)], 16), ([(0, 4)], 0), ([(1,) * 9], 4), ([(1,)] * 65, 260), ([], 0)],
)
def test_tensors_that_nobody_declared_must_still_fit_their_payload(
    shapes: list[tuple[int, ...]], payload_bytes: int
) -> None:
    heads = tuple(TensorHead(name=str(number), dtype="fp32", shape=shape) for number, shape in enumerate(shapes))
    with pytest.raises(InputRefused):
        inference.check_heads(heads, payload_bytes)


def test_tensors_that_fit_their_payload_are_taken() -> None:
    inference.check_heads(
        (TensorHead(name="a", dtype="fp32", shape=(1, 4)), TensorHead(name="b", dtype="int8", shape=())), 17
    )
