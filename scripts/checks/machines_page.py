"""docs/machines.md, drawn from the transition tables: `python -m scripts.checks.machines_page` rewrites it.

The slot machine has a page of its own, docs/slots.md.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from scripts.checks.sources import read_sources
from shared.machine import Table

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "machines.md"
HEAD: Final = """# Machines

The transition tables of agent and hub, drawn by `python -m scripts.checks.machines_page` from the code; a test sees
that they agree. A pair of state and event without an edge is refused with `machine.unexpected_event`, or is listed in
the table as one that changes nothing. The update slot, the largest of them, has [a page of its own](slots.md).
"""


def machines() -> dict[str, Table[Any, Any, Any, Any]]:
    """Every transition table by the name of its module, sorted."""
    found = {}
    for source in read_sources(ROOT):
        if source.name.startswith("edge_agent.core.") or source.name.endswith((".rules", ".stages")):
            module = importlib.import_module(source.name)
            for value in vars(module).values():
                if isinstance(value, Table):
                    found[source.name] = value
    return found


def render() -> str:
    """The page's text."""
    parts = [HEAD]
    for name, table in machines().items():
        if table.name != "slot":
            module = importlib.import_module(name)
            title = (module.__doc__ or name).splitlines()[0]
            path = name.replace(".", "/") + ".py"
            parts.append(f"## {table.name.capitalize()}\n\n[`{path}`](../{path}): {title}\n")
            parts.append(f"```mermaid\n{table.mermaid()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
