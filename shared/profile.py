"""Device profiles: what a class of devices can carry. The files are `firmware_profiles/*.toml`, data only."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shared.errors import ConfigError
from shared.limits import MIB


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`host_bytes` bounds one model host's resident size; `total_bytes` the agent with all its children."""

    host_bytes: int
    total_bytes: int


class DiskBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`models_bytes` for model files, `queue_bytes` for records that wait for the hub."""

    models_bytes: int
    queue_bytes: int


class Inference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engines in order of preference, threads per model host, and variants in order of preference."""

    runtimes: tuple[Literal["onnx", "litert"], ...]
    threads: int
    variants: tuple[str, ...]


class Probation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a new release is on trial, how many good answers it must give, and how many bad ones end it."""

    duration_ms: int
    good_answers: int
    max_failures: int


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A class of devices.

    Attributes:
        name: as in the file's name.
        title: for people.
        architectures: `platform.machine()` values that it fits.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    memory: MemoryBudget
    disk: DiskBudget
    inference: Inference
    probation: Probation


def parse_profile(document: dict[str, Any], *, source: str) -> DeviceProfile:
    """The profile in a parsed TOML document; raises ConfigError naming the file and the field."""
    try:
        profile = msgspec.convert(document, type=DeviceProfile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"profile {source}: {error}", code="config.profile") from error
    if profile.memory.host_bytes < 32 * MIB or profile.inference.threads < 1 or not profile.inference.runtimes:
        raise ConfigError(
            f"profile {source}: a model host needs at least 32 MiB, one thread and one runtime", code="config.profile"
        )
    if profile.memory.total_bytes < profile.memory.host_bytes or not profile.inference.variants:
        raise ConfigError(
            f"profile {source}: memory.total_bytes must hold a model host, and one variant must be named",
            code="config.profile",
        )
    if min(profile.disk.models_bytes, profile.disk.queue_bytes) < MIB:
        raise ConfigError(f"profile {source}: the disk budgets need at least 1 MiB each", code="config.profile")
    trial = profile.probation
    if trial.duration_ms < 0 or trial.good_answers < 0 or trial.max_failures < 1:
        raise ConfigError(f"profile {source}: the probation's figures make no sense", code="config.profile")
    return profile
