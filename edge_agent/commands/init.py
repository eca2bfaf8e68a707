"""`outrider-agent init`: the state directory and a commented configuration file. Changes nothing that is there."""

from __future__ import annotations

import argparse
import os

from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.config import CONFIG_NAME, LoadedConfig
from edge_agent.profiles import choose_profile
from shared.errors import StorageError


def run(_: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Make what is missing and say what comes next; raises StorageError, ConfigError for an unknown profile."""
    state_dir = loaded.config.state_dir
    profile = choose_profile(loaded.config.profile)
    path = state_dir / CONFIG_NAME
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(template(loaded))
        screen.show(f"wrote {path}")
    except FileExistsError:
        screen.show(f"{path} is there already and was left as it is")
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}",
            code="storage.state_dir",
            hint="run the command as the user that runs the agent, or choose another --state",
        ) from error
    screen.show(f"profile {profile.name}: {profile.title}")
    screen.show(f"next: outrider-agent enroll --state {state_dir} TOKEN")
    return Exit.DONE


def template(loaded: LoadedConfig) -> str:
    """The configuration file: every key, commented out at its default, set where a flag or variable set it."""
    lines = ["# Outrider agent. What is commented out has the value shown.", ""]
    section = ""
    for setting in loaded.settings:
        if setting.key == "state_dir":
            continue
        prefix, dot, name = setting.key.partition(".")
        if dot and prefix != section:
            section = prefix
            lines += ["", f"[{section}]"]
        mark = "# " if setting.origin == "default" else ""
        lines.append(f"{mark}{name if dot else prefix} = {setting.shown()}")
    return "\n".join(lines) + "\n"
