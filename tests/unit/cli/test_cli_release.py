"""From an ONNX file to a signed bundle: what is uploaded, what a signer sees, and what a signer refuses."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_hub.keyring import Keyring, root_keys
from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import (
    FileRef,
    Golden,
    Manifest,
    Preparation,
    Signature,
    TensorSpec,
    Variant,
    encode_manifest,
    target_path,
)
from shared.trust import publication, repository
from shared.wire.golden import GoldenSet, GoldenTensor, decode_golden, encode_golden
from tests.fakes.small_hub import Asked, SmallHub
from tests.unit.cli.conftest import Run

FAMILY, VERSION = FamilyName("sign"), ModelVersion("1.0.0")
NOW_MS = 1_800_000_000_000
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 2)),),
    outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1, 2)),),
)


def onnx_model(operator: str = "Identity") -> bytes:
    """Two scores that are the two inputs after preparation."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    data: bytes = model.SerializeToString()
    return data


@dataclass(slots=True)
class Fleet:
    """A hub's view of one release, ready to be proposed, and the keys."""

    hub: SmallHub
    keys: Path
    root: bytes
    targets: bytes
    manifest: Manifest
    model: bytes
    golden: bytes
    role: bytes | None = None

    def propose(self, other: Manifest | None = None, **changed: Any) -> None:
        """Let the hub propose it, with changes by a hub that was broken into."""
        manifest = other or self.manifest
        files = [msgspec.to_builtins(file) for file in repository.release_files(manifest)]
        proposal = {
            "family": manifest.family,
            "version": manifest.version,
            "manifest": encode_manifest(manifest).decode(),
            "files": files,
            "root": self.root.decode(),
            "targets": self.targets.decode(),
            "role": None if self.role is None else self.role.decode(),
            **changed,
        }
        self.hub.answers[("GET", f"/v1/releases/{manifest.family}/{manifest.version}/proposal")] = (200, proposal)
        for data in (self.model, self.golden):
            self.hub.answers[("GET", f"/v1/blobs/{hashlib.sha256(data).hexdigest()}")] = (200, data)


def file_ref(name: str, data: bytes, version: ModelVersion = VERSION) -> FileRef:
    return FileRef(
        path=target_path(FAMILY, version, name), length=len(data), digest=Digest(hashlib.sha256(data).hexdigest())
    )


def make_manifest(
    model: bytes,
    golden: bytes,
    *,
    answers: tuple[int, ...],
    accuracy: float,
    version: ModelVersion = VERSION,
    counter: int = 1,
) -> Manifest:
    return Manifest(
        family=FAMILY,
        version=version,
        release_counter=counter,
        min_release_counter=0,
        task="classification",
        signature=SIGNATURE,
        # the mean turns "which is greater" around, so that a check without the preparation would be noticed
        preparations=(Preparation(input="x", mean=(10.0, 0.0)),),
        labels=("left", "right"),
        golden=Golden(file=file_ref("golden.bin", golden, version), samples=4, min_agreement=1.0),
        variants=(
            Variant(
                name="fp32",
                runtime="onnx",
                file=file_ref("fp32.onnx", model, version),
                accuracy=accuracy,
                answers=answers,
            ),
        ),
    )


@pytest.fixture
def fleet(logged_in: SmallHub, tmp_path: Path) -> Fleet:
    rows = np.array([[20, 1], [5, 1], [11, 0], [0, 0]], dtype="<f4")
    tensor = GoldenTensor(name="x", dtype="fp32", shape=(4, 2), data=rows.tobytes())
    golden = encode_golden(GoldenSet(samples=4, labels=(0, 1, 0, 0), inputs=(tensor,)))
    offline, online = Keyring(tmp_path / "offline"), Keyring(tmp_path / "online")
    offline.create("root", "targets", "release")
    online.create("snapshot", "timestamp", "assignment")
    keys = root_keys(offline, online)
    import time

    now_ms = time.time_ns() // 1_000_000
    model = onnx_model()
    fleet = Fleet(
        hub=logged_in,
        keys=tmp_path / "offline",
        root=repository.sign(repository.new_root(keys, now_ms=now_ms), offline.signer("root")),
        targets=repository.sign(repository.new_targets(now_ms=now_ms), offline.signer("targets")),
        manifest=make_manifest(model, golden, answers=(0, 1, 0, 1), accuracy=0.75),
        model=model,
        golden=golden,
    )
    fleet.propose()
    return fleet


