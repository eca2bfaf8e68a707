"""The product's modules as syntax trees: what the rules in rules.py read. Nothing is imported or run here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PACKAGES: Final = ("shared", "edge_agent", "cloud_hub")


@dataclass(frozen=True, slots=True)
class Source:
    """One module.

    Attributes:
        name: dotted, `edge_agent.core.slots`; a package's own module has the package's name.
        path: relative to the root that was read.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        """The text by lines."""
        return self.text.splitlines()

    def line(self, number: int) -> str:
        """The line of this number, counted from 1; empty outside the file."""
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module.

    Attributes:
        target: dotted name; for `from a import b` it is `a.b`, which may be a name inside module `a`.
        in_function: whether the statement only runs when a function is called.
        typing_only: whether it lies under `if TYPE_CHECKING`.
    """

    target: str
    line: int
    in_function: bool
    typing_only: bool


def read_sources(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Source]:
    """Every module below these packages, sorted by name."""
    sources = []
    for package in packages:
        for path in (root / package).rglob("*.py"):
            relative = path.relative_to(root)
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            sources.append(Source(name=name, path=relative, text=text, tree=ast.parse(text)))
    return sorted(sources, key=lambda source: source.name)


def imports_of(source: Source) -> list[Import]:
    """Every import of the module, inside functions too; relative ones resolved."""
    found: list[Import] = []
    for node, in_function, typing_only in _walk(source.tree, in_function=False, typing_only=False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = source.path.name == "__init__.py"
                parts = source.name.split(".")
                kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*kept, base] if base else kept)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(target, node.lineno, in_function, typing_only) for target in targets]
    return found


def _walk(node: ast.AST, *, in_function: bool, typing_only: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, in_function, typing_only
        inner = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield from _walk(child, in_function=inner, typing_only=typed)
