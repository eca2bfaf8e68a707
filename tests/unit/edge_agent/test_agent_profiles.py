"""Profiles: those that ship, choice by name, detection."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.profiles import Machine, choose_profile, load_profiles, misfits, resolve_profile, this_machine
from shared.errors import ConfigError
from shared.limits import MIB

GIB = 1024 * MIB


def machine(architecture: str = "aarch64", gib: int = 4, board: str = "") -> Machine:
    return Machine(architecture=architecture, memory_bytes=gib * GIB, board=board)


def test_the_shipped_profiles_load() -> None:
    assert {"pi4", "pi5", "x86-gateway"} <= set(load_profiles())


def test_a_name_is_taken_at_its_word_and_a_wrong_one_meets_the_nearest() -> None:
    assert choose_profile("pi4", machine=machine("x86_64")).name == "pi4"
    with pytest.raises(ConfigError) as caught:
        choose_profile("pi_4")
    assert "did you mean 'pi4'" in str(caught.value)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (machine(gib=8, board="Raspberry Pi 4 Model B Rev 1.4"), "pi4"),
        (machine(gib=8, board="Raspberry Pi 5 Model B Rev 1.0"), "pi5"),
        (machine("x86_64", gib=32), "x86-gateway"),
        (machine(gib=2), "pi4"),
    ],
)
def test_detection_reads_board_architecture_and_memory(found: Machine, name: str) -> None:
    assert choose_profile("auto", machine=found).name == name


def test_a_machine_that_nothing_fits_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_profile("auto", machine=machine("riscv64"))
    assert "pi4" in caught.value.hint
    assert misfits(load_profiles()["pi4"], machine("riscv64", gib=1)) != []


def test_the_enrolled_profile_stands_where_none_is_configured() -> None:
    assert resolve_profile("auto", enrolled="pi5").name == "pi5"
    assert resolve_profile("pi4", enrolled="pi5").name == "pi4"


def test_a_broken_profile_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text("name = 'odd'\n")
    with pytest.raises(ConfigError) as caught:
        load_profiles(tmp_path)
    assert "odd.toml" in str(caught.value)


def test_this_machine_reads_proc(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        1000 kB\n")
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "model").write_text("Raspberry Pi 5 Model B\0")
    found = this_machine(tmp_path)
    assert (found.memory_bytes, found.board) == (1_024_000, "Raspberry Pi 5 Model B")
    assert this_machine(tmp_path / "none").memory_bytes == 0
