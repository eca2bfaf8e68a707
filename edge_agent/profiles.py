"""Device profiles: found beside the installed package or in the source tree, chosen by name or detected.

Not here: what a profile says (`shared/profile.py`), and the data (`firmware_profiles/*.toml`).
"""

from __future__ import annotations

import difflib
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import ConfigError
from shared.limits import KIB
from shared.profile import DeviceProfile, parse_profile

AUTO: Final = "auto"
MEMORY_SHARE: Final = 0.6
"""A profile fits when its total budget is at most this share of the machine's memory: others live there too."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What detection looks at.

    Attributes:
        architecture: `platform.machine()`.
        memory_bytes: all of it, 0 when unknown.
        board: the device tree's model text (`Raspberry Pi 4 Model B Rev 1.4`), empty where there is none.
    """

    architecture: str
    memory_bytes: int
    board: str


def profiles_dir() -> Path:
    """Where the profiles are: in the installed package, or in the source tree beside it."""
    package = Path(__file__).resolve().parent
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parent / "firmware_profiles"


def load_profiles(folder: Path | None = None) -> dict[str, DeviceProfile]:
    """All profiles by name; raises ConfigError naming the file that cannot be used."""
    where = folder or profiles_dir()
    profiles: dict[str, DeviceProfile] = {}
    for path in sorted(where.glob("*.toml")):
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"profile {path}: {error}", code="config.profile") from error
        profile = parse_profile(document, source=str(path))
        if profile.name != path.stem:
            raise ConfigError(
                f"profile {path}: its name is {profile.name!r}", code="config.profile", hint="name it like its file"
            )
        profiles[profile.name] = profile
    if not profiles:
        raise ConfigError(
            f"there are no device profiles in {where}", code="config.profile", hint="install outrider again"
        )
    return profiles


def choose_profile(name: str, *, machine: Machine | None = None, folder: Path | None = None) -> DeviceProfile:
    """The named profile, or for `auto` the one that fits this machine best; raises ConfigError."""
    profiles = load_profiles(folder)
    if name != AUTO:
        if name not in profiles:
            near = difflib.get_close_matches(name, profiles, n=1, cutoff=0.5)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown profile {name!r}{meant}",
                code="config.profile",
                hint=f"use one of {', '.join(profiles)}, or auto",
            )
        return profiles[name]
    return detect_profile(profiles, machine or this_machine())


def resolve_profile(configured: str, *, enrolled: str) -> DeviceProfile:
    """The configured profile; where that is `auto`, the one that the device was enrolled with; else a detected one."""
    return choose_profile(enrolled if configured == AUTO and enrolled else configured)


def detect_profile(profiles: dict[str, DeviceProfile], machine: Machine) -> DeviceProfile:
    """The profile whose title names the board, else the most generous one that fits; raises ConfigError."""
    fitting = [profile for profile in profiles.values() if not misfits(profile, machine)]
    for profile in fitting:
        if machine.board and machine.board.startswith(profile.title.partition(" (")[0]):
            return profile
    if not fitting:
        raise ConfigError(
            f"no profile fits this machine ({machine.architecture}, {machine.memory_bytes // KIB**2} MiB)",
            code="config.profile",
            hint=f"choose one by name: {', '.join(profiles)}",
        )
    return max(fitting, key=lambda profile: (profile.memory.total_bytes, profile.name))


def misfits(profile: DeviceProfile, machine: Machine) -> list[str]:
    """Why the profile does not fit the machine, in words; empty when it does."""
    reasons = []
    if machine.architecture not in profile.architectures:
        reasons.append(f"is for {', '.join(profile.architectures)}, this is {machine.architecture}")
    usable = int(machine.memory_bytes * MEMORY_SHARE)
    if machine.memory_bytes and profile.memory.total_bytes > usable:
        reasons.append(
            f"wants {profile.memory.total_bytes // KIB**2} MiB of memory, {usable // KIB**2} MiB "
            f"of {machine.memory_bytes // KIB**2} are to be had"
        )
    return reasons


def this_machine(proc: Path = Path("/proc")) -> Machine:
    """What this machine is; unknown where the kernel does not say."""
    memory_bytes = 0
    board = ""
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                memory_bytes = int(line.split()[1]) * KIB
    except (OSError, ValueError, IndexError):
        memory_bytes = 0
    try:
        board = (proc / "device-tree" / "model").read_text().rstrip("\0\n ")
    except (OSError, UnicodeDecodeError):
        board = ""
    return Machine(architecture=platform.machine(), memory_bytes=memory_bytes, board=board)
