"""Where a release that shall be signed comes from: the hub over HTTPS, or a folder that somebody carried here.

    proposal.json       what the hub asks to have signed, with every root
    blobs/<sha256>      each file of the release but the manifest, which is in the proposal

Neither is believed: files are hashed here, whoever brought them. Not here: what is looked at (inspection.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub import files
from cloud_hub.cli.hub import Hub
from cloud_hub.cli.inspection import Proposal
from shared.errors import Conflict, InvalidValue, StorageError, TransferCorrupt
from shared.ids import FamilyName, ModelVersion
from shared.model import manifest_path
from shared.trust import ceremony

PROPOSAL: Final = "proposal.json"
BLOBS: Final = "blobs"
MAX_PROPOSAL_BYTES: Final = 64 * 1024 * 1024
MAX_ROOTS: Final = 1024
MAX_KNOWN: Final = 2**53
"""As a known root's version: no roots are fetched, because nothing here could follow them."""


class HubOrigin:
    """The hub.

    Args:
        hub: logged in to.
        known_root: the version of the root that this machine followed last; the ones after it are fetched.
    """

    def __init__(self, hub: Hub, *, known_root: int) -> None:
        self._hub = hub
        self._known_root = known_root

    def proposal(self, family: FamilyName, version: ModelVersion) -> Proposal:
        """The hub's proposal, with the roots between the known one and the newest."""
        found = self._hub.get(f"/v1/releases/{family}/{version}/proposal", Proposal)
        newest = ceremony.read_draft_root(found.root.encode()).signed.version
        first = self._known_root + 1
        if newest - first > MAX_ROOTS:
            raise InvalidValue(f"there are {newest - first} roots to follow", code="invalid.root", hint="do not sign")
        roots = tuple(
            self._hub.raw(f"/v1/metadata/{number}.root.json").decode(errors="replace")
            for number in range(first, newest)
        )
        return msgspec.structs.replace(found, roots=roots)

    def blob(self, digest: str, *, length: int, title: str = "") -> bytes:
        """A file, hashed."""
        return self._hub.blob(digest, length=length, title=title)


class FolderOrigin:
    """A folder that `outrider release show NAME --export DIR` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def proposal(self, family: FamilyName, version: ModelVersion) -> Proposal:
        """The proposal in it; raises InvalidValue when there is none. Whose it is, is looked at later."""
        path = self._folder / PROPOSAL
        try:
            with path.open("rb") as file:
                data = file.read(MAX_PROPOSAL_BYTES + 1)
            if len(data) > MAX_PROPOSAL_BYTES:
                raise ValueError("it is too large")
            return msgspec.json.decode(data, type=Proposal)
        except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise InvalidValue(
                f"{self._folder} holds no proposal for {family}/{version}: {str(error)[:200]}",
                code="invalid.export",
                hint=f"outrider release show {family}/{version} --export DIR, where there is a link to the hub",
            ) from error

    def blob(self, digest: str, *, length: int, title: str = "") -> bytes:
        """A file, hashed."""
        path = self._folder / BLOBS / digest
        try:
            with path.open("rb") as file:
                data = file.read(length + 1)
        except OSError as error:
            raise StorageError(
                f"{path} ({title}) cannot be read: {error.strerror}",
                code="storage.export",
                hint="copy the whole folder again",
            ) from error
        if len(data) != length or hashlib.sha256(data).hexdigest() != digest:
            raise TransferCorrupt(
                f"{path} ({title}) is not the file that the proposal names",
                hint="copy it again; if it stays so, somebody has changed it: do not sign",
            )
        return data


def export(hub: Hub, family: FamilyName, version: ModelVersion, folder: Path) -> Proposal:
    """Write a proposal and its files into a new folder, to be carried to where a key is.

    Raises:
        Conflict: the folder exists and is not empty.
        StorageError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} exists and is not empty", code="conflict.exists", hint="name a new folder")
    origin = HubOrigin(hub, known_root=0)
    proposal = origin.proposal(family, version)
    try:
        (folder / BLOBS).mkdir(parents=True, exist_ok=True)
        for file in proposal.files:
            if file.path == manifest_path(family, version):
                continue  # its text is in the proposal
            data = origin.blob(file.digest, length=file.length, title=file.path.rpartition("/")[2])
            files.replace(folder / BLOBS / file.digest, data)
        files.replace(folder / PROPOSAL, msgspec.json.encode(proposal))
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}", hint="check the medium's space") from error
    return proposal
