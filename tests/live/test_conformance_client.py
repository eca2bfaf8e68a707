"""The client for the public TUF suite, as the suite starts it: a process, a repository over HTTP, files on disk.

The suite itself is no part of this repository; here is what its protocol asks, in small.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from shared.trust.library import TargetFile
from tests.conformance import client
from tests.fakes.trust_repository import DAY_MS, NOW_MS, TrustRepository, make_manifest

pytestmark = pytest.mark.live

ARTEFACT = "models/digits/1.0.0/int8.onnx"
CONTENT = b"int8 model"


class Place:
    """A repository on a port of its own, what it was asked, and the client's two folders."""

    def __init__(self, folder: Path) -> None:
        self.hub = TrustRepository()
        self.hub.release(make_manifest())
        self.targets = {f"models/digits/1.0.0/{hashlib.sha256(CONTENT).hexdigest()}.int8.onnx": CONTENT}
        self.asked: list[str] = []
        self.metadata_dir, self.target_dir = folder / "metadata", folder / "targets"
        self.metadata_dir.mkdir()
        self.target_dir.mkdir()
        (folder / "root.json").write_bytes(self.hub.first_root)
        self.root = folder / "root.json"
        self.url = ""

    def answer(self, path: str) -> bytes | None:
        """What is served at this path, which is as it came over the wire."""
        self.asked.append(path.rpartition("/")[2] if "/m/" in path else "target")
        if path.startswith("/m/"):
            return self.hub.files.get(path.removeprefix("/m/"))
        return self.targets.get(path.removeprefix("/t/"))

    def run(self, *arguments: str, now_ms: int = NOW_MS) -> int:
        """One start of the client, in this process."""
        self.asked.clear()
        return client.main(["--metadata-dir", str(self.metadata_dir), *arguments], now_ms=now_ms)

    def refresh(self, *, now_ms: int = NOW_MS) -> int:
        return self.run("--metadata-url", f"{self.url}/m", "refresh", now_ms=now_ms)

    def download(self, *names: str) -> int:
        wanted = [word for name in names for word in ("--target-name", name)]
        places = ["--target-dir", str(self.target_dir), "--target-base-url", f"{self.url}/t"]
        return self.run("--metadata-url", f"{self.url}/m", *wanted, *places, "download")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = place.answer(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        place.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert place.run("init", str(place.root)) == 0
            assert place.asked == []
            yield place
        finally:
            server.shutdown()
            thread.join()


def test_a_refresh_asks_in_order_and_keeps_the_bytes_under_plain_names(place: Place) -> None:
    assert place.refresh() == 0
    assert place.asked == ["2.root.json", "timestamp.json", "1.snapshot.json", "2.targets.json"]
    kept = {path.name: path.read_bytes() for path in place.metadata_dir.glob("*.json")}
    assert kept == {
        "root.json": place.hub.first_root,
        "timestamp.json": place.hub.files["timestamp.json"],
        "snapshot.json": place.hub.files["1.snapshot.json"],
        "targets.json": place.hub.files["2.targets.json"],
    }
    assert place.refresh() == 0
    assert place.asked == ["2.root.json", "timestamp.json"]


def test_a_download_is_verified_and_not_repeated(place: Place) -> None:
    assert place.download(ARTEFACT) == 0
    assert place.asked[-2:] == ["1.models%2Fdigits.json", "target"]
    assert [path.read_bytes() for path in place.target_dir.iterdir()] == [CONTENT]
    assert (place.metadata_dir / "models%2Fdigits.json").exists()
    assert place.download(ARTEFACT) == 0
    assert "target" not in place.asked
    (place.target_dir / quote(ARTEFACT, safe="")).write_bytes(b"bit rot")
    assert place.download(ARTEFACT) == 0
    assert place.asked[-1] == "target"


def test_targets_come_in_order_and_the_first_failure_ends_it(place: Place) -> None:
    assert place.download(ARTEFACT, "models/digits/1.0.0/none", ARTEFACT) == 1
    assert place.asked.count("target") == 1
    assert len(list(place.target_dir.iterdir())) == 1


@pytest.mark.parametrize("content", [b"int9 model", b"int8 model and more", b"int8", b""])
def test_nothing_that_is_not_the_signed_file_ever_lies_among_the_targets(place: Place, content: bytes) -> None:
    place.targets = dict.fromkeys(place.targets, content)
    assert place.download(ARTEFACT) == 1
    assert list(place.target_dir.iterdir()) == []
    assert not list(place.metadata_dir.glob("*.part"))


def test_the_moment_is_the_callers(place: Place) -> None:
    assert place.refresh(now_ms=NOW_MS + 2 * DAY_MS) == 1
    assert not (place.metadata_dir / "timestamp.json").exists()
    assert place.refresh() == 0


def test_a_repository_without_consistent_snapshots_is_read_by_plain_names(place: Place) -> None:
    hub = place.hub
    hub.root.signed.consistent_snapshot = False
    hub.root.signed.version += 1
    hub.store_root()
    for name in ("1.snapshot.json", "2.targets.json", "1.models%2Fdigits.json"):
        hub.files[name.partition(".")[2]] = hub.files.pop(name)
    place.targets = {ARTEFACT: CONTENT}
    assert place.download(ARTEFACT) == 0
    assert place.asked == [
        "2.root.json", "3.root.json", "timestamp.json", "snapshot.json", "targets.json", "models%2Fdigits.json",
        "target",
    ]  # fmt: skip


def test_endless_metadata_is_cut_off(place: Place) -> None:
    place.hub.files["timestamp.json"] += b" " * 20_000_000
    assert place.refresh() == 1


def test_names_of_targets_are_encoded_for_the_address(place: Place) -> None:
    name = "models/digits/1.0.0/größe #?.bin"
    role = place.hub.roles["models/digits"]
    role.signed.targets[name] = TargetFile.from_data(name, CONTENT, ["sha256"])
    role.signed.version += 1
    place.hub.publish()
    place.targets = {f"models/digits/1.0.0/{hashlib.sha256(CONTENT).hexdigest()}.gr%C3%B6%C3%9Fe%20%23%3F.bin": CONTENT}
    assert place.download(name) == 0
    assert [path.name for path in place.target_dir.iterdir()] == [quote(name, safe="")]


def test_the_script_starts_in_its_own_environment(place: Place, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "tuf-conformance-client"
    fresh = tmp_path / "other"
    fresh.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), "--metadata-dir", str(fresh), "init", str(place.root)],
        capture_output=True, check=False, timeout=50, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (fresh / "root.json").read_bytes() == place.hub.first_root
