"""docs/limits.md, written from shared/limits.py: `python -m scripts.checks.limits_page` rewrites it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

from shared import limits

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "limits.md"
HEAD: Final = """# Limits

Every bound on what comes from outside. A bound is a promise to memory and disk, not a policy; what an operator may
want to change is configuration. This page is written from [`shared/limits.py`](../shared/limits.py) by
`python -m scripts.checks.limits_page`, and a test sees that they agree.
"""


def render() -> str:
    """The page's text."""
    source = Path(limits.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    body = ast.parse(source).body
    out = [HEAD]
    for position, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name = node.target.id
        if not name.startswith("MAX_"):
            continue
        above = lines[node.lineno - 2]
        if above.startswith("# "):
            out.append(f"\n## {above[2:]}\n\n| bound | value | remark |\n|---|---|---|")
        after = body[position + 1] if position + 1 < len(body) else None
        remark = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            remark = " ".join(str(after.value.value).split())
        out.append(f"| `{name}` | {_readable(name, getattr(limits, name))} | {remark} |")
    return "\n".join(out).replace("\n\n\n", "\n\n") + "\n"


def _readable(name: str, value: int) -> str:
    if name.endswith("_BYTES"):
        if value % limits.MIB == 0:
            return f"{value // limits.MIB} MiB"
        return f"{value // limits.KIB} KiB"
    return f"{value:,}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