def check(fleet: Fleet, bundle: dict[str, Any]) -> publication.Publication:
    """What the hub checks of a bundle."""
    import time

    return publication.check_publication(
        fleet.root,
        family=FAMILY,
        current_targets=fleet.targets,
        current_role=fleet.role,
        targets=bundle["targets"].encode() if bundle.get("targets") else None,
        role=bundle["role"].encode(),
        now_ms=time.time_ns() // 1_000_000,
    )


def sign(run: Run, fleet: Fleet, name: str = f"{FAMILY}/{VERSION}") -> dict[str, Any]:
    ended = run("release", "sign", name, "--keys", str(fleet.keys), "--yes", "--json")
    assert ended.code == 0, ended.err
    bundle: dict[str, Any] = msgspec.json.decode(Path(ended.json["bundle"]).read_bytes())
    return bundle


def test_a_new_family_is_delegated_and_signed(fleet: Fleet, run: Run) -> None:
    bundle = sign(run, fleet)
    publication = check(fleet, bundle)
    assert {file.path for file in publication.files} == {
        f"models/sign/1.0.0/{name}" for name in ("manifest.json", "golden.bin", "fp32.onnx")
    }
    assert stat.S_IMODE(Path("sign-1.0.0.release.json").stat().st_mode) == 0o600


def test_the_next_release_needs_no_targets_key(fleet: Fleet, run: Run) -> None:
    bundle = sign(run, fleet)
    fleet.targets, fleet.role = bundle["targets"].encode(), bundle["role"].encode()
    (fleet.keys / "targets.key").unlink()
    following = make_manifest(
        fleet.model, fleet.golden, answers=(0, 1, 0, 1), accuracy=0.75, version=ModelVersion("1.1.0"), counter=2
    )
    fleet.propose(following)
    bundle = sign(run, fleet, "sign/1.1.0")
    assert "targets" not in bundle or bundle["targets"] is None
    assert len(check(fleet, bundle).files) == 3


def test_nobody_to_ask_means_no_signature(fleet: Fleet, run: Run) -> None:
    ended = run("release", "sign", "sign/1.0.0", "--keys", str(fleet.keys))
    assert ended.code == 2
    assert "--yes" in ended.err
    assert "75.0%" in ended.err
    # A person has to read this: every file and every variant on a line of its own.
    assert any(line.startswith("manifest.json ") for line in ended.err.splitlines())
    assert any(line.startswith("VARIANT ") for line in ended.err.splitlines())
    assert not Path("sign-1.0.0.release.json").exists()


def _other_role(fleet: Fleet) -> dict[str, Any]:
    """An earlier role that somebody else signed, with a file of theirs in it."""
    foreign = Keyring(fleet.keys.parent / "foreign")
    foreign.create("release")
    other = make_manifest(fleet.model, fleet.golden, answers=(0, 1, 0, 1), accuracy=0.75, version=ModelVersion("0.9.0"))
    role = repository.add_release(None, other, now_ms=NOW_MS)
    return {"role": repository.sign(role, foreign.signer("release")).decode()}


def _other_root(fleet: Fleet) -> dict[str, Any]:
    """A root that does not know the operator's targets key."""
    foreign = Keyring(fleet.keys.parent / "foreign")
    foreign.create("root", "targets", "release", "snapshot", "timestamp", "assignment")
    return {
        "root": repository.sign(
            repository.new_root(root_keys(foreign, foreign), now_ms=NOW_MS), foreign.signer("root")
        ).decode()
    }


