"""docs/keys.md by its word: the commands of the three-person case on a hub of this test, and what they refuse."""

from __future__ import annotations

import asyncio
import re
import shlex
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI

from cloud_hub.__main__ import main as hub_main
from cloud_hub.composition.signing import online_keys
from cloud_hub.ground import audit, problems
from cloud_hub.ground.auth import Gate, Role, issue_api_token
from cloud_hub.ground.bus import Bus
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.post import Post
from cloud_hub.ground.problems import NotAllowed
from cloud_hub.ground.system import SystemClock
from cloud_hub.keyring import Keyring
from cloud_hub.releases import routes, tables
from cloud_hub.releases.desk import Desk, Push, ReleaseSettings, Selector
from cloud_hub.releases.rules import BuildReport
from cloud_hub.releases.rules import Gate as QualityGate
from shared.errors import TrustError
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.model import (
    FileRef,
    Golden,
    Manifest,
    Signature,
    TensorSpec,
    Variant,
    encode_manifest,
    manifest_path,
    target_path,
)
from shared.trust import repository
from shared.trust.assignment import sign_assignment
from shared.trust.authority import family_keys
from shared.wire.golden import GoldenSet, GoldenTensor, encode_golden
from shared.wire.verification import Need
from tests.fakes.release_room import FakeFleet, Outgoing
from tests.fakes.small_hub import Asked, SmallHub
from tests.fakes.trust_repository import Device
from tests.unit.cli.conftest import Run
from tests.unit.cli.test_cli_release import onnx_model

PAGE = Path(__file__).resolve().parents[3] / "docs" / "keys.md"
DIGITS, FIRST = FamilyName("digits"), ModelVersion("1.0.0")


def page(start: str, end: str) -> list[str]:
    """The commands of a part of the page, in order."""
    text = PAGE.read_text()
    part = text[text.index(start) : text.index(end)]
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    return [line.split("  #")[0].strip() for line in lines]


class Served:
    """The hub's folder, opened as `serve` opens it, behind the small HTTPS server that `outrider` talks to."""

    def __init__(self, data: Path) -> None:
        self.database = Database(f"sqlite:///{data / 'hub.db'}")
        self.fleet, self.outgoing = FakeFleet({}), Outgoing([])
        self.fleet.add("one")
        clock = SystemClock()
        self.desk = Desk(
            data=data, database=self.database, clock=clock, metrics=Metrics(), keys=online_keys(data / "keys"),
            fleet=self.fleet, post=Post(publish=self.outgoing.publish, clock=clock), bus=Bus(),
            settings=ReleaseSettings(),
        )  # fmt: skip
        self.desk.open()
        self.app = FastAPI()
        problems.install(self.app)
        self.app.include_router(routes.router(self.desk))

        async def nobody(_der: bytes) -> DeviceId:
            raise NotAllowed("no devices here")

        self.app.state.gate = Gate(database=self.database, clock=clock, device_of=nobody)
        self.tokens = {
            role: self.database.write_now(
                lambda conn, role=role: issue_api_token(  # type: ignore[misc]
                    conn, name=role.value, role=role, at_ms=clock.wall_ms(), ttl_ms=None, actor="test"
                )
            ).text
            for role in (Role.RELEASE_MANAGER, Role.ADMIN)
        }
        self.role = Role.RELEASE_MANAGER

    def get(self, _key: tuple[str, str], default: Any = None) -> Any:
        """In place of SmallHub's written answers: ask the application."""
        return default if _key[1] in ("/v1/ca", "/v1/whoami") else self.answer

    def answer(self, asked: Asked) -> tuple[int, bytes]:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
                headers = {"authorization": f"Bearer {self.tokens[self.role]}", "content-type": "application/json"}
                return await client.request(asked.method, asked.path, headers=headers, content=asked.body)

        answer = asyncio.run(call())
        return answer.status_code, answer.content

    def make_ready(self, version: ModelVersion, *, counter: int) -> None:
        """A model that was pushed and built: two scores that are the two inputs."""
        model = onnx_model()
        rows = np.array([[2, 1], [1, 5]], dtype="<f4")
        tensor = GoldenTensor(name="x", dtype="fp32", shape=(2, 2), data=rows.tobytes())
        golden = encode_golden(GoldenSet(samples=2, labels=(0, 1), inputs=(tensor,)))

        def file(name: str, data: bytes) -> FileRef:
            return FileRef(
                path=target_path(DIGITS, version, name), length=len(data), digest=self.desk.blobs.put(data).digest
            )

        manifest = Manifest(
            family=DIGITS, version=version, release_counter=counter, min_release_counter=0, task="classification",
            signature=Signature(
                inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 2)),),
                outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1, 2)),),
            ),
            preparations=(), labels=("left", "right"),
            golden=Golden(file=file("golden.bin", golden), samples=2, min_agreement=1.0),
            variants=(
                Variant(name="fp32", runtime="onnx", file=file("fp32.onnx", model), accuracy=1.0, answers=(0, 1)),
            ),
        )  # fmt: skip
        blob = self.desk.blobs.put(encode_manifest(manifest))
        files = (
            FileRef(path=manifest_path(DIGITS, version), length=blob.length, digest=blob.digest),
            manifest.golden.file, manifest.variants[0].file,
        )  # fmt: skip
        push = Push(
            family=DIGITS, version=version, model=manifest.variants[0].file.digest, golden=manifest.golden.file.digest,
            labels=manifest.labels, preparations=(), gate=QualityGate(),
        )  # fmt: skip

        def work(conn: Any) -> None:
            tables.begin_build(conn, push, build=1, at_ms=1, actor="test")
            row = tables.find_model(conn, DIGITS, version)
            assert row is not None
            tables.finish_build(
                conn, row, state="ready", report=BuildReport(), at_ms=2, counters=(counter, 0), files=files
            )

        self.database.write_now(work)

    def serve(self, need: Need) -> bytes | None:
        """What the hub answers a device."""
        if need.file is not None:
            return self.desk.blobs.read(need.file.digest, max_bytes=need.max_bytes)
        try:
            return asyncio.run(self.desk.publishing.metadata(need.name))
        except problems.NotFound:
            return None

    def assign(self) -> bytes:
        asyncio.run(self.desk.assigning.assign(Selector(family=DIGITS, version=FIRST, all=True), actor="test"))
        return self.outgoing.documents()[-1][1]

    def actions(self) -> list[str]:
        return [row.action for row in self.database.read_now(lambda conn: audit.entries(conn, after=0, limit=100))]


