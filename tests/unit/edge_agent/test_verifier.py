"""The verifier as the core sees it: a real child process, a hub in memory, and the trust directory on disk."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent.adapters.trust_folder import TrustFolder
from edge_agent.adapters.verifier import LiveVerifier, PassingShelf
from edge_agent.framing import build_frame
from shared import limits
from shared.errors import (
    OutriderError,
    StorageError,
    TransferCorrupt,
    TransferError,
    TransferRefused,
    TrustError,
    Unreachable,
)
from shared.ids import Digest
from shared.model import FileRef
from shared.release import Floors, Ground, VerifiedAssignment
from shared.wire.verification import Accepted, Judged, Keep, StoredRelease, encode
from tests.fakes.hub_fetcher import HubFetcher
from tests.fakes.trust_repository import DEVICE, NOW_MS, TrustRepository, make_manifest
from tests.unit.trust.test_learned_releases import BASE, BOUNDS, LEARNED, learned

DIGITS = ("digits", "1.0.0")
PROFILE = "x86-gateway"


@pytest.fixture
def hub() -> TrustRepository:
    hub = TrustRepository()
    hub.release(make_manifest())
    return hub


@pytest.fixture
def trust_dir(tmp_path: Path, hub: TrustRepository) -> Path:
    directory = tmp_path / "trust"
    directory.mkdir()
    (directory / "root.json").write_bytes(hub.first_root)
    return directory


def live(
    trust_dir: Path, fetcher: HubFetcher, *, deadline_ms: int = 60_000, accept_learned: bool = False
) -> LiveVerifier:
    return LiveVerifier(
        trust_dir=trust_dir,
        device=DEVICE,
        profile=PROFILE,
        fetcher=fetcher,
        deadline_ms=deadline_ms,
        accept_learned=accept_learned,
    )


def verify(verifier: LiveVerifier, document: bytes, floors: Floors | None = None) -> VerifiedAssignment:
    return asyncio.run(verifier.verify(document, floors=floors or Floors(), wall_ms=NOW_MS))


def test_a_good_assignment_is_accepted_and_kept(hub: TrustRepository, trust_dir: Path) -> None:
    fetcher = HubFetcher(hub)
    document = hub.assign(DIGITS)
    verified = verify(live(trust_dir, fetcher), document)
    assert verified.models[0].manifest == make_manifest()
    assert {path.name for path in trust_dir.iterdir()} == {
        "root.json", "timestamp.json", "snapshot.json", "targets.json", "models%2Fdigits.json", "assignment",
        "manifests",
    }  # fmt: skip
    assert (trust_dir / "assignment").read_bytes() == document
    fetcher.asked.clear()
    assert verify(live(trust_dir, fetcher), document, verified.floors) == verified
    assert fetcher.asked == ["2.root.json", "timestamp.json"]


def test_learned_releases_are_for_devices_that_opted_in_and_hold_at_the_next_start(tmp_path: Path) -> None:
    hub = TrustRepository()
    hub.release(BASE)
    hub.allow_learned()
    hub.learn(learned())
    (tmp_path / "root.json").write_bytes(hub.first_root)
    fetcher, document = HubFetcher(hub), hub.assign(LEARNED)
    with pytest.raises(TrustError) as caught:
        verify(live(tmp_path, fetcher), document)
    assert caught.value.code == "trust.learned_refused"
    willing = live(tmp_path, fetcher, accept_learned=True)
    verified = verify(willing, document)
    (model,) = verified.models
    assert model.ground == Ground(file=BASE.variants[0].file, bounds=BOUNDS)
    stored = StoredRelease(family=model.manifest.family, version=model.manifest.version, digest=model.manifest_digest)
    judged = asyncio.run(willing.judge((stored,), floors=verified.floors))
    assert judged == Judged(refused={}, undecided={})
    judged = asyncio.run(live(tmp_path, fetcher).judge((stored,), floors=verified.floors))
    assert [said.code for said in judged.refused.values()] == ["trust.learned_refused"]


def test_a_refusal_carries_code_and_hint_and_keeps_nothing_of_it(hub: TrustRepository, trust_dir: Path) -> None:
    hub.files["1.models%2Fdigits.json"] = hub.files["1.models%2Fdigits.json"].replace(b"int8", b"int9")
    with pytest.raises(TrustError) as caught:
        verify(live(trust_dir, HubFetcher(hub)), hub.assign(DIGITS))
    assert caught.value.code == "trust.mix_and_match"
    assert caught.value.hint
    assert not (trust_dir / "models%2Fdigits.json").exists()
    assert not (trust_dir / "assignment").exists()


def test_root_rotation_is_kept_and_removes_what_old_keys_signed(hub: TrustRepository, trust_dir: Path) -> None:
    fetcher = HubFetcher(hub)
    verifier = live(trust_dir, fetcher)
    verify(verifier, hub.assign(DIGITS))
    hub.rotate("root", "timestamp")
    with pytest.raises(TrustError) as caught:
        verify(verifier, hub.assign(DIGITS))
    assert caught.value.code == "trust.signature"
    assert (trust_dir / "root.json").read_bytes() == hub.files["2.root.json"]
    assert not (trust_dir / "timestamp.json").exists()
    assert not (trust_dir / "snapshot.json").exists()


def test_a_missing_file_and_a_lost_link_are_transfer_errors(hub: TrustRepository, trust_dir: Path) -> None:
    fetcher = HubFetcher(hub)
    timestamp = hub.files.pop("timestamp.json")
    with pytest.raises(TransferRefused) as refused:
        verify(live(trust_dir, fetcher), hub.assign(DIGITS))
    assert refused.value.code == "transfer.missing"
    hub.files["timestamp.json"] = timestamp
    fetcher.error = Unreachable("nobody answers")
    with pytest.raises(Unreachable):
        verify(live(trust_dir, fetcher), hub.assign(DIGITS))


def test_endless_answers_are_named_as_what_they_are(hub: TrustRepository, trust_dir: Path) -> None:
    hub.files["timestamp.json"] += b" " * limits.MAX_TIMESTAMP_BYTES
    with pytest.raises(TrustError) as caught:
        verify(live(trust_dir, HubFetcher(hub)), hub.assign(DIGITS))
    assert caught.value.code == "trust.endless_data"
    with pytest.raises(TrustError) as caught:
        verify(live(trust_dir, HubFetcher(hub)), b" " * (limits.MAX_ASSIGNMENT_BYTES + 1))
    assert caught.value.code == "trust.endless_data"


def test_the_deadline_ends_everything(hub: TrustRepository, trust_dir: Path) -> None:
    fetcher = HubFetcher(hub)
    fetcher.stalls = True
    with pytest.raises(TransferError) as caught:
        verify(live(trust_dir, fetcher, deadline_ms=1500), hub.assign(DIGITS))
    assert caught.value.code == "transfer.deadline"
    assert caught.value.retry


def test_verifications_take_turns(hub: TrustRepository, trust_dir: Path) -> None:
    hub.release(make_manifest("1.1.0", counter=2))
    verifier = live(trust_dir, HubFetcher(hub))
    documents = [hub.assign(DIGITS, version=5), hub.assign(("digits", "1.1.0"), version=6)]

    async def both() -> list[VerifiedAssignment]:
        runs = (verifier.verify(document, floors=Floors(), wall_ms=NOW_MS) for document in documents)
        return list(await asyncio.gather(*runs))

    assert [verified.assignment.version for verified in asyncio.run(both())] == [5, 6]


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-c", "import sys; sys.exit(3)"),
        (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        (sys.executable, "-c", "import os; os.write(0, b'GET / HTTP/1.1' * 9); import time; time.sleep(60)"),
    ],
    ids=["exits", "killed", "talks nonsense"],
)
def test_a_lost_verifier_is_a_refusal(hub: TrustRepository, trust_dir: Path, command: tuple[str, ...]) -> None:
    verifier = LiveVerifier(
        trust_dir=trust_dir, device=DEVICE, profile=PROFILE, fetcher=HubFetcher(hub), command=command
    )
    with pytest.raises(TrustError) as caught:
        verify(verifier, hub.assign(DIGITS))
    assert caught.value.code == "trust.verifier_lost"


def test_a_verifier_that_cannot_be_started_is_no_word_on_the_assignment(hub: TrustRepository, trust_dir: Path) -> None:
    verifier = LiveVerifier(
        trust_dir=trust_dir, device=DEVICE, profile=PROFILE, fetcher=HubFetcher(hub), command=("/nonexistent/python",)
    )
    with pytest.raises(OutriderError) as caught:
        verify(verifier, hub.assign(DIGITS))
    assert not isinstance(caught.value, TrustError)
    assert caught.value.code == "verifier.start"


def test_without_a_root_there_is_no_verification(hub: TrustRepository, tmp_path: Path) -> None:
    with pytest.raises(TrustError) as caught:
        verify(live(tmp_path / "trust", HubFetcher(hub)), hub.assign(DIGITS))
    assert caught.value.code == "trust.no_root"
    assert "enroll" in caught.value.hint


def test_the_child_ends_when_its_parent_is_gone() -> None:
    """Asked to serve a parent that is not its own, as after the parent's death, it exits at once."""
    command = [sys.executable, "-I", "-m", "edge_agent.verifier", str(os.getpid() + 1)]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=30).returncode == 1