def _other_targets(fleet: Fleet) -> dict[str, Any]:
    foreign = Keyring(fleet.keys.parent / "foreign")
    foreign.create("targets")
    return {"targets": repository.sign(repository.new_targets(now_ms=NOW_MS), foreign.signer("targets")).decode()}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_other_role, "trust.signature"),
        (_other_root, "trust.signature"),
        (_other_targets, "trust.signature"),
        (lambda fleet: {"files": []}, "trust.proposal"),
        (lambda fleet: {"manifest": encode_manifest(fleet.manifest).decode() + " "}, "trust.proposal"),
        (lambda fleet: {"manifest": "{}"}, "trust.proposal"),
    ],
)
def test_a_proposal_that_is_not_right_is_not_signed(
    fleet: Fleet, run: Run, change: Callable[[Fleet], dict[str, Any]], code: str
) -> None:
    fleet.propose(**change(fleet))
    ended = run("release", "sign", "sign/1.0.0", "--keys", str(fleet.keys), "--yes")
    assert ended.code == 9, ended.err
    assert f"code: {code}" in ended.err
    assert not Path("sign-1.0.0.release.json").exists()


@pytest.mark.parametrize(("operator", "exits"), [("Identity", 0), ("Neg", 9)])
def test_a_raw_model_is_compared_with_its_fp32_variant_here(fleet: Fleet, run: Run, operator: str, exits: int) -> None:
    other = onnx_model(operator)
    fp32 = Variant(name="fp32", runtime="onnx", file=file_ref("fp32.onnx", fleet.model), accuracy=1.0, answers=())
    int8 = Variant(name="int8", runtime="onnx", file=file_ref("int8.onnx", other), accuracy=1.0, answers=())
    manifest = msgspec.structs.replace(fleet.manifest, task="raw", labels=(), variants=(int8, fp32))
    fleet.propose(manifest)
    fleet.hub.answers["GET", f"/v1/blobs/{hashlib.sha256(other).hexdigest()}"] = (200, other)
    ended = run("release", "sign", "sign/1.0.0", "--keys", str(fleet.keys), "--yes")
    assert ended.code == exits, ended.err
    assert Path("sign-1.0.0.release.json").exists() == (exits == 0)
    assert ("code: trust.golden" in ended.err) == (exits != 0)


@pytest.mark.parametrize(("answers", "accuracy"), [((1, 1, 0, 1), 0.75), ((0, 1, 0, 1), 1.0)])
def test_answers_or_accuracy_that_are_not_seen_here_are_not_signed(
    fleet: Fleet, run: Run, answers: tuple[int, ...], accuracy: float
) -> None:
    fleet.propose(make_manifest(fleet.model, fleet.golden, answers=answers, accuracy=accuracy))
    ended = run("release", "sign", "sign/1.0.0", "--keys", str(fleet.keys), "--yes")
    assert ended.code == 9
    assert "code: trust.golden" in ended.err


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"x", lambda data: data[:-1], lambda data: data + b"x"])
def test_a_changed_file_is_noticed(fleet: Fleet, run: Run, damage: Callable[[bytes], bytes]) -> None:
    digest = hashlib.sha256(fleet.model).hexdigest()
    fleet.hub.answers[("GET", f"/v1/blobs/{digest}")] = (200, damage(fleet.model))
    ended = run("model", "verify", "sign/1.0.0")
    assert ended.code in (1, 9)
    assert "code: transfer.corrupt" in ended.err or "code: protocol.too_large" in ended.err


