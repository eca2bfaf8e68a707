"""The client under the public TUF suite: shared/trust/client.py with files for a store and plain HTTP for a transport.

    CLIENT --metadata-dir D init ROOT
    CLIENT --metadata-dir D --metadata-url U refresh
    CLIENT --metadata-dir D --metadata-url U --target-name P … --target-dir T --target-base-url V download

The protocol is CLIENT-CLI.md of theupdateframework/tuf-conformance. The store is the agent's own trust folder, the
workflow is the agent's own; only this transport and these targets are not. Status 0 is success, 1 is any failure. No
floors are kept beside the cache: the specification knows none, and lets new snapshot keys undo the versions of targets
(5.3.11), which the agent's floors do not. Targets are written aside in D and moved into T once they are verified, so
that T never holds anything else.
"""

from __future__ import annotations

import argparse
import http.client
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

from edge_agent.adapters.trust_folder import TrustFolder
from shared import limits
from shared.errors import OutriderError, TransferRefused, TrustError, Unreachable
from shared.trust.client import Client, Steps
from shared.trust.library import LengthOrHashMismatchError, TargetFile
from shared.wire.verification import Keep, Need

R = TypeVar("R")

TIMEOUT_S = 10.0
ABSENT = (403, 404)
"""Both say that there is no newer root (specification 5.3.3)."""
_URL_SAFE = "/%:@!$&'()*+,;=~"
_CHUNK = 64 * limits.KIB


class Repository:
    """A repository over HTTP. Every read is bounded by what the caller expects."""

    def __init__(self, url: str) -> None:
        self._url = url if url.endswith("/") else f"{url}/"

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """The file, cut off one byte after what may be; None when there is none. Raises TransferError."""
        data = b"".join(self.chunks(name, max_bytes=max_bytes + 1))
        return data if data else None

    def chunks(self, name: str, *, max_bytes: int) -> Iterator[bytes]:
        """The file piece by piece, at most `max_bytes`; nothing when there is none. Raises TransferError."""
        address = urlsplit(urljoin(self._url, quote(name, safe=_URL_SAFE)))
        connection = http.client.HTTPConnection(address.netloc, timeout=TIMEOUT_S)
        try:
            connection.request("GET", address.path)
            response = connection.getresponse()
            if response.status in ABSENT:
                return
            if response.status != 200:
                raise TransferRefused(f"{name}: the repository answered {response.status}")
            while max_bytes > 0 and (data := response.read(min(_CHUNK, max_bytes))):
                max_bytes -= len(data)
                yield data
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{name}: {error}") from error
        finally:
            connection.close()


class Session:
    """One start of the program: one client, one reference time."""

    def __init__(self, *, metadata_dir: Path, metadata_url: str, now_ms: int) -> None:
        self._directory = metadata_dir
        self._folder = TrustFolder(metadata_dir)
        self._metadata = Repository(metadata_url)
        self._now_ms = now_ms
        self._client = Client(root=self._folder.root(), cache=self._folder.cache(), floors={})
        self._consistent = True

    def refresh(self) -> None:
        """Bring the top-level metadata up to date; raises TrustError or TransferError."""
        self._consistent = bool(self._drive(self._client.follow_roots()).consistent_snapshot)
        self._drive(self._client.refresh(now_ms=self._now_ms))
        self._drive(self._client.load_targets())

    def download(self, path: str, *, targets: Repository, target_dir: Path) -> None:
        """Have this target in the directory, verified; what is there and holds is not fetched again."""
        found = self._drive(self._client.find(path))
        if found is None:
            raise TrustError(f"no role lists {path!r}", code="trust.unknown_target")
        target = found.target
        place = target_dir / quote(path, safe="")
        if place.exists() and _holds(place, target):
            return
        aside = self._directory / "target.part"
        try:
            self._fetch(target, targets, aside)
            shutil.move(aside, place)
        finally:
            aside.unlink(missing_ok=True)

    def _fetch(self, target: TargetFile, targets: Repository, aside: Path) -> None:
        name = target.path
        if self._consistent:
            folder, slash, last = name.rpartition("/")
            name = f"{folder}{slash}{next(iter(target.hashes.values()))}.{last}"
        with aside.open("wb") as file:
            for data in targets.chunks(name, max_bytes=target.length + 1):
                file.write(data)
        if not _holds(aside, target):
            raise TrustError(f"{target.path} is not the file that was signed", code="trust.digest")

    def _drive(self, steps: Steps[R]) -> R:
        answer: bytes | None = None
        try:
            while True:
                step = steps.send(answer)
                answer = None
                match step:
                    case Need():
                        answer = self._metadata.read(step.name, max_bytes=step.max_bytes)
                    case Keep():
                        self._folder.keep(step)
        except StopIteration as end:
            result: R = end.value
            return result


def main(arguments: list[str], *, now_ms: int) -> int:
    """Carry out one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tuf-conformance-client", description=__doc__.splitlines()[0])
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args(arguments)
    try:
        if given.command == "init":
            shutil.copyfile(given.trusted_root, given.metadata_dir / "root.json")
            return 0
        if given.metadata_url is None:
            parser.error(f"{given.command} needs --metadata-url")
        session = Session(metadata_dir=given.metadata_dir, metadata_url=given.metadata_url, now_ms=now_ms)
        session.refresh()
        if given.command == "download":
            if given.target_dir is None or given.target_base_url is None or not given.target_name:
                parser.error("download needs --target-name, --target-dir and --target-base-url")
            targets = Repository(given.target_base_url)
            for name in given.target_name:
                session.download(name, targets=targets, target_dir=given.target_dir)
    except OutriderError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"storage: {error}", file=sys.stderr)
        return 1
    return 0


def _holds(path: Path, target: TargetFile) -> bool:
    try:
        with path.open("rb") as file:
            target.verify_length_and_hashes(file)
    except LengthOrHashMismatchError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], now_ms=time.time_ns() // 1_000_000))