def test_a_job_that_does_not_parse_ends_the_child(hub: TrustRepository) -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-I", "-m", "edge_agent.verifier", str(os.getpid())]
        child = subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.PIPE)
        theirs.close()
        ours.sendall(b"\xf1\x01\0\0" + b"\0\0\0\0" + b"\0\0\0\x03" + b"xyz")
        _, stderr = child.communicate(timeout=30)
        assert child.returncode == 1
        assert b"Traceback" not in stderr
        assert b"verifier: protocol" in stderr


WATCH = """
import asyncio, json, sys
from pathlib import Path
from edge_agent.framing import build_frame
from edge_agent.adapters.verifier import LiveVerifier
from shared.errors import TrustError
from shared.release import Floors

class Fetcher:
    async def metadata(self, name, *, max_bytes):
        path = Path(sys.argv[2]) / name
        return path.read_bytes() if path.exists() else None
    async def blob(self, file, shelf):
        shelf.append(file.digest, (Path(sys.argv[2]) / file.digest).read_bytes(), offset=0)

verifier = LiveVerifier(trust_dir=Path(sys.argv[1]), device="dev-1", profile="pi4", fetcher=Fetcher())
document = (Path(sys.argv[2]) / "document").read_bytes()
verified = asyncio.run(verifier.verify(document, floors=Floors(), wall_ms=int(sys.argv[3])))
heavy = [name for name in sys.modules if name.split(".")[0] in
         ("tuf", "securesystemslib", "cryptography", "numpy", "urllib3") or name.startswith("shared.trust")]
print(json.dumps({"version": verified.assignment.version, "heavy": heavy}))
"""


