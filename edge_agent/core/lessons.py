"""What a task of a federated run asks for, read from its message; and what a sample must be to serve for it.

Rules of this file:
1. Everything in a task comes from outside: it is checked before a child is started for it.
2. A device that cannot do it says why, in words for the operator of the run.

A task is a Flower message of type `train` or `evaluate` with the records `config` and `arrays` (README of a run:
docs/federated.md). The model's features are frozen; what is learned is a linear head with a softmax on top of them.
Not here: arithmetic (edge_agent/trainers), and whether the device answers at all (edge_agent/core/training.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, cast

import msgspec

from edge_agent.core.serving import Route
from edge_agent.core.slot_values import Installed
from shared import limits
from shared.errors import InputRefused, ModelError
from shared.federated import Array, ArrayRecord, ConfigValue, FlowerMessage, FlowerRecord, MetricRecord, MetricValue
from shared.inference import TensorHead, check_inputs
from shared.model import Manifest, Signature

WEIGHT: Final = "head.weight"
BIAS: Final = "head.bias"
MAX_EPOCHS: Final = 1_000
MAX_BATCH: Final = 65_536
MAX_LABEL_CHARS: Final = 128


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer is asked to do.

    Attributes:
        kind: `train` moves the head, `evaluate` only measures it.
        labels: class names, in the order of the head's columns.
        weight, bias: the head as it came, `.npy` bytes of shapes (features, classes) and (classes,).
        learning_rate, epochs, batch_size: of the stochastic gradient descent.
        seed: of everything that is random in it.
    """

    kind: Literal["train", "evaluate"]
    labels: tuple[str, ...]
    weight: Array
    bias: Array
    learning_rate: float
    epochs: int
    batch_size: int
    seed: int


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """A lesson and what it is about: the release whose output `features` is learned from."""

    release: Installed
    features: str
    lesson: Lesson


class CannotLearn(ModelError):
    """The device cannot do what the task asks for; said to the hub as a failed precondition."""

    code = "training"


def read_task(message: FlowerMessage, *, routes: Mapping[str, Route], device: str) -> Study:
    """What the message asks of this device; raises CannotLearn saying why it cannot be done here."""
    settings = message.settings("config")
    arrays = message.arrays("arrays")
    category = message.metadata.message_type.partition(".")[0]
    if category not in ("train", "evaluate"):
        raise CannotLearn(f"a message of type {message.metadata.message_type[:40]!r} asks for nothing known here")
    if settings is None or arrays is None:
        raise CannotLearn("the message needs a record 'config' of settings and a record 'arrays'")
    release = _release(settings, routes)
    if why := _untaught(release.manifest.signature):
        raise CannotLearn(why)
    labels = _labels(settings)
    weight, bias = _head(arrays, classes=len(labels))
    lesson = Lesson(
        kind=cast(Literal["train", "evaluate"], category),
        labels=labels,
        weight=weight,
        bias=bias,
        learning_rate=_number(settings, "learning_rate", default=0.1, most=1e6),
        epochs=_integer(settings, "epochs", default=1, most=MAX_EPOCHS),
        batch_size=_integer(settings, "batch_size", default=32, most=MAX_BATCH),
        seed=_seed(settings.get("seed", 0), device=device, group=message.metadata.group_id),
    )
    return Study(release=release, features=_text(settings, "features"), lesson=lesson)


def records(kind: str, arrays: Mapping[str, Array], metrics: Mapping[str, float]) -> dict[str, FlowerRecord]:
    """The records of an answer: what was learned, where something was, and the figures."""
    figures: dict[str, MetricValue] = dict(metrics)
    content: dict[str, FlowerRecord] = {"metrics": MetricRecord(figures)}
    return {"arrays": ArrayRecord(dict(arrays)), **content} if kind == "train" else content


def check_sample(manifest: Manifest, inputs: tuple[TensorHead, ...], *, payload_bytes: int, label: str) -> None:
    """Raise InputRefused unless the inputs are one row of what the model takes and the label is one of its own."""
    if not 0 < len(label) <= MAX_LABEL_CHARS:
        raise InputRefused(f"a label has 1 to {MAX_LABEL_CHARS} characters", code="model.label")
    if manifest.labels and label not in manifest.labels:
        known = ", ".join(manifest.labels[:20])
        raise InputRefused(f"{label!r} is no label of this model", code="model.label", hint=f"one of {known}")
    if why := _untaught(manifest.signature):
        raise InputRefused(why)
    rows = check_inputs(manifest.signature, inputs, payload_bytes)
    if rows != 1:
        raise InputRefused(f"{rows} rows were sent with one label", hint="teach one sample at a time")


