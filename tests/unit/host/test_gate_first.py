"""Wherever a model's file is opened, the gate has looked at it before the runtime does."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from cloud_hub.releases import builder
from edge_agent.host import child as host
from edge_agent.host import confine
from edge_agent.host.protocol import Load
from edge_agent.trainers import child as trainer
from edge_agent.trainers.protocol import Load as LoadFeatures
from shared.errors import InvalidValue
from shared.model import encode_manifest
from tests.fakes import hostile_models as hostile

if TYPE_CHECKING:
    from tests.fakes.releases import Build


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Build:
    """A signed release with a hostile file, in a process that keeps its rights."""
    pytest.importorskip("onnx")
    from tests.fakes.releases import sign_classifier

    monkeypatch.setattr(confine, "give_up_rights", lambda **_: False)
    return sign_classifier(model=hostile.external("w.bin"))


def opened(*_: object, **__: object) -> NoReturn:
    raise AssertionError("the runtime opened it")


def descriptor(data: bytes) -> int:
    fd = os.memfd_create("model")
    os.write(fd, data)
    return fd


def test_a_host_admits_before_its_runtime_opens(made: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "find_loader", lambda _: opened)
    with pytest.raises(InvalidValue) as caught:
        host._load(
            Load(variant=made.variant.name, threads=1), encode_manifest(made.manifest),
            model_fd=descriptor(made.model), golden_fd=descriptor(made.golden), parent=os.getpid(), niceness=0,
        )  # fmt: skip
    assert caught.value.code == "model.admission"


def test_a_trainer_admits_before_its_runtime_opens(made: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "find_loader", lambda _: opened)
    with pytest.raises(InvalidValue) as caught:
        trainer._load(
            LoadFeatures(variant=made.variant.name, features="scores", threads=1),
            encode_manifest(made.manifest), model_fd=descriptor(made.model), parent=os.getpid(), niceness=0,
        )  # fmt: skip
    assert caught.value.code == "model.admission"


def test_the_hub_admits_before_its_runtime_opens(made: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_load", opened)
    (tmp_path / "model").write_bytes(made.model)
    job: Any = SimpleNamespace(model=str(tmp_path / "model"), push=None)
    with pytest.raises(InvalidValue) as caught:
        builder.build(job)
    assert caught.value.code == "model.admission"
