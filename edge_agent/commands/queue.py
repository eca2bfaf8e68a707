"""`outrider-agent queue ls|flush|drop`: the records that wait for the hub."""

from __future__ import annotations

import argparse

from edge_agent.client import Client
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.config import LoadedConfig


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Ask the running agent; raises Unreachable when none runs."""
    with Client(loaded.config.door_path) as agent:
        if args.action == "ls":
            state = agent.status()
            document = {"records": state.queue, "bytes": state.queue_bytes, "link": state.link}
            rows = [(klass, str(count)) for klass, count in state.queue.items()]
            if args.json:
                screen.show_json(document)
            else:
                screen.show(screen.table(("CLASS", "RECORDS"), rows))
                screen.show(f"{state.queue_bytes} bytes in all; link {state.link}")
            return Exit.DONE
        argument = args.klass if args.action == "drop" else ""
        detail = agent.control(f"queue.{args.action}", argument)
    if args.json:
        screen.show_json({"done": f"queue.{args.action}", "detail": detail})
    else:
        screen.show(detail or "done")
    return Exit.DONE
