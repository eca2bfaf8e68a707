"""`outrider-agent status`: how the running agent is."""

from __future__ import annotations

import argparse

import msgspec

from edge_agent.adapters.system import SystemClock
from edge_agent.client import Client
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.config import LoadedConfig
from shared.inference import AgentState, ModelState


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Ask and show; raises Unreachable when no agent runs."""
    with Client(loaded.config.door_path) as agent:
        state = agent.status()
    if args.json:
        screen.show_json(document_of(state))
        return Exit.DONE
    link = f"{state.link} ({state.link_detail})" if state.link_detail else state.link
    waiting = f"{sum(state.queue.values())} records, {state.queue_bytes} bytes"
    if state.queue_oldest_ms:
        waiting += f", the oldest for {duration(max(state.queue_oldest_ms.values()))}"
    screen.show(
        screen.fields(
            [
                ("device", state.device),
                ("profile", state.profile),
                ("agent", f"{state.agent_version}, process {state.pid}, boot {state.boot}"),
                ("up for", duration(state.uptime_ms)),
                ("link", link),
                ("queue", waiting),
                ("assignment", str(state.assignment_version) if state.assignment_version else "none yet"),
                ("certificate", certificate(state, wall_ms=SystemClock().wall_ms())),
                ("requests", f"{state.answered} answered, {state.refused} refused"),
            ]
        )
    )
    if state.models:
        screen.show("\n" + models_table(state.models))
    return Exit.DONE


def certificate(state: AgentState, *, wall_ms: int) -> str:
    """When the certificate ends and is renewed, or why it is not."""
    if not state.certificate_expires_ms:
        return "not looked into yet"
    left_ms, due_ms = state.certificate_expires_ms - wall_ms, state.certificate_due_ms - wall_ms
    text = f"expires in {duration(left_ms)}" if left_ms > 0 else f"expired {duration(-left_ms)} ago"
    if state.certificate_trouble:
        todo = f"; {state.certificate_todo}" if state.certificate_todo else ""
        return f"{text}, not renewed: {state.certificate_trouble}{todo}"
    return f"{text}, to be renewed in {duration(due_ms)}" if due_ms > 0 else f"{text}, to be renewed now"


def document_of(state: AgentState) -> dict[str, object]:
    """The state as one JSON document, every field present."""
    fields = {name: getattr(state, name) for name in state.__struct_fields__ if name not in ("id", "models")}
    return {**fields, "models": [model_document(model) for model in state.models]}


def model_document(model: ModelState) -> dict[str, object]:
    """One model as JSON, every field present."""
    return {name: msgspec.to_builtins(getattr(model, name)) for name in model.__struct_fields__}


def models_table(models: tuple[ModelState, ...]) -> str:
    """Models as a table."""
    rows = [
        (
            model.family,
            model.phase,
            model.version or "-",
            model.variant or "-",
            model.digest[:12] or "-",
            model.candidate or "-",
            f"{model.error_code}: {model.error}" if model.error_code else "",
        )
        for model in models
    ]
    return screen.table(("MODEL", "PHASE", "VERSION", "VARIANT", "DIGEST", "CANDIDATE", "LAST ERROR"), rows)


def duration(ms: int) -> str:
    """`2 d 3 h`, `5 min 7 s`: the two largest units."""
    seconds = ms // 1000
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{seconds // size} {unit}")
            seconds %= size
    return " ".join(parts[:2])