@dataclass(slots=True)
class Place:
    """The folder in which everybody's directories lie, and the programs run in it."""

    folder: Path
    run: Run
    capsys: pytest.CaptureFixture[str]

    def hub(self, *words: str) -> tuple[int, str]:
        """Run `outrider-hub`; exit code and everything it said."""
        self.capsys.readouterr()
        code = int(hub_main(words))
        said = self.capsys.readouterr()
        return code, said.out + said.err

    def line(self, line: str, **known: str) -> tuple[int, str]:
        """Run a line of the page; words in capitals are replaced by what is known."""
        for name, value in known.items():
            line = line.replace(name.replace("_", "-"), value)
        program, *words = [found for word in shlex.split(line) for found in (_expand(word) or [word])]
        if program == "outrider-hub":
            return self.hub(*words)
        if program == "outrider":
            ended = self.run(*words)
            return ended.code, ended.out + ended.err
        assert program in {"cp", "mkdir"}, line
        subprocess.run([program, *words], check=True)
        return 0, ""

    def lines(self, lines: list[str], **known: str) -> None:
        for line in lines:
            code, said = self.line(line, **known)
            assert code == 0, (line, said)


def _expand(word: str) -> list[str]:
    return sorted(str(path) for path in Path().glob(word)) if "*" in word else []


@pytest.fixture
def place(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, run, capsys)


@pytest.fixture
def served(place: Place, logged_in: SmallHub) -> Iterator[Served]:
    """The page's hub of three people, up to where the family has its keys."""
    place.lines(page("## Three people", "A release is signed the same way"))
    served = Served(place.folder / "hub")
    known = dict(logged_in.answers)
    logged_in.answers = served  # type: ignore[assignment]
    assert known
    with closing(served.database):
        yield served


def keyid(folder: str, name: str) -> str:
    return Keyring(Path(folder)).public(name).keyid


