"""`outrider-agent enroll TOKEN`: trade a join token for this device's identity (edge_agent/enrolment.py)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_agent.adapters.system import SystemClock
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.config import LoadedConfig
from edge_agent.enrolment import enroll
from edge_agent.profiles import choose_profile
from shared.errors import InvalidValue
from shared.join import MAX_CHARS


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Enrol and say under which name; raises what `enroll` raises."""
    profile = choose_profile(loaded.config.profile)
    result = enroll(
        token=read_token(args.token),
        state_dir=loaded.config.state_dir,
        profile=profile.name,
        name=args.name,
        force=args.force,
        clock=SystemClock(),
    )
    identity = result.identity
    if args.json:
        screen.show_json(
            {
                "device": identity.device,
                "hub": identity.hub_url,
                "broker": f"{identity.broker_host}:{identity.broker_port}",
                "profile": identity.profile,
                "moved_aside": [str(path) for path in result.moved_aside],
            }
        )
        return Exit.DONE
    screen.show(f"enrolled as {identity.device} at {identity.hub_url}, profile {identity.profile}")
    for path in result.moved_aside:
        screen.show(f"what the former identity left is kept in {path}")
    screen.show(f"next: outrider-agent run --state {loaded.config.state_dir}")
    return Exit.DONE


def read_token(text: str) -> str:
    """The token itself, from stdin for `-` or from a file for `@FILE`: there it is not in the list of processes."""
    try:
        if text == "-":
            return sys.stdin.readline(MAX_CHARS + 2).strip()
        if text.startswith("@"):
            with Path(text[1:]).open(encoding="ascii") as stream:
                return stream.readline(MAX_CHARS + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InvalidValue(
            f"cannot read the token from {text!r}: {reason}",
            code="invalid.join_token",
            hint="give -, @FILE or the text",
        ) from error
    return text
