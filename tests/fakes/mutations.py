"""Odd values for JSON documents: one node is deleted, replaced, doubled, or given a neighbour."""

from __future__ import annotations

import copy
import random
from typing import Any, Final

ODD: Final[list[Any]] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**70, 1.5, "", "x", "\ud800", "../x", "2030-01-01T00:00:00Z",
    "2001-01-01T00:00:00Z", [], {}, [[]], {"keyids": [], "threshold": 1}, ["a", "a"], "é" * 50, "a/*", "**", "0",
]  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, child in inner:
        found += nodes(child, (*path, key))
    return found


def mutate(document: dict[str, Any], rng: random.Random, *, part: str = "signed") -> dict[str, Any]:
    """The document with one node of this part deleted, replaced, doubled, or with one beside it."""
    changed = copy.deepcopy(document)
    places = nodes(changed.get(part))
    if not places:
        return {**changed, part: copy.deepcopy(rng.choice(ODD))}
    path = rng.choice(places)
    node = changed[part]
    for key in path[:-1]:
        node = node[key]
    last = path[-1]
    match rng.randrange(6):
        case 0:
            del node[last]
        case 1 | 2:
            node[last] = copy.deepcopy(rng.choice(ODD))
        case 3 if isinstance(node[last], int):
            node[last] += rng.choice([-1, 1, 100])
        case 4 if isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[last]))
        case 4:
            node[rng.choice(list(node))] = copy.deepcopy(node[last])
        case _ if isinstance(node, dict):
            node[rng.choice(["x", "", "version", "name", "../x"])] = copy.deepcopy(rng.choice(ODD))
        case _:
            node.append(copy.deepcopy(rng.choice(ODD)))
    return changed