def test_three_people_found_a_hub_release_and_change_their_keys(place: Place, served: Served) -> None:
    served.make_ready(FIRST, counter=1)
    device = Device(asyncio.run(served.desk.root()).encode(), name=DeviceId("one"))
    sign_ann, export, sign_bob, publish = page("A release is signed the same way", "Before Bob has signed")
    place.lines([sign_ann])
    code, said = place.line(publish)
    assert code == 9, said
    assert keyid("bob", "release")[:12] in said
    assert keyid("ann", "release")[:12] not in said
    place.lines([export, sign_bob, publish])
    document = served.assign()
    device.verify(document, served.serve, wall_ms=SystemClock().wall_ms(), time_attested=True)
    old = {name: keyid("ann", name) for name in ("root", "targets", "release")}
    stolen = Keyring(place.folder / "hub" / "keys").signer("assignment")
    place.lines(
        page("**A hub was copied", "**A root key is lost"),
        ANN_ROOT=old["root"][:12], ANN_TARGETS=old["targets"][:12], ANN_RELEASE=old["release"][:12],
    )  # fmt: skip
    now_ms = SystemClock().wall_ms()
    verified = device.verify(_resigned(served), served.serve, wall_ms=now_ms, time_attested=True)
    assert [model.manifest.version for model in verified.models] == [FIRST]
    assert verified.floors.roles["root"] == 3
    assignment = msgspec.structs.replace(verified.assignment, version=verified.assignment.version + 1)
    with pytest.raises(TrustError) as caught:
        device.verify(sign_assignment(assignment, stolen), served.serve, wall_ms=now_ms, time_attested=True)
    assert caught.value.code == "trust.signature"
    assert served.actions().count("keys.changed") == 4
    keys = [
        path for folder in ("ann", "ann-new", "bob", "cid", "online", "hub/keys") for path in Path(folder).glob("*.key")
    ]
    assert len(keys) == 3 + 3 + 3 + 1 + 4 + 8
    for path in keys:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list((place.folder / "hub").rglob("root*.key"))


def _resigned(served: Served) -> bytes:
    """What the hub sends by itself once it has looked: the assignment, signed with the new key."""
    asyncio.run(served.desk.assigning.look())
    return served.outgoing.documents()[-1][1]


def release_by_both(place: Place, served: Served) -> None:
    served.make_ready(FIRST, counter=1)
    place.lines(page("A release is signed the same way", "Before Bob has signed"))


def sign(place: Place, who: str, *more: str, version: str = "1.0.0") -> tuple[int, str]:
    return place.line(f"outrider release sign digits/{version} --keys {who} --yes {' '.join(more)}")


BUNDLE = "digits-1.0.0.release.json"


def test_a_second_signer_signs_only_what_this_machine_would_sign(place: Place, served: Served) -> None:
    served.make_ready(FIRST, counter=1)
    assert sign(place, "ann")[0] == 0
    honest = Path(BUNDLE).read_bytes()
    bundle = msgspec.json.decode(honest)
    manifest = "models/digits/1.0.0/manifest.json"
    for field, value in (
        ("expires", "2099-01-01T00:00:00Z"),
        ("version", 2),
        (manifest, {"length": 1, "hashes": {"sha256": "00" * 32}}),
        ("models/digits/1.0.0/more.onnx", {"length": 1, "hashes": {"sha256": "00" * 32}}),
    ):
        role = msgspec.json.decode(bundle["role"])
        (role["signed"]["targets"] if "/" in field else role["signed"])[field] = value
        changed = msgspec.json.encode({**bundle, "role": msgspec.json.encode(role).decode()})
        Path(BUNDLE).write_bytes(changed)
        code, said = sign(place, "bob", "--bundle", BUNDLE)
        assert (code, "code: trust.bundle" in said) == (9, True), said
        assert Path(BUNDLE).read_bytes() == changed, "nothing was signed"
    Path(BUNDLE).write_bytes(honest)
    code, said = sign(place, "ann", "--bundle", BUNDLE)
    assert code == 6, said
    assert "no key here can add a signature" in said
    assert keyid("bob", "release")[:12] in said
    assert sign(place, "bob", "--bundle", BUNDLE)[0] == 0
    assert place.line(f"outrider release publish {BUNDLE}")[0] == 0