def test_the_core_loads_neither_tuf_nor_cryptography(hub: TrustRepository, trust_dir: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    for name, data in hub.files.items():
        (served / name if "/" not in name else served / "manifest").write_bytes(data)
    document = hub.assign(DIGITS)
    digest = json.loads(document)["signed"]["models"][0]["digest"]
    (served / "manifest").rename(served / digest)
    (served / "document").write_bytes(document)
    done = subprocess.run(
        [sys.executable, "-I", "-c", WATCH, str(trust_dir), str(served), str(NOW_MS)],
        capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"version": 1, "heavy": []}


# What is installed, looked at by the child when the device starts


def stored(verified: VerifiedAssignment) -> tuple[StoredRelease, ...]:
    return tuple(
        StoredRelease(family=m.manifest.family, version=m.manifest.version, digest=m.manifest_digest)
        for m in verified.models
    )


def judge(verifier: LiveVerifier, verified: VerifiedAssignment) -> Judged:
    return asyncio.run(verifier.judge(stored(verified), floors=verified.floors))


def test_what_is_installed_is_judged_without_the_hub(hub: TrustRepository, trust_dir: Path) -> None:
    fetcher = HubFetcher(hub)
    verifier = live(trust_dir, fetcher)
    verified = verify(verifier, hub.assign(DIGITS))
    fetcher.asked.clear()
    fetcher.stalls = True
    assert judge(verifier, verified) == Judged(refused={}, undecided={})
    (digest,) = (release.digest for release in stored(verified))
    (trust_dir / "snapshot.json").write_bytes(b"")
    assert judge(verifier, verified).undecided[digest].code == "transfer.not_stored"
    hub.rotate("targets")
    (trust_dir / "root.json").write_bytes(hub.files["2.root.json"])
    assert judge(verifier, verified).undecided[digest].code == "transfer.not_stored", "no refresh has followed it"
    floors = replace(verified.floors, roles={**verified.floors.roles, "root": 2})
    assert judge(verifier, replace(verified, floors=floors)).refused[digest].code == "trust.signature"
    assert fetcher.asked == []


def test_a_damaged_manifest_is_refused_at_the_start_and_fetched_anew(hub: TrustRepository, trust_dir: Path) -> None:
    fetcher = HubFetcher(hub)
    verifier = live(trust_dir, fetcher)
    document = hub.assign(DIGITS)
    verified = verify(verifier, document)
    (path,) = (trust_dir / "manifests").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b" ")
    assert judge(verifier, verified).refused[stored(verified)[0].digest].code == "trust.digest"
    fetcher.asked.clear()
    verify(verifier, document, verified.floors)
    assert fetcher.asked[-1] == "models/digits/1.0.0/manifest.json"
    assert path.read_bytes() == good


