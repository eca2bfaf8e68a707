"""`outrider-agent doctor`: check this device and its links, and say what to do. Changes nothing."""

from __future__ import annotations

import argparse

from edge_agent.adapters.system import SystemClock
from edge_agent.commands import screen
from edge_agent.commands.checks import check_all
from edge_agent.commands.exits import Exit
from edge_agent.config import LoadedConfig


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Print every finding; 1 when one of them is a failure, 0 otherwise."""
    findings = check_all(loaded.config, wall_ms=SystemClock().wall_ms())
    failed = any(finding.result == "fail" for finding in findings)
    if args.json:
        screen.show_json({"ok": not failed, "findings": findings})
    else:
        for finding in findings:
            screen.show(f"{finding.result:<4}  {finding.check}: {screen.clean(finding.text)}")
            if finding.todo:
                screen.show(f"      try: {finding.todo}")
    return Exit.FAILED if failed else Exit.DONE