def test_a_carried_file_that_was_changed_is_not_signed(place: Place, served: Served) -> None:
    served.make_ready(FIRST, counter=1)
    place.lines(["outrider release show digits/1.0.0 --export stick/digits"])
    blob = next(iter(Path("stick/digits/blobs").iterdir()))
    whole = blob.read_bytes()
    for data in (whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"x", whole[:-1]):
        blob.write_bytes(data)
        code, said = sign(place, "bob", "--from", "stick/digits")
        assert (code, "code: transfer.corrupt" in said) == (9, True), said
    blob.unlink()
    assert sign(place, "bob", "--from", "stick/digits")[0] == 1
    assert sign(place, "bob", "--from", "nowhere")[0] == 2
    assert not Path(BUNDLE).exists()
    assert place.line("outrider release show digits/1.0.0 --export stick/digits")[0] == 6


def test_a_machine_that_knows_the_root_builds_on_no_strangers_release(place: Place, served: Served) -> None:
    """The next release builds on one that Cid has not signed; the root beside the keys says whose signatures do."""
    release_by_both(place, served)
    served.make_ready(ModelVersion("1.1.0"), counter=2)
    place.lines(
        [
            "outrider-hub keys init --out dan --role release",
            "outrider-hub keys rotate models/digits --data hub --draft dan.json --add dan/release-*.pub.json",
            "outrider-hub keys sign dan.json --keys ann --yes",
            "outrider-hub keys sign dan.json --keys bob --yes",
            "outrider-hub keys publish dan.json --data hub",
        ]
    )
    code, said = sign(place, "dan", version="1.1.0")
    assert (code, "trusted-root.json" in said) == (9, True), said
    place.lines(["cp ann/trusted-root.json dan"])
    known = Path("dan/trusted-root.json").read_bytes()
    assert sign(place, "dan", version="1.1.0")[0] == 0
    Path("digits-1.1.0.release.json").unlink()
    # A hub that was broken into shows a root of its own making, under which its own release holds.
    place.lines(["outrider-hub init --data other --offline other-keys"])
    with closing(Database("sqlite:///other/hub.db")) as database:
        rows = database.read_now(tables.newest_metadata)
    Path("dan/trusted-root.json").write_bytes(rows["root"].document)
    code, said = sign(place, "dan", version="1.1.0")
    assert (code, "code: trust.root" in said) == (9, True), said
    Path("dan/trusted-root.json").write_bytes(known)


def test_a_change_of_keys_goes_over_the_link_by_an_admin_only(place: Place, served: Served) -> None:
    place.lines(page("**A hub was copied", "**Ann's laptop")[:-2])
    publish = "outrider release publish online-2.json"
    code, said = place.line(publish)
    assert (code, "code: trust.threshold" in said) == (9, True), said
    place.lines(["outrider-hub keys sign online-2.json --keys cid --yes"])
    assert place.line(publish)[0] == 4
    served.role = Role.ADMIN
    code, said = place.line(publish)
    assert (code, "published root 2" in said) == (0, True), said
    assert place.line(publish)[0] == 0
    assert place.line("outrider-hub keys publish online-2.json --data hub")[1].startswith("was published before")
    assert place.line(f"{publish} --assign all")[0] == 2


def test_people_let_the_hub_sign_what_it_learns_and_end_that(place: Place, served: Served) -> None:
    lines = page("## Letting the hub sign", "From their next refresh")
    end = next(number for number, line in enumerate(lines) if "--withdraw" in line)

    def learned() -> tuple[list[str], bool]:
        rows = served.database.read_now(tables.newest_metadata)
        held = family_keys(repository.read_targets(rows["targets"].document).signed, "learned/digits")
        keyids = [] if held is None else [key.keyid for key in held.keys]
        return keyids, "learned/digits" in rows

    assert learned() == ([], False)
    place.lines(lines[: end - 2])
    code, said = place.line("outrider-hub keys show learn.json")
    assert (code, "learned/digits: 1 of 1, the hub's own" in said, "NEW" in said) == (0, True, True), said
    place.lines(lines[end - 2 : end])
    ((keyid,), is_served) = learned()
    assert is_served, "devices must find it in the snapshot from now on"
    online = online_keys(place.folder / "hub" / "keys")
    root = served.database.read_now(tables.newest_metadata)["root"].document
    signer = online(root).learned
    assert signer is not None
    assert signer(DIGITS, [keyid]).public_key.keyid == keyid
    (file,) = (place.folder / "hub" / "keys").glob("learned-digits-*.key")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    place.lines(lines[end : end + 1])
    code, said = place.line("outrider-hub keys show end.json")
    assert (code, "learned/digits: WITHDRAWN" in said) == (0, True), said
    place.lines(lines[end + 1 :])
    assert learned() == ([], True)


