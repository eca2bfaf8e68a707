"""The agent's state as Prometheus reads it (text exposition format 0.0.4), at `/metrics` of the door.

Every figure is one that `outrider-agent status --json` shows. Totals count from the agent's start, except for lost
records, which count from the making of the outbox. Loaded when the first stream speaks HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from shared.inference import AgentState

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "outrider_agent_"

_Samples = Iterable[tuple[Mapping[str, str], float]]


def render(state: AgentState) -> bytes:
    """The whole page."""
    lines: list[str] = []

    def add(name: str, kind: str, told: str, samples: _Samples) -> None:
        lines.append(f"# HELP {_PREFIX}{name} {told}")
        lines.append(f"# TYPE {_PREFIX}{name} {kind}")
        lines.extend(f"{_PREFIX}{name}{_labels(labels)} {value:.15g}" for labels, value in samples)

    about = {"version": state.agent_version, "profile": state.profile, "device": state.device}
    requests = {"answered": state.answered, "refused": state.refused}
    add("info", "gauge", "Always 1; what runs here.", [(about, 1)])
    add("uptime_seconds", "gauge", "Since the agent's start.", [({}, state.uptime_ms / 1000)])
    add("link_up", "gauge", "Whether the hub's broker is connected.", [({}, state.link == "online")])
    add("requests_total", "counter", "Inference requests.", _by("result", requests))
    add("queue_records", "gauge", "Records that wait for the hub.", _by("class", state.queue))
    ages = {klass: age_ms / 1000 for klass, age_ms in state.queue_oldest_ms.items()}
    add("queue_oldest_seconds", "gauge", "How long the oldest record has waited.", _by("class", ages))
    add("queue_bytes", "gauge", "What the outbox takes on the disk.", [({}, state.queue_bytes)])
    lost = _by("reason", state.queue_lost)
    add("queue_lost_records_total", "counter", "Records that will not reach the hub, each told as a gap.", lost)
    unkept = _by("class", state.queue_unkept)
    add("queue_unkept_records_total", "counter", "Records the disk did not take and nobody waited for.", unkept)
    add("queue_buried_batches", "gauge", "Batches put aside because nobody takes them.", [({}, state.queue_buried)])
    told = "Batches put aside that went to make room."
    add("queue_buried_given_up_batches_total", "counter", told, [({}, state.queue_buried_given_up)])
    add("queue_written_bytes_total", "counter", "Bytes handed to the disk.", [({}, state.queue_written_bytes)])
    add("queue_syncs_total", "counter", "Times that the disk was waited for.", [({}, state.queue_syncs)])
    serving = {model.family: model.signature is not None for model in state.models}
    add("model_ready", "gauge", "Whether a release of the model is loaded.", _by("model", serving))
    return ("\n".join(lines) + "\n").encode()


def _by(label: str, values: Mapping[str, float]) -> _Samples:
    return [({label: key}, value) for key, value in values.items()]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