def test_verify_says_what_it_saw(fleet: Fleet, run: Run) -> None:
    ended = run("model", "verify", "sign/1.0.0", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["variants"] == [
        {"name": "fp32", "accuracy_recorded": 0.75, "accuracy_here": 0.75, "agreement_here": 1.0}
    ]


def test_keys_that_are_not_there(fleet: Fleet, run: Run, tmp_path: Path) -> None:
    ended = run("release", "sign", "sign/1.0.0", "--keys", str(tmp_path / "nowhere"), "--yes")
    assert ended.code == 78
    assert "code: config.key_missing" in ended.err


def test_publish_sends_the_bundle_and_assigns(fleet: Fleet, run: Run) -> None:
    sign(run, fleet)
    fleet.hub.answers[("POST", "/v1/releases")] = (201, {"family": "sign", "version": "1.0.0"})
    fleet.hub.answers[("POST", "/v1/assignments")] = (
        200,
        {"assigned": [{"device": "pi-1", "version": 4}], "skipped": [{"device": "pi-2", "reason": "revoked"}]},
    )
    ended = run("release", "publish", "sign/1.0.0", "--assign", "site=north,row=2")
    assert ended.code == 0, ended.err
    assert "assigned to pi-1 (assignment 4)" in ended.out
    assert "skipped pi-2: revoked" in ended.err
    sent = msgspec.json.decode(fleet.hub.asked[-1].body)
    assert sent == {"family": "sign", "version": "1.0.0", "force": False, "labels": {"site": "north", "row": "2"}}


def test_publish_without_a_bundle(fleet: Fleet, run: Run) -> None:
    ended = run("release", "publish", "sign/1.0.0", "--assign", "all")
    assert ended.code == 2
    assert "outrider release sign sign/1.0.0" in ended.err


@pytest.mark.parametrize("name", ["MISSING/PATH.json", "/MISSING/PATH.json", "out.json", "sign/bundle.json"])
def test_publish_of_what_is_neither_a_file_nor_a_release(fleet: Fleet, run: Run, name: str) -> None:
    ended = run("release", "publish", name)
    assert ended.code == 3
    assert f"there is no file {name!r}" in ended.err
    assert "try: " in ended.err


@pytest.mark.parametrize(
    "words",
    [
        ("release", "publish", "sign/1.0.0", "--assign", "north"),
        ("model", "push", "none.onnx", "--family", "s", "--version", "1.0.0", "--golden", "g.npz", "--labels", "a,b"),
        ("login", "https://localhost:1", "--token-file", "none"),
        ("login", "https://localhost:1", "--token-file", "binary"),
    ],
)
def test_what_cannot_be_used_says_what_to_do(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    ended = run(*words)
    assert ended.code == 2
    assert "\ntry: " in ended.err
    assert "codec" not in ended.err


def test_a_rejected_model_shows_its_code_and_what_to_try(logged_in: SmallHub, run: Run) -> None:
    report = {"code": "model.admission", "reason": "the file ends early", "hint": "export it again"}
    shown = {"family": "sign", "version": "1.0.0", "state": "rejected", "report": report}
    logged_in.answers[("GET", "/v1/models/sign/1.0.0")] = (200, shown)
    out = run("model", "show", "sign/1.0.0").out
    assert "model.admission" in out
    assert "export it again" in out


def test_a_model_shows_the_patches_to_its_files(logged_in: SmallHub, run: Run) -> None:
    patch = {"path": "models/sign/1.1.0/int8.onnx", "base_version": "1.0.0", "length": 123_170, "share": 0.0743}
    shown = {"family": "sign", "version": "1.1.0", "state": "ready", "report": None, "patches": [patch]}
    logged_in.answers[("GET", "/v1/models/sign/1.1.0")] = (200, shown)
    (line,) = [line for line in run("model", "show", "sign/1.1.0").out.splitlines() if "int8.onnx" in line]
    assert line.split()[1] == "1.0.0"
    assert line.endswith("7.4%")


def test_no_device_is_not_found(fleet: Fleet, run: Run) -> None:
    fleet.hub.answers[("GET", "/v1/releases/sign/1.0.0")] = (200, {"family": "sign", "version": "1.0.0"})
    fleet.hub.answers[("POST", "/v1/assignments")] = (200, {"assigned": [], "skipped": []})
    assert run("release", "publish", "sign/1.0.0", "--device", "pi-9").code == 3


def push_files(folder: Path, **arrays: Any) -> None:
    (folder / "m.onnx").write_bytes(onnx_model())
    np.savez(folder / "g.npz", **arrays)


PUSH = ("model", "push", "m.onnx", "--family", "sign", "--version", "1.0.0", "--golden", "g.npz")


def test_push_uploads_what_is_missing_and_waits(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.ones((3, 2), np.float32), labels=np.array(["right", "left", "left"]))
    model = hashlib.sha256(onnx_model()).hexdigest()
    logged_in.answers[("HEAD", f"/v1/blobs/{model}")] = (200, b"")

    def accept(asked: Asked) -> tuple[int, Any]:
        sent = msgspec.json.decode(asked.body)
        logged_in.answers[("GET", "/v1/models/sign/1.0.0")] = (200, {**sent, "state": "ready", "report": None})
        return 202, {**sent, "state": "building"}

    logged_in.answers[("POST", "/v1/models")] = accept
    ended = run(*PUSH, "--labels", "left,right", "--input-scale", "0.5", "--param", "seed=3", "--wait", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["model"] == model
    assert ended.json["preparations"] == [{"input": "x", "scale": 0.5}]
    assert ended.json["lineage"] == {"parameters": {"seed": "3"}}
    ((digest, golden),) = logged_in.uploads.items()
    assert digest == ended.json["golden"] == hashlib.sha256(golden).hexdigest()
    assert decode_golden(golden, SIGNATURE).labels == (1, 0, 0)


def test_a_base_says_what_the_hub_may_learn_on_it(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.ones((3, 2), np.float32))
    building = {"family": "sign", "version": "1.0.0", "state": "building"}
    logged_in.answers[("POST", "/v1/models")] = (202, building)
    ended = run(*PUSH, "--labels", "a,b", "--learn", "w,b", "--max-shift", "0.5")
    assert ended.code == 0, ended.err
    sent = msgspec.json.decode(logged_in.asked[-1].body)["learning"]
    assert sent == {"variant": "fp32", "tensors": ["w", "b"], "max_shift": 0.5}
    assert run(*PUSH, "--labels", "a,b", "--learn", "w,b").code == 2


def test_what_was_learned_is_sent_with_its_bases_name(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.ones((3, 2), np.float32))
    ready = {"family": "sign", "version": "1.0.0-learned.1", "state": "ready", "report": None}
    logged_in.answers[("POST", "/v1/learned")] = (202, ready)
    ended = run("release", "learn", "sign/1.0.0", "m.onnx", "--version", "1.0.0-learned.1", "--wait")
    assert ended.code == 0, ended.err
    model = hashlib.sha256(onnx_model()).hexdigest()
    assert msgspec.json.decode(logged_in.asked[-1].body) == {
        "family": "sign",
        "base": "1.0.0",
        "version": "1.0.0-learned.1",
        "model": model,
    }


def test_a_rejected_model_ends_with_failure(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.ones((3, 2), np.float32))
    report = {"code": "model.gate", "reason": "no variant passed", "hint": "train longer"}
    rejected = {"family": "sign", "version": "1.0.0", "state": "rejected", "report": report}
    logged_in.answers[("POST", "/v1/models")] = (202, rejected)
    ended = run(*PUSH, "--labels", "a,b")
    assert ended.code == 1
    assert ended.err.endswith("no variant passed\ncode: model.gate\ntry: train longer\n")


def test_an_upload_that_is_refused_says_why(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.ones((3, 2), np.float32))
    digest = hashlib.sha256(onnx_model()).hexdigest()
    logged_in.answers[("PUT", f"/v1/blobs/{digest}")] = (403, {"detail": "not for you", "code": "auth.role"})
    ended = run(*PUSH, "--labels", "a,b")
    assert ended.code == 4
    assert "not for you" in ended.err


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"labels": np.zeros(3, np.int64)}, "no input"),
        ({"x": np.zeros((3, 2), np.float32), "labels": np.zeros(2, np.int64)}, "`labels` has shape"),
        ({"x": np.zeros((3, 2), np.float32), "labels": np.array([0, 1, 2])}, "outside -1 to 1"),
        ({"x": np.zeros((3, 2), np.float32), "labels": np.array(["a", "b", "z"])}, "'z'"),
        ({"x": np.zeros((3, 2), np.complex64)}, "complex64"),
        ({"x": np.zeros((0, 2), np.float32)}, "rows"),
        ({"x": np.zeros((3, 2), np.float32), "y": np.zeros((2, 2), np.float32)}, "differ in rows"),
    ],
)
def test_unusable_samples_say_why(run: Run, tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    push_files(tmp_path, **arrays)
    ended = run(*PUSH, "--labels", "a,b")
    assert ended.code == 2
    assert said in ended.err
    assert "code: invalid.golden\ntry: " in ended.err


def test_samples_with_objects_are_not_unpickled(run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.array([{"a": 1}], dtype=object))
    ended = run(*PUSH, "--labels", "a,b")
    assert ended.code == 2
    assert "not an .npz archive of plain arrays" in ended.err


def test_a_classifier_needs_labels(run: Run, tmp_path: Path) -> None:
    push_files(tmp_path, x=np.ones((3, 2), np.float32))
    assert run(*PUSH).code == 2