def test_a_draft_of_strangers_is_not_signed(place: Place, served: Served) -> None:
    assert served.actions()
    place.lines(
        [
            "outrider-hub init --data other --offline other-keys",
            "outrider-hub keys rotate root --data other --draft evil.json --add ann/root-*.pub.json",
        ]
    )
    before = Path("evil.json").read_bytes()
    code, said = place.line("outrider-hub keys sign evil.json --keys ann --yes")
    assert (code, "code: trust.root" in said) == (9, True), said
    first = place.folder / "first.json"
    place.lines(["outrider-hub keys init --draft first.json --public stick"])
    assert place.line("outrider-hub keys sign first.json --keys ann --yes")[0] == 9, "another threshold, another root"
    assert Path("evil.json").read_bytes() == before
    assert '"sig"' not in first.read_text()


WRONG: Final = (
    ("keys init --out new", 2, "--role"),
    ("keys init --out new --draft x.json --role root", 2, "not allowed"),
    ("keys init --draft x.json", 2, "--public"),
    ("keys init --draft x.json --public ann", 2, "snapshot"),
    ("keys init --draft x.json --public stick --threshold root=9", 2, "root needs 9"),
    ("keys init --draft x.json --public stick --threshold root", 2, "ROLE=N"),
    ("keys init --draft root-1.json --public stick", 6, "exists"),
    ("keys rotate root --data hub --draft again.json", 0, "missing: root 2 needs 2 more"),
    ("keys sign again.json --keys cid", 2, "--yes"),
    ("keys sign again.json --keys cid --yes", 0, "signs root"),
    ("keys sign again.json --keys online --yes", 9, "trusted-root.json"),
    ("keys sign digits.json --keys cid --yes", 6, "nothing in"),
    ("keys sign digits.json --keys stick --yes", 78, "no key"),
    ("keys sign nothing.json --keys ann --yes", 2, "cannot be read"),
    ("keys show ann/trusted-root.json", 2, "not the draft"),
    ("keys rotate models/../x --data hub --draft x.json", 2, "family"),
    ("keys rotate nobody --data hub --draft x.json", 2, "no role"),
    ("keys rotate root --data hub --draft x.json --threshold root=4", 2, "root needs 4"),
    ("keys rotate root --data hub --draft x.json --threshold targets=1", 2, "name that role"),
    ("keys rotate root --data hub --draft x.json --remove 0123456789ab", 2, "fits 0 keys"),
    ("keys rotate root --data hub --draft x.json --add ann/release-*.pub.json", 2, "made for release"),
    ("keys rotate snapshot --data hub --draft digits.json", 6, "exists"),
    ("keys rotate models/cats --data hub --draft x.json", 2, "no release yet"),
    ("keys rotate learned/cats --data hub --draft x.json", 2, "list no models/cats"),
    ("keys rotate learned/digits --withdraw --data hub --draft x.json", 2, "nothing to withdraw"),
    ("keys rotate learned/digits root --withdraw --data hub --draft x.json", 2, "learned/FAMILY alone"),
    ("keys rotate root --withdraw --data hub --draft x.json", 2, "learned/FAMILY alone"),
    ("keys publish root-1.json --data hub", 0, "was published before"),
    ("init --data second --root digits.json --online online", 2, "changes a hub"),
    ("init --data second --root root-1.json", 2, "go together"),
    ("init --data second --root root-1.json --online ann", 78, "no snapshot key"),
)
"""Command, exit code, and a part of what is said; on the hub of the page, one after another."""


def test_what_is_wrong_is_said_and_leaves_nothing(place: Place, served: Served) -> None:
    assert served.actions()
    for line, code, said in WRONG:
        words = [found for word in line.split() for found in (_expand(word) or [word])]
        try:
            ended, text = place.hub(*words)
        except SystemExit as usage:
            ended, text = int(usage.code or 0), place.capsys.readouterr().err
        assert (ended, said in text) == (code, True), (line, text)
        assert not Path("x.json").exists(), line
        assert not Path("second").exists(), line
        assert "PRIVATE" not in text