def fits(signature: Signature, inputs: tuple[TensorHead, ...], payload_bytes: int) -> bool:
    """Whether a kept sample is what this model takes: it may have been kept for an earlier one."""
    try:
        return check_inputs(signature, inputs, payload_bytes) == 1
    except InputRefused:
        return False


def fixed_rows(signature: Signature) -> int | None:
    """How many rows the model takes at once, no more and no fewer; None where it takes any number."""
    return max((spec.shape[0] for spec in signature.inputs if spec.shape and spec.shape[0] > 0), default=None)


def _untaught(signature: Signature) -> str:
    """Why such a model cannot be taught; empty when it can: samples come one at a time."""
    rows = fixed_rows(signature)
    return f"the model takes {rows} rows at once, samples are single rows" if rows is not None and rows > 1 else ""


def _release(settings: Mapping[str, ConfigValue], routes: Mapping[str, Route]) -> Installed:
    family, version = _text(settings, "family"), _text(settings, "version")
    route = routes.get(family)
    if route is None or route.release is None:
        raise CannotLearn(f"no release of {family[:80]!r} is installed here")
    manifest = route.release.manifest
    if manifest.version != version:
        raise CannotLearn(f"{family} {manifest.version} is installed here, the run needs {version[:80]}")
    return route.release


def _labels(settings: Mapping[str, ConfigValue]) -> tuple[str, ...]:
    value = settings.get("labels")
    try:
        names = msgspec.json.decode(value, type=list[str]) if isinstance(value, str) else value
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CannotLearn(f"'labels' is no JSON list of names: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CannotLearn("'labels' is no list of names")
    labels = tuple(str(name) for name in names)
    if not 2 <= len(labels) <= limits.MAX_LABELS or len(set(labels)) != len(labels):
        raise CannotLearn(f"'labels' needs 2 to {limits.MAX_LABELS} distinct names")
    return labels


def _head(arrays: Mapping[str, Array], *, classes: int) -> tuple[Array, Array]:
    if set(arrays) != {WEIGHT, BIAS}:
        raise CannotLearn(f"the arrays are {sorted(arrays)[:8]}, expected are {WEIGHT!r} and {BIAS!r}")
    weight, bias = arrays[WEIGHT], arrays[BIAS]
    fitting = len(weight.shape) == 2 and weight.shape[1] == classes and bias.shape == (classes,)
    if not fitting or weight.shape[0] == 0 or {weight.stype, bias.stype} != {"numpy.ndarray"}:
        raise CannotLearn(
            f"the head has shapes {list(weight.shape)} and {list(bias.shape)}, "
            f"expected are [features, {classes}] and [{classes}]"
        )
    return weight, bias


def _text(settings: Mapping[str, ConfigValue], key: str) -> str:
    value = settings.get(key)
    if not isinstance(value, str) or not value:
        raise CannotLearn(f"the setting {key!r} is missing or no text")
    return value


def _number(settings: Mapping[str, ConfigValue], key: str, *, default: float, most: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CannotLearn(f"the setting {key!r} is no number")
    if not 0 < value <= most:
        raise CannotLearn(f"the setting {key!r} is {value}, possible is up to {most:g}")
    return float(value)


def _integer(settings: Mapping[str, ConfigValue], key: str, *, default: int, most: int) -> int:
    value = _number(settings, key, default=default, most=most)
    if value != int(value):
        raise CannotLearn(f"the setting {key!r} is {value}, which is no whole number")
    return int(value)


def _seed(value: ConfigValue, *, device: str, group: str) -> int:
    """A number that differs by seed, device and round, and never between two attempts at the same round.

    The round is the number that a message's group begins with, as Flower's strategies and the hub name it.
    """
    number = re.match(r"[0-9]{0,18}", group, re.ASCII)
    words: Sequence[str] = (str(value)[:80], device, number.group() if number is not None else "")
    return int.from_bytes(hashlib.sha256("\n".join(words).encode("utf-8", "replace")).digest()[:8], "big")
