"""Contexts: which hub to speak to, as whom, and which CA to trust. The one reader of the environment.

A context is written by `outrider login` and holds a token, so its file is 0600 and replaced in one step. It lies at
`$OUTRIDER_CONFIG`, else below `$XDG_CONFIG_HOME`, else `~/.config/outrider/contexts.json`.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from cloud_hub import files
from shared.errors import ConfigError
from shared.limits import MIB


class Context(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One hub as an operator reaches it.

    Attributes:
        url: `https://host:port`, no path.
        token: `orh_…`; never printed.
        ca_pem: the only CA that the hub's certificate may come from.
        fingerprint: SHA-256 of that CA's DER, hex, as pinned at login.
    """

    url: str
    token: str
    ca_pem: str
    fingerprint: str


class Contexts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All contexts by name, and which one is used when none is named."""

    current: str = ""
    contexts: dict[str, Context] = {}


def contexts_path() -> Path:
    """Where the contexts are kept."""
    environment = os.environ
    if named := environment.get("OUTRIDER_CONFIG"):
        return Path(named)
    base = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "outrider" / "contexts.json"


def load_contexts() -> Contexts:
    """The saved contexts, none on a first start; raises ConfigError when the file is not ours to read."""
    path = contexts_path()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", code="config.contexts") from error
    if len(data) > MIB:
        raise ConfigError(f"{path} is {len(data)} bytes long, not a file of contexts", code="config.contexts")
    try:
        return msgspec.json.decode(data, type=Contexts)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path} does not parse: {error}", code="config.contexts", hint="mend it, or remove it and log in again"
        ) from error


def save_contexts(contexts: Contexts) -> Path:
    """Replace the file of contexts in one step; the new file is 0600 from its first byte. Returns where it is."""
    path = contexts_path()
    data = msgspec.json.format(msgspec.json.encode(contexts), indent=2)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.replace(path, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", code="config.contexts") from error
    return path


def load_context(name: str | None) -> Context:
    """The named context, or the current one; raises ConfigError that says how to log in."""
    known = load_contexts()
    wanted = name or known.current
    context = known.contexts.get(wanted)
    if context is not None:
        return context
    if name:
        have = ", ".join(sorted(known.contexts)) or "none"
        raise ConfigError(
            f"there is no context {name!r}", code="config.context", hint=f"use one of: {have}; or log in with --context"
        )
    raise ConfigError(
        "not logged in to a hub",
        code="config.no_context",
        hint="outrider login https://HUB:8443 --token-file FILE --fingerprint HEX",
    )
