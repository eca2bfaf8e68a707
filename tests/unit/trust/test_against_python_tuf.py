"""python-tuf's own client as an oracle: it accepts what our publishing side makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from tests.fakes.trust_repository import TrustRepository, make_manifest

BASE = "https://hub/metadata/"


class Memory(FetcherInterface):
    """Serves the repository's files."""

    def __init__(self, hub: TrustRepository) -> None:
        self.hub = hub

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self.hub.files.get(url.removeprefix(BASE))
        if data is None:
            raise DownloadHTTPError("missing", 404)
        yield data


def updater(hub: TrustRepository, directory: Path) -> Updater:
    directory.mkdir(exist_ok=True)
    return Updater(str(directory), BASE, str(directory), BASE, fetcher=Memory(hub), bootstrap=hub.first_root)


def test_it_finds_every_file_of_every_release(tmp_path: Path) -> None:
    hub = TrustRepository(now_ms=int(time.time() * 1000), targets_threshold=2)
    manifests = [make_manifest(), make_manifest("1.1.0", counter=2), make_manifest(family="letters")]
    for manifest in manifests:
        hub.release(manifest)
    hub.rotate("root", "timestamp", "snapshot", "targets", "assignment")
    hub.publish()
    client = updater(hub, tmp_path / "client")
    client.refresh()
    for manifest in manifests:
        for file in (manifest.golden.file, manifest.variants[0].file):
            found = client.get_targetinfo(file.path)
            assert found is not None
            assert (found.length, found.hashes) == (file.length, {"sha256": file.digest})
    assert client.get_targetinfo("models/cats/1.0.0/manifest.json") is None


def test_it_refuses_what_was_changed_afterwards(tmp_path: Path) -> None:
    hub = TrustRepository(now_ms=int(time.time() * 1000))
    hub.release(make_manifest())
    hub.files["1.snapshot.json"] = hub.files["1.snapshot.json"].replace(b"sha256", b"sha512")
    with pytest.raises(RepositoryError):
        updater(hub, tmp_path / "client").refresh()
