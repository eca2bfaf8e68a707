"""`outrider-agent run`: resolves the configuration and the profile, then becomes the daemon.

The process is replaced, not forked: process id, standard streams and the service manager's view stay the same, the
daemon's memory is free of what only reading the configuration needed, and `-I` keeps the working directory, the
environment and the user's site packages out of its imports.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from msgspec.structs import replace

from edge_agent.config import LoadedConfig, daemon_environment
from edge_agent.identity import load_identity
from edge_agent.profiles import resolve_profile
from edge_agent.settings import AgentConfig, Launch, encode_launch
from shared.profile import DeviceProfile, Probation


def run(_: argparse.Namespace, loaded: LoadedConfig) -> NoReturn:
    """Become the daemon; raises ConfigError when the device is not enrolled or has no such profile."""
    config = loaded.config
    profile = device_profile(config, enrolled=load_identity(config.state_dir).profile)
    launch = encode_launch(Launch(config=config, profile=profile))
    sys.stdout.flush()
    # Column positions are for tracebacks' underlines; a quarter of a megabyte is too dear for that here.
    command = [sys.executable, "-I", "-X", "no_debug_ranges", "-m", "edge_agent.daemon", launch]
    os.execve(sys.executable, command, daemon_environment())  # noqa: S606


def device_profile(config: AgentConfig, *, enrolled: str) -> DeviceProfile:
    """The configured profile, else the one it was enrolled with; its probation as configured."""
    profile = resolve_profile(config.profile, enrolled=enrolled)
    override, given = config.probation, profile.probation
    probation = Probation(
        duration_ms=override.duration_ms or given.duration_ms,
        good_answers=override.good_answers or given.good_answers,
        max_failures=override.max_failures or given.max_failures,
    )
    return replace(profile, probation=probation)
