"""The import contracts of pyproject.toml hold, and each of them can break."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.checks.sources import read_sources

ROOT = Path(__file__).resolve().parents[2]
IMPURE_SHARED = ("shared.trust", "shared.tensors", "shared.patch")

PLANTED: dict[str, tuple[str, str]] = {
    "sides": ("edge_agent/planted.py", "import cloud_hub.ground"),
    "language": ("shared/trust/planted.py", "import edge_agent.ports"),
    "pure-shared": ("shared/wire/planted.py", "import socket"),
    "pure-core": ("edge_agent/core/planted.py", "import time"),
    "pure-rules": ("cloud_hub/releases/rules.py", "import random"),
    "light-daemon": ("edge_agent/adapters/planted.py", "import shared.tensors"),
    "edge-layers": ("edge_agent/core/planted_too.py", "import edge_agent.ports"),
    "hub-layers": ("cloud_hub/releases/rules.py", "import cloud_hub.releases.tables"),
    "device-tables": ("cloud_hub/ground/planted.py", "import cloud_hub.devices.tables"),
    "release-tables": ("cloud_hub/ground/planted.py", "import cloud_hub.releases.tables"),
    "rollout-tables": ("cloud_hub/ground/planted.py", "import cloud_hub.rollouts.tables"),
    "round-tables": ("cloud_hub/ground/planted.py", "import cloud_hub.rounds.tables"),
    "telemetry-tables": ("cloud_hub/ground/planted.py", "import cloud_hub.telemetry.tables"),
}


def contracts() -> dict[str, str]:
    """Contract ids with their names."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {contract["id"]: contract["name"] for contract in document["tool"]["importlinter"]["contracts"]}


def verdicts(root: Path) -> tuple[dict[str, str], str]:
    """KEPT or BROKEN by contract id, and everything import-linter printed."""
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(lint), "--no-logo", "--no-cache"], cwd=root, capture_output=True, text=True, check=False, timeout=50
    )
    found = {}
    for identifier, name in contracts().items():
        for line in done.stdout.splitlines():
            if line.startswith(name) and line.split()[-1] in {"KEPT", "BROKEN"}:
                found[identifier] = line.split()[-1]
    return found, done.stdout + done.stderr


def test_the_rooms_keep_every_contract() -> None:
    found, output = verdicts(ROOT)
    assert found == dict.fromkeys(contracts(), "KEPT"), output


def test_every_contract_breaks_on_a_planted_import(tmp_path: Path) -> None:
    for package in ("shared", "edge_agent", "cloud_hub"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert set(PLANTED) == set(contracts()), "plant a violation for every contract"
    for path, statement in PLANTED.values():
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{statement}\n")
    found, output = verdicts(tmp_path)
    assert found == dict.fromkeys(contracts(), "BROKEN"), output


@pytest.mark.parametrize("identifier", ["pure-shared"])
def test_the_purity_contract_names_every_module_of_shared(identifier: str) -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = [c for c in document["tool"]["importlinter"]["contracts"] if c["id"] == identifier]
    top = {".".join(source.name.split(".")[:2]) for source in read_sources(ROOT, ("shared",))} - {"shared"}
    assert top - set(IMPURE_SHARED) == set(contract["source_modules"])
