"""The rest of the kernel: errors that say what to do, limits that fit into each other, profiles, records, clocks."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_hub.ground import system as hub_system
from edge_agent.adapters import system as agent_system
from shared import errors, limits, release, telemetry
from shared.clock import Clock
from shared.errors import ConfigError, OutriderError
from shared.profile import parse_profile

ROOT = Path(__file__).resolve().parents[3]
PROFILES = sorted((ROOT / "firmware_profiles").glob("*.toml"))
ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, OutriderError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_in_the_drawing_and_its_code_extends_its_parents(kind: type[OutriderError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    parent = kind.__mro__[1]
    if issubclass(parent, OutriderError) and parent is not OutriderError:
        assert kind.code.startswith(f"{parent.code}.")


def test_codes_are_distinct_and_an_error_carries_its_own() -> None:
    assert len({kind.code for kind in ERRORS}) == len(ERRORS)
    error = errors.TrustError("no", code="trust.rollback", hint="look")
    assert (error.code, error.hint, error.message, str(error)) == ("trust.rollback", "look", "no", "no")
    assert errors.TrustError("no").code == "trust"


def test_limits_fit_into_each_other() -> None:
    assert limits.MAX_RECORD_BYTES < limits.MAX_BATCH_BYTES < limits.MAX_MQTT_PACKET_BYTES
    assert limits.MAX_ASSIGNMENT_BYTES < limits.MAX_MQTT_PACKET_BYTES
    assert limits.MAX_GOLDEN_BYTES <= limits.MAX_MODEL_BYTES
    assert limits.MAX_MANIFEST_BYTES <= limits.MAX_FRAME_PAYLOAD_BYTES


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_shipped_profile_parses_and_keeps_its_own_budgets(path: Path) -> None:
    profile = parse_profile(tomllib.loads(path.read_text()), source=path.name)
    assert profile.name == path.stem
    assert profile.memory.host_bytes <= profile.memory.total_bytes
    assert profile.disk.queue_bytes >= 30 * 24 * 3600 * 200
    assert profile.probation.max_failures >= 1


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"surprise": 1},
        {"memory": {"host_bytes": 1, "total_bytes": 1}},
        {"inference": {"runtimes": [], "threads": 1, "variants": ["int8"]}},
        {"inference": {"runtimes": ["onnx"], "threads": 0, "variants": ["int8"]}},
        {"inference": {"runtimes": ["torch"], "threads": 1, "variants": ["int8"]}},
        {"inference": {"runtimes": ["onnx"], "threads": 1, "variants": []}},
        {"disk": {"models_bytes": -1, "queue_bytes": 1}},
        {"disk": {"models_bytes": "2 GiB", "queue_bytes": 1}},
        {"memory": {"host_bytes": 2**28, "total_bytes": 2**27}},
        {"probation": {"duration_ms": -1, "good_answers": 1, "max_failures": 1}},
        {"probation": {"duration_ms": 1, "good_answers": 1, "max_failures": 0}},
    ],
    ids=str,
)
def test_a_profile_that_makes_no_sense_is_refused_and_the_file_is_named(change: dict[str, Any]) -> None:
    document = tomllib.loads(PROFILES[0].read_text()) | change
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        parse_profile({key: value for key, value in document.items() if value is not None}, source="mine.toml")


def test_values_are_frozen() -> None:
    floors = release.Floors()
    with pytest.raises(AttributeError):
        floors.time_ms = 1  # type: ignore[misc]
    assert msgspec.json.decode(msgspec.json.encode(floors), type=release.Floors) == floors


def test_events_are_the_most_precious_class() -> None:
    assert min(telemetry.RecordClass) is telemetry.CLASS_OF[telemetry.DeviceEvent]


@pytest.mark.parametrize("clock", [agent_system.SystemClock(), hub_system.SystemClock()], ids=["agent", "hub"])
def test_the_system_clock_goes_forward(clock: Clock) -> None:
    readings = [clock.mono_ms() for _ in range(100)]
    assert readings == sorted(readings)
    assert clock.wall_ms() > 1_700_000_000_000
