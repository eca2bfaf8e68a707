"""Which variant a device runs."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.core.variants import Misfit, choose
from shared.limits import MIB
from shared.model import Manifest
from shared.profile import DeviceProfile, DiskBudget, Inference, MemoryBudget
from tests.machines.slot_parts import PROBATION, model

MANIFEST = model("1.0.0").manifest


def profile(
    *variants: str, runtimes: tuple[str, ...] = ("onnx",), host_mib: int = 96, disk_mib: int = 64
) -> DeviceProfile:
    """A profile with these preferences."""
    inference = {"runtimes": runtimes, "threads": 1, "variants": variants}
    return DeviceProfile(
        name="p",
        title="P",
        architectures=("x86_64",),
        memory=MemoryBudget(host_bytes=96 * MIB, total_bytes=256 * MIB),
        disk=DiskBudget(models_bytes=disk_mib * MIB, queue_bytes=MIB),
        inference=msgspec.convert(inference, type=Inference),
        probation=PROBATION,
    )


def chosen(manifest: Manifest, given: DeviceProfile, *runtimes: str) -> str:
    """The name of the chosen variant, or what stands against all."""
    found = choose(manifest, profile=given, runtimes=runtimes or ("onnx",))
    return found.reason if isinstance(found, Misfit) else found.name


def altered(name: str, **changed: object) -> Manifest:
    """The manifest with one variant altered."""
    variants = tuple(
        msgspec.structs.replace(variant, **changed) if variant.name == name else variant
        for variant in MANIFEST.variants
    )
    return msgspec.structs.replace(MANIFEST, variants=variants)


def test_the_profile_s_preference_decides() -> None:
    assert chosen(MANIFEST, profile("fp32", "int8")) == "fp32"
    assert chosen(MANIFEST, profile("int8", "fp32")) == "int8"


def test_what_the_profile_does_not_name_comes_last_in_the_publisher_s_order() -> None:
    assert chosen(MANIFEST, profile("fp32")) == "fp32"
    assert chosen(MANIFEST, profile()) == "int8"


def test_the_engine_that_is_preferred_breaks_ties() -> None:
    both = altered("fp32", runtime="litert")
    assert chosen(both, profile(runtimes=("litert", "onnx")), "onnx", "litert") == "fp32"


def test_what_is_too_large_for_the_memory_is_passed_over() -> None:
    large = altered("int8", ram_bytes=200 * MIB)
    assert chosen(large, profile("int8", "fp32")) == "fp32"


@pytest.mark.parametrize(
    ("reason", "found"),
    [
        ("needs the onnx engine", chosen(MANIFEST, profile("int8"), "litert")),
        ("needs the onnx engine", chosen(MANIFEST, profile("int8", runtimes=("litert",)))),
        ("needs 0 MiB on disk, 0 MiB are allowed", chosen(MANIFEST, profile("int8", disk_mib=0))),
    ],
)
def test_a_misfit_says_what_stands_against_each_variant(reason: str, found: str) -> None:
    assert found == f"int8: {reason}; fp32: {reason}"
