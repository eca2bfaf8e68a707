"""`outrider-agent queue ls|flush|drop`: the records that wait for the hub."""

from __future__ import annotations

import argparse

from edge_agent.client import Client
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.commands.status import duration
from edge_agent.config import LoadedConfig
from shared.inference import AgentState


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Ask the running agent; raises Unreachable when none runs."""
    with Client(loaded.config.door_path) as agent:
        if args.action == "ls":
            state = agent.status()
            if args.json:
                screen.show_json(document_of(state))
            else:
                screen.show(listing_of(state))
            return Exit.DONE
        argument = args.klass if args.action == "drop" else ""
        detail = agent.control(f"queue.{args.action}", argument)
    if args.json:
        screen.show_json({"done": f"queue.{args.action}", "detail": detail})
    else:
        screen.show(detail or "done")
    return Exit.DONE


def document_of(state: AgentState) -> dict[str, object]:
    """Everything that is known of the queue, as one JSON document."""
    return {
        "records": state.queue,
        "oldest_ms": state.queue_oldest_ms,
        "bytes": state.queue_bytes,
        "lost": state.queue_lost,
        "buried": state.queue_buried,
        "buried_given_up": state.queue_buried_given_up,
        "unkept": state.queue_unkept,
        "written_bytes": state.queue_written_bytes,
        "syncs": state.queue_syncs,
        "link": state.link,
    }


def listing_of(state: AgentState) -> str:
    """The same for people."""
    ages = state.queue_oldest_ms
    rows = [
        (klass, str(count), duration(ages[klass]) if klass in ages else "-") for klass, count in state.queue.items()
    ]
    aside = f"{state.queue_buried} batches" if state.queue_buried else "nothing"
    if state.queue_buried_given_up:
        aside += f", {state.queue_buried_given_up} more went to make room"
    facts = [
        ("on disk", f"{state.queue_bytes} bytes"),
        ("lost", _counts(state.queue_lost)),
        ("never kept", _counts(state.queue_unkept)),
        ("put aside", aside),
        ("since start", f"{state.queue_written_bytes} bytes written, {state.queue_syncs} syncs"),
        ("link", state.link),
    ]
    return f"{screen.table(('CLASS', 'RECORDS', 'OLDEST'), rows)}\n\n{screen.fields(facts)}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count) or "nothing"
