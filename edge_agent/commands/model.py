"""`outrider-agent model ls|rollback`: the models on this device."""

from __future__ import annotations

import argparse

from edge_agent.client import Client
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.commands.status import model_document, models_table
from edge_agent.config import LoadedConfig


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Ask the running agent; raises Unreachable when none runs."""
    with Client(loaded.config.door_path) as agent:
        if args.action == "ls":
            models = agent.describe().models
            if args.json:
                screen.show_json({"items": [model_document(model) for model in models]})
            elif models:
                screen.show(models_table(models))
            else:
                screen.note("no model is assigned to this device yet")
            return Exit.DONE
        detail = agent.control("model.rollback", args.family)
    if args.json:
        screen.show_json({"done": "model.rollback", "detail": detail})
    else:
        screen.show(detail or "done")
    return Exit.DONE
