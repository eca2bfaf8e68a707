"""The locks cover the dependencies that pyproject.toml names, exactly, with hashes and without addresses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def pins(name: str) -> dict[str, str]:
    """Locked versions by canonical name."""
    return {canonicalize_name(package): version for package, version in LOCKED.findall((ROOT / name).read_text())}


def wanted(*extras: str) -> list[Requirement]:
    """What the project needs with these extras and for development."""
    texts = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    texts += [text for extra in extras for text in EXTRAS[extra]]
    return [requirement for text in texts if (requirement := Requirement(text)).name != "outrider"]


def test_the_lock_has_every_dependency_of_agent_hub_demo_and_tools_in_a_version_that_fits() -> None:
    locked = pins("requirements.lock")
    for requirement in wanted("agent", "hub", "demo"):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_constraints_cover_every_extra() -> None:
    constraints = pins("constraints.txt")
    for requirement in wanted(*EXTRAS):
        assert requirement.specifier.contains(constraints[canonicalize_name(requirement.name)]), requirement


def test_the_lock_agrees_with_the_constraints() -> None:
    constraints = pins("constraints.txt")
    assert {name: constraints.get(name) for name in pins("requirements.lock")} == pins("requirements.lock")


def test_every_locked_package_has_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(LOCKED.findall(text))
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    for name in ("requirements.lock", "constraints.txt"):
        assert not re.search(r"://|--index-url|--find-links|file:", (ROOT / name).read_text()), name
