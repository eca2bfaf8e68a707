"""What of a device's answer a strategy gets to see: the arrays that were asked for, and finite numbers.

A strategy trusts its replies: one array of another shape, one key too few or one NaN ends the run or spoils the sum for
everybody. So each answer is checked here, and what is not usable becomes an error reply. Metadata is written from the
request, whatever the device said of itself.

Runs in the worker only; it uses Flower's own reader, so that both ends prove each other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cloud_hub.rounds.rules import MAX_REASON_CHARS
from shared import limits
from shared.errors import ProtocolViolation

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message

    from shared.tensors import Array

EXAMPLES: Final = "num-examples"
ARRAYS: Final = "arrays"
METRICS: Final = "metrics"
MAX_METRICS: Final = 64
NPY_HEADER_BYTES: Final = 4096
ERROR_UNUSABLE: Final = 2
"""Flower's CLIENT_APP_RAISED_EXCEPTION: the task was done and went wrong."""


def read_reply(data: bytes, *, request: Message, template: Mapping[str, Array] | None) -> Message:
    """A device's answer as a reply to the request; an error reply when it is not usable.

    Args:
        template: arrays of the wanted names, shapes and types; None where the task asks for metrics only.
    """
    from flwr.app import Error, Message, MetricRecord, RecordDict

    try:
        answer = _parse(data)
        if answer.has_error():
            reason = str(answer.error.reason)[:MAX_REASON_CHARS]
            return _stamped(Message(Error(code=answer.error.code, reason=reason), reply_to=request))
        content = answer.content
        records: dict[str, Any] = {METRICS: MetricRecord(_metrics(content))}
        if template is not None:
            records[ARRAYS] = _arrays(content, template)
        return _stamped(Message(RecordDict(records), reply_to=request))
    except ProtocolViolation as error:
        return _stamped(Message(Error(code=ERROR_UNUSABLE, reason=error.message[:MAX_REASON_CHARS]), reply_to=request))


def level(replies: Sequence[Message]) -> None:
    """Leave in each good reply only the metrics that all of them have: strategies refuse what differs."""
    good = [reply.content.metric_records[METRICS] for reply in replies if reply.has_content()]
    if not good:
        return
    common = set.intersection(*(set(record) for record in good))
    for record in good:
        for name in set(record) - common:
            del record[name]


def restored(arrays: ArrayRecord, template: Mapping[str, Array]) -> dict[str, Array]:
    """What a strategy made, in the types it was given: some of them compute in float64 and would send that on.

    Raises:
        ProtocolViolation: names or shapes differ, or a value is not finite: the run has diverged.
    """
    import numpy as np

    if set(arrays) != set(template):
        raise ProtocolViolation(f"the strategy gave {sorted(arrays)}", code="rounds.aggregation")
    found = {}
    for name, wanted in template.items():
        array = np.ascontiguousarray(arrays[name].numpy(), dtype=wanted.dtype)
        if array.shape != wanted.shape or not np.isfinite(array).all():
            raise ProtocolViolation(
                f"after aggregation {name} is not finite or has another shape",
                code="rounds.diverged",
                hint="start again with a smaller learning rate",
            )
        found[name] = array
    return found


def read_npy(data: bytes, *, like: Array, what: str) -> Array:
    """The array of an .npy file's bytes, which must have this type and shape; nothing is allocated before that is sure.

    Raises:
        ProtocolViolation: it is something else, or holds a value that is not finite.
    """
    import numpy as np

    if len(data) > like.nbytes + NPY_HEADER_BYTES:
        raise ProtocolViolation(f"{what} has {len(data)} bytes", code="rounds.reply")
    file = io.BytesIO(data)
    try:
        major = np.lib.format.read_magic(file)[0]
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    # Blanket on purpose: numpy reads the header as Python's literals and raises whatever its tokenizer does.
    except Exception as error:
        raise ProtocolViolation(f"{what} is not an array file: {str(error)[:100]}", code="rounds.reply") from error
    body = data[file.tell() :]
    if dtype != like.dtype or shape != like.shape or len(body) != like.nbytes:
        raise ProtocolViolation(
            f"{what} is {dtype}{list(shape)}, wanted is {like.dtype}{list(like.shape)}", code="rounds.reply"
        )
    array = np.frombuffer(body, dtype=like.dtype).reshape(like.shape, order="F" if fortran else "C")
    if not np.isfinite(array).all():
        raise ProtocolViolation(f"{what} holds a value that is not finite", code="rounds.reply")
    return array


def _parse(data: bytes) -> Message:
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as Proto

    try:
        return message_from_proto(Proto.FromString(data))
    # Blanket on purpose: Flower's reader raises whatever the odd field runs into (KeyError, TypeError, DecodeError, …).
    except Exception as error:
        raise ProtocolViolation(f"not a Flower message: {type(error).__name__}", code="rounds.reply") from error


def _metrics(content: Any) -> dict[str, int | float | list[int] | list[float]]:
    """All single, finite numbers of the one metric record; the number of examples among them."""
    if len(content.metric_records) != 1:
        raise ProtocolViolation(f"{len(content.metric_records)} metric records, wanted is one", code="rounds.reply")
    (record,) = content.metric_records.values()
    found = {
        str(name): float(value)
        for name, value in sorted(record.items())[:MAX_METRICS]
        if isinstance(value, int | float) and math.isfinite(value)
    }
    examples = found.get(EXAMPLES, 0.0)
    if examples <= 0:
        raise ProtocolViolation(f"{EXAMPLES} is missing, or not a number above 0", code="rounds.reply")
    if examples > limits.MAX_ROUND_SAMPLES:
        # They are the weights of the average: whoever may claim what it likes decides it alone.
        raise ProtocolViolation(
            f"{EXAMPLES} is {examples:.0f}, a device holds at most {limits.MAX_ROUND_SAMPLES}", code="rounds.reply"
        )
    return dict(found)


def _arrays(content: Any, template: Mapping[str, Array]) -> ArrayRecord:
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord

    if len(content.array_records) != 1:
        raise ProtocolViolation(f"{len(content.array_records)} array records, wanted is one", code="rounds.reply")
    (record,) = content.array_records.values()
    if set(record) != set(template):
        raise ProtocolViolation(f"the arrays are {sorted(record)[:8]}", code="rounds.reply")
    checked = {}
    for name, wanted in template.items():
        if record[name].stype != "numpy.ndarray":
            raise ProtocolViolation(f"{name} is of kind {record[name].stype[:40]!r}", code="rounds.reply")
        checked[name] = FlowerArray(read_npy(record[name].data, like=wanted, what=name))
    return ArrayRecord(checked)


def _stamped(reply: Message) -> Message:
    # What Flower's own server does when a message passes through it.
    reply.metadata.__dict__["_message_id"] = f"{reply.metadata.reply_to_message_id}-reply"
    return reply
