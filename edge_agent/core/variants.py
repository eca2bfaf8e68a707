"""Which variant of a release a device runs: what its engines can load, its memory and disk can hold, it likes best."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from shared.limits import MIB
from shared.model import Manifest, Variant
from shared.profile import DeviceProfile


class Misfit(msgspec.Struct, frozen=True):
    """No variant fits: what stands against each."""

    reason: str


def choose(manifest: Manifest, *, profile: DeviceProfile, runtimes: Collection[str]) -> Variant | Misfit:
    """The variant to run: the profile's preference of variants, then of engines, then the publisher's order.

    Variants that the profile does not name come after those that it names.

    Args:
        runtimes: engines that are installed here.
    """
    usable = [name for name in profile.inference.runtimes if name in runtimes]
    against = {variant.name: _against(variant, manifest, profile, usable) for variant in manifest.variants}
    fitting = [variant for variant in manifest.variants if not against[variant.name]]
    if not fitting:
        return Misfit("; ".join(f"{name}: {reason}" for name, reason in against.items()))
    preferred = profile.inference.variants
    return min(
        fitting,
        key=lambda variant: (
            preferred.index(variant.name) if variant.name in preferred else len(preferred),
            usable.index(variant.runtime),
        ),
    )


def _against(variant: Variant, manifest: Manifest, profile: DeviceProfile, usable: Collection[str]) -> str:
    """Why the variant cannot run here; empty when it can."""
    disk_bytes = variant.file.length + manifest.golden.file.length
    if variant.runtime not in usable:
        return f"needs the {variant.runtime} engine"
    if variant.ram_bytes > profile.memory.host_bytes:
        return f"needs {variant.ram_bytes // MIB} MiB of memory, {profile.memory.host_bytes // MIB} MiB are allowed"
    if disk_bytes > profile.disk.models_bytes:
        return f"needs {disk_bytes // MIB} MiB on disk, {profile.disk.models_bytes // MIB} MiB are allowed"
    return ""
