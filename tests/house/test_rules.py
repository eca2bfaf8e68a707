"""The rules of scripts/checks/rules.py hold in the product, and each of them can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from scripts.checks import rules
from scripts.checks.sources import Source, read_sources

ROOT = Path(__file__).resolve().parents[2]
Rule = Callable[[list[Source]], Iterator[str]]

PLANTED: list[tuple[Rule, str, str, str]] = [
    (rules.single_importers, "edge_agent/driver.py", "import paho.mqtt.client", "import msgspec"),
    (rules.single_importers, "cloud_hub/desk.py", "def f():\n    import tuf.api.metadata", "import sqlalchemy"),
    (
        rules.optional_inside_functions,
        "edge_agent/runtimes/onnx.py",
        "import onnxruntime",
        "def load():\n    import onnxruntime",
    ),
    (rules.no_work_at_import, "shared/a.py", "print('hello')", "def f():\n    print('hello')"),
    (rules.no_work_at_import, "shared/a.py", "for x in (1, 2):\n    pass", "X = 1"),
    (rules.no_module_singletons, "shared/a.py", "cache = {}", "A: Final = {'a': 1}"),
    (rules.no_module_singletons, "shared/a.py", "seen: Final = set()", "SEEN: Final = frozenset()"),
    (rules.no_module_singletons, "shared/a.py", "hub = Hub()", "_decoder = msgspec.msgpack.Decoder(int)"),
    (rules.no_module_singletons, "shared/a.py", "def f():\n    global x\n    x = 1", "def f():\n    x = 1"),
    (rules.sizes, "shared/a.py", "x = 1\n" * 501, "x = 1\n" * 500),
    (rules.sizes, "shared/a.py", "def f():\n" + "    x = 1\n" * 60, "def f():\n" + "    x = 1\n" * 59),
    (
        rules.sizes,
        "shared/a.py",
        "class A:\n" + "".join(f"    def m{n}(self): ...\n" for n in range(21)),
        "class A:\n" + "".join(f"    def m{n}(self): ...\n" for n in range(20)),
    ),
    (rules.tasks_have_owners, "edge_agent/a.py", "asyncio.create_task(f())", "self._group.create_task(f())"),
    (rules.tasks_have_owners, "edge_agent/a.py", "loop.create_task(f())", "tasks.create_task(f())"),
    (
        rules.broad_handlers_say_why,
        "edge_agent/a.py",
        "try:\n    f()\nexcept Exception:  # noqa: BLE001\n    pass",
        "try:\n    f()\nexcept Exception:  # a plug-in may raise anything, and must not end the loop\n    pass",
    ),
    (
        rules.broad_handlers_say_why,
        "edge_agent/a.py",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept BaseException:\n    undo()\n    raise",
    ),
    (rules.environment_in_config_only, "edge_agent/a.py", "os.environ['A']", "path = os.path"),
    (rules.clocks_in_system_only, "cloud_hub/a.py", "x = time.time()", "x = clock.wall_ms()"),
    (rules.clocks_in_system_only, "cloud_hub/a.py", "x = datetime.now(UTC)", "x = datetime.fromtimestamp(0, UTC)"),
    (rules.names_are_nouns, "cloud_hub/a.py", "class DeviceManager: ...", "class Devices: ..."),
    (rules.modules_say_what_they_are, "shared/a.py", '"""A."""\ndef f(): ...', '"""A."""\ndef _f(): ...'),
    (rules.modules_say_what_they_are, "shared/a.py", "X = 1", '"""What it is."""\nX = 1'),
    (rules.no_stand_ins, "shared/a.py", "raise NotImplementedError", "raise ValueError"),
]


def plant(root: Path, files: dict[str, str]) -> list[Source]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return read_sources(root, ("shared", "edge_agent", "cloud_hub", "tests"))


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps(rule: Rule) -> None:
    assert list(rule(read_sources(ROOT))) == []


@pytest.mark.parametrize(("rule", "path", "bad", "good"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_violation_is_found(rule: Rule, path: str, bad: str, good: str, tmp_path: Path) -> None:
    assert not list(rule(plant(tmp_path, {path: good})))
    assert list(rule(plant(tmp_path, {path: bad})))


def test_a_module_named_for_nothing_is_found(tmp_path: Path) -> None:
    assert list(rules.names_are_nouns(plant(tmp_path, {"cloud_hub/utils.py": "X = 1"})))


def test_every_rule_has_a_planted_violation() -> None:
    elsewhere = {rules.rooms_meet_at_desks}
    assert {rule for rule, *_ in PLANTED} | elsewhere == set(rules.RULES)


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("cloud_hub/devices/desk.py", "from cloud_hub.releases.rules import allowed"),
        ("cloud_hub/devices/desk.py", "from cloud_hub.releases import tables"),
        ("cloud_hub/ground/auth.py", "import cloud_hub.devices.desk"),
        ("cloud_hub/cli/models.py", "from cloud_hub.releases import desk"),
        ("cloud_hub/cli/models.py", "import cloud_hub.ground.database"),
        ("cloud_hub/cli/models.py", "import cloud_hub.composition.house"),
    ],
)
def test_a_room_that_reads_another_is_found(path: str, statement: str, tmp_path: Path) -> None:
    house = {"cloud_hub/devices/desk.py": "", "cloud_hub/releases/desk.py": "from cloud_hub.devices.desk import Desk"}
    assert not list(rules.rooms_meet_at_desks(plant(tmp_path, house)))
    assert list(rules.rooms_meet_at_desks(plant(tmp_path, {**house, path: statement})))


def test_an_exception_that_is_no_longer_needed_is_found(tmp_path: Path) -> None:
    sources = plant(tmp_path, {"shared/a.py": "X = 1"})
    assert list(rules.sizes(sources, {"shared/a.py": "once upon a time"}))


def test_every_module_of_shared_and_core_has_a_test() -> None:
    assert list(rules.modules_have_tests(read_sources(ROOT), ROOT / "tests")) == []


def test_a_module_without_a_test_is_found(tmp_path: Path) -> None:
    sources = plant(tmp_path, {"shared/ids.py": "X = 1", "tests/test_ids.py": "from shared import errors"})
    assert list(rules.modules_have_tests(sources, tmp_path / "tests"))
    sources = plant(tmp_path, {"tests/test_ids.py": "from shared import errors, ids"})
    assert not list(rules.modules_have_tests(sources, tmp_path / "tests"))