def test_manifests_are_kept_while_something_names_them(hub: TrustRepository, trust_dir: Path) -> None:
    folder = TrustFolder(trust_dir)
    digests = [Digest(f"{number:064x}") for number in range(40)]
    for number, digest in enumerate(digests):
        folder.keep_manifest(digest, b"{}")
        os.utime(trust_dir / "manifests" / digest, ns=(number, number))
    verifier = live(trust_dir, HubFetcher(hub))
    verified = verify(verifier, hub.assign(DIGITS))
    assigned = stored(verified)[0].digest
    left = {path.name for path in (trust_dir / "manifests").iterdir()}
    assert left == {assigned, *digests[8:]}, "the newest that the assignment does not name, in case a slot does"
    judge(verifier, verified)
    assert [path.name for path in (trust_dir / "manifests").iterdir()] == [assigned]


@pytest.mark.parametrize("command", ["exits", "accepts"])
def test_a_lost_judge_says_nothing_of_any_release(hub: TrustRepository, trust_dir: Path, command: str) -> None:
    verified = verify(live(trust_dir, HubFetcher(hub)), hub.assign(DIGITS))
    says = f"import os; os.write(0, {_framed(encode(Accepted(verified=verified)))!r}); import time; time.sleep(60)"
    code = says if command == "accepts" else "import sys; sys.exit(3)"
    verifier = LiveVerifier(
        trust_dir=trust_dir,
        device=DEVICE,
        profile=PROFILE,
        fetcher=HubFetcher(hub),
        command=(sys.executable, "-c", code),
    )
    with pytest.raises(TrustError) as caught:
        judge(verifier, verified)
    assert caught.value.code == "trust.verifier_lost"


def _framed(payload: bytes) -> bytes:
    return b"".join(bytes(part) for part in build_frame(b"", [payload]))


@pytest.mark.parametrize("code", ["transfer.stalled", "transfer.deadline"])
def test_slow_retrieval_keeps_its_name(hub: TrustRepository, trust_dir: Path, code: str) -> None:
    fetcher = HubFetcher(hub)
    fetcher.error = Unreachable("3 bytes in 15 s", code=code)
    with pytest.raises(Unreachable) as caught:
        verify(live(trust_dir, fetcher), hub.assign(DIGITS))
    assert caught.value.code == code
    assert not (trust_dir / "assignment").exists()


def test_the_folder_survives_what_it_finds(trust_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = TrustFolder(trust_dir)
    (trust_dir / "huge.json").write_bytes(b" " * (limits.MAX_TARGETS_BYTES + 1))
    (trust_dir / "directory.json").mkdir()
    (trust_dir / "link.json").symlink_to("/etc/passwd")
    folder.keep(Keep(role="../../escape", data=b"x"))
    assert folder.cache() == {"../../escape": b"x"}
    assert folder.previous() is None
    assert not (trust_dir.parent.parent / "escape.json").exists()
    folder.keep(Keep(role="directory", data=b"x"))
    assert "could not be kept" in caplog.text
    (trust_dir / "assignment").mkdir()
    folder.keep_assignment(b"x")


def test_the_passing_shelf_holds_no_more_than_promised() -> None:
    file = FileRef(path="models/digits/1.0.0/manifest.json", length=4, digest=make_manifest().golden.file.digest)
    shelf = PassingShelf(file)
    assert not shelf.has(file.digest)
    shelf.append(file.digest, b"abcd", offset=0)
    shelf.append(file.digest, b"xy", offset=1)
    assert shelf.taken() == b"axy"
    assert shelf.resume_at(file.digest) == 3
    with pytest.raises(TransferCorrupt):
        shelf.append(file.digest, b"xy", offset=3)
    with pytest.raises(StorageError):
        shelf.open(file)
    assert shelf.collect(frozenset()) == 3
