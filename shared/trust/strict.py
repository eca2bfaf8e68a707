"""The JSON parser that stands before tuf: what two readers could read in two ways is refused.

Refused: more bytes than allowed, duplicate keys, NaN and Infinity, floats (in metadata), numbers past 2**53, lone
surrogates, deeper nesting than MAX_JSON_DEPTH, a boolean where a version, threshold or length belongs, a role name
that is not a plain string.

Not here: what the fields mean (tuf.api), and signatures.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from shared import limits
from shared.errors import TrustError
from shared.trust.roles import is_role_name

MAX_INTEGER = 2**53
"""Beyond it, readers that keep numbers as doubles disagree with readers that do not."""

_COUNTS = ("version", "threshold", "length", "bit_length")


def malformed(what: str, why: str) -> TrustError:
    """The refusal of bytes that do not parse as what they should be."""
    return TrustError(
        f"{what} does not parse: {why}",
        code="trust.malformed",
        hint="the file was damaged or made by something else than Outrider; publish it again",
    )


def parse_json(data: bytes, *, what: str, max_bytes: int, floats: bool = False) -> dict[str, Any]:
    """Parse one JSON object; raises TrustError `trust.malformed`, or `trust.endless_data` for too many bytes.

    Args:
        data: UTF-8 text.
        what: how to call it in the message.
        max_bytes: refuse more before reading any.
        floats: whether fractions are allowed (a manifest has them, metadata must not).
    """
    if len(data) > max_bytes:
        raise TrustError(
            f"{what} of {len(data)} bytes exceeds {max_bytes}",
            code="trust.endless_data",
            hint="something between the hub and this device sends more than was signed",
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key appears twice in one object")
        return table

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if not isinstance(document, dict):
            raise ValueError("the outermost value is not an object")
        _check_tree(document, floats=floats)
    except (ValueError, RecursionError) as error:
        raise malformed(what, str(error)[:200]) from error
    return document


def check_metadata(document: dict[str, Any], *, what: str) -> None:
    """Raise TrustError unless the numbers and names that tuf.api takes on trust have the right types."""
    signed = document.get("signed")
    if not isinstance(signed, dict):
        raise malformed(what, "'signed' is not an object")
    signatures = document.get("signatures")
    if not isinstance(signatures, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("keyid"), str) and isinstance(entry.get("sig"), str)
        for entry in signatures
    ):
        raise malformed(what, "'signatures' is not a list of key identifiers and signatures")
    try:
        _check_counts(signed)
        for group in ("roles", "meta", "targets"):
            for entry in _values(signed.get(group)):
                _check_counts(entry)
                _check_hashes(entry)
        _check_delegations(signed.get("delegations"))
        if "consistent_snapshot" in signed and not isinstance(signed["consistent_snapshot"], bool):
            raise ValueError("'consistent_snapshot' is not true or false")
    except ValueError as error:
        raise malformed(what, str(error)) from error


def _check_tree(document: dict[str, Any], *, floats: bool) -> None:
    """Walk without recursion, so that depth is counted before it can hurt."""
    level: list[Any] = [document]
    depth = 0
    while level:
        depth += 1
        if depth > limits.MAX_JSON_DEPTH:
            raise ValueError(f"it is nested deeper than {limits.MAX_JSON_DEPTH} levels")
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                for key in node:
                    _check_text(key)
                inner.extend(node.values())
            elif isinstance(node, list):
                inner.extend(node)
            elif isinstance(node, str):
                _check_text(node)
            elif isinstance(node, float):
                if not floats:
                    raise ValueError("it holds a fraction where only whole numbers may be")
                if node in (float("inf"), float("-inf")):
                    raise ValueError("it holds a number that is too large")
            elif isinstance(node, int) and abs(node) > MAX_INTEGER:
                raise ValueError("it holds a whole number past 2**53")
        level = inner


def _check_text(text: str) -> None:
    if not text.isascii():
        text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, which is a ValueError


def _values(table: Any) -> list[dict[str, Any]]:
    if table is None:
        return []
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError("a table of objects holds something else")
    return list(table.values())


def _check_counts(entry: dict[str, Any]) -> None:
    for name in _COUNTS:
        if name in entry and (type(entry[name]) is not int or entry[name] < 0):
            raise ValueError(f"{name!r} is not a whole number")


def _check_hashes(entry: dict[str, Any]) -> None:
    hashes = entry.get("hashes")
    if hashes is not None and (
        not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values())
    ):
        raise ValueError("'hashes' is not a table of digests")


def _check_delegations(delegations: Any) -> None:
    if delegations is None:
        return
    if not isinstance(delegations, dict):
        raise ValueError("'delegations' is not an object")
    roles = delegations.get("roles", [])
    succinct = delegations.get("succinct_roles", {})
    if not isinstance(roles, list) or not isinstance(succinct, dict):
        raise ValueError("'delegations' holds something else than roles")
    _check_counts(succinct)
    prefix = succinct.get("name_prefix", "bin")
    if not isinstance(prefix, str) or not is_role_name(prefix + "-ffffffff"):
        raise ValueError("a name prefix is not a short printable text")
    for role in roles:
        if not isinstance(role, dict) or not isinstance(role.get("terminating"), bool):
            raise ValueError("a delegated role is not an object with 'terminating'")
        _check_counts(role)
        if not isinstance(role.get("name"), str) or not is_role_name(role["name"]):
            raise ValueError("a delegated role's name is not a short printable text")
