"""`outrider-agent status`: how the running agent is."""

from __future__ import annotations

import argparse

import msgspec

from edge_agent.adapters.system import SystemClock
from edge_agent.client import Client
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.config import LoadedConfig
from edge_agent.core.trusted_time import WRONG_CLOCK_MS
from shared.inference import AgentState, ModelState
from shared.limits import MIB


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
                ("assignment", _assignment(state)),
                ("time", time_words(state)),
                ("updates", updates_line(state.updates)),
                ("certificate", certificate(state, now_ms=state.time_ms or SystemClock().wall_ms())),
                ("requests", f"{state.answered} answered, {state.refused} refused"),
            ]
        )
    )
    if state.models:
        screen.show("\n" + models_table(state.models))
    return Exit.DONE


def _assignment(state: AgentState) -> str:
    newest = str(state.assignment_version) if state.assignment_version else "none yet"
    return f"{newest}; a newer one waits: {state.assignment_waits}" if state.assignment_waits else newest


def time_words(state: AgentState) -> str:
    """What the agent's time rests on, and how wrong the system clock is as far as that is known."""
    basis = {
        "attested": "attested by the hub",
        "floor": "not attested, the system clock is behind what has passed",
        "clock": "not attested, by the system clock",
        "": "by the system clock",
    }.get(state.time_basis, state.time_basis)
    parts = [basis]
    if state.time_basis == "attested" and abs(state.clock_error_ms) < WRONG_CLOCK_MS:
        parts.append("the system clock agrees")
    elif abs(state.clock_error_ms) >= WRONG_CLOCK_MS:
        way = "ahead" if state.clock_error_ms > 0 else "behind"
        parts.append(f"the system clock is {duration(abs(state.clock_error_ms))} {way}")
    if state.time_detail:
        parts.append(state.time_detail)
    return "; ".join(parts)


def certificate(state: AgentState, *, now_ms: int) -> str:
    """When the certificate ends and is renewed, or why it is not."""
    if not state.certificate_expires_ms:
        return "not looked into yet"
    left_ms, due_ms = state.certificate_expires_ms - now_ms, state.certificate_due_ms - now_ms
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


def updates_line(updates: dict[str, int]) -> str:
    """What was fetched in a day and what may still be: `2.0 MiB in 24 h, 8.0 of 10.0 MiB left; 3 patches, 1 failed`."""
    line = f"{_mib(updates.get('day_bytes', 0))} MiB fetched in 24 h"
    if "daily_bytes" in updates:
        line += f", {_mib(updates['left_bytes'])} of {_mib(updates['daily_bytes'])} MiB left"
    patched, failed = updates.get("patched", 0), updates.get("patch_failed", 0)
    if patched or failed:
        line += f"; {patched} files patched ({_mib(updates['saved_bytes'])} MiB saved), {failed} patches failed"
    return line


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}"


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
            ", ".join(model.together) or "-",
            f"{model.error_code}: {model.error}" if model.error_code else "",
        )
        for model in models
    ]
    return screen.table(("MODEL", "PHASE", "VERSION", "VARIANT", "DIGEST", "CANDIDATE", "WITH", "LAST ERROR"), rows)


def duration(ms: int) -> str:
    """`2 d 3 h`, `5 min 7 s`: the two largest units."""
    seconds = ms // 1000
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{seconds // size} {unit}")
            seconds %= size
    return " ".join(parts[:2])
