"""TUF repositories in memory in the shapes that the specification allows and we never publish, with a history.

Beside tests/fakes/trust_repository.py, which publishes as Outrider does: here are nested and shared delegations,
terminating ones, hash prefixes, succinct roles, thresholds, rotated keys, snapshots with and without digests.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import SuccinctRoles  # type: ignore[attr-defined]

from shared.trust.library import (
    CryptoSigner,
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
    encode_canonical,
)
from shared.trust.roles import file_name

NOW: Final = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
EXPIRES: Final = NOW + timedelta(days=3)
PATHS: Final = ("top.txt", "a/one.txt", "a/two.txt", "b/one.txt", "b/deep.txt", "none.txt", "../x")
_TOP: Final = ("root", "timestamp", "snapshot", "targets")

KEYS: Final = tuple(
    CryptoSigner(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % number).digest())) for number in range(12)
)
"""Always the same, so that a seed names a case down to its last byte."""


class TufRepository:
    """What a repository served at one time after another: `history[-1]` is what it serves now, by file name."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._free = list(KEYS)
        rng.shuffle(self._free)
        self.keys: dict[str, list[CryptoSigner]] = {role: self._new_keys(role) for role in _TOP}
        self._old_root_keys: list[CryptoSigner] = []
        self.versions = dict.fromkeys(_TOP, 1)
        self.with_hashes = rng.random() < 0.3
        self.consistent = rng.random() < 0.8
        self.shape = rng.choice(["plain", "nested", "succinct", "prefixes"])
        self.targets: dict[str, Targets] = {}
        self.history: list[dict[str, bytes]] = []
        self._build_targets()
        self.files: dict[str, bytes] = {}
        self._publish_root()
        self.publish()
        self.first_root = self.files["1.root.json"]

    def step(self) -> None:
        """The next state: new versions, or new keys for some role."""
        for role in list(self.targets):
            if self._rng.random() < 0.6:
                self.versions[role] += 1
        if self._rng.random() < 0.5:
            rotated = self._rng.choice(_TOP)
            self._old_root_keys = self.keys["root"]
            self.keys[rotated] = self._new_keys(rotated)
            self.versions["root"] += 1
            self._publish_root()
        self.versions["snapshot"] += 1
        self.versions["timestamp"] += 1
        self.publish()

    def publish(self) -> None:
        """Sign everything below the root and serve it."""
        meta: dict[str, MetaFile] = {}
        for role, targets in self.targets.items():
            targets.version = self.versions[role]
            meta[f"{role}.json"] = self._store(role, Metadata(targets))
        snapshot = Snapshot(version=self.versions["snapshot"], expires=EXPIRES, meta=meta)
        promise = self._store("snapshot", Metadata(snapshot))
        self._store("timestamp", Metadata(Timestamp(self.versions["timestamp"], None, EXPIRES, promise)))
        self.history.append(dict(self.files))

    def current(self) -> list[tuple[str, str]]:
        """Role and file name of everything that a client without a cache could be served now."""
        found = [("root", f"{self.versions['root']}.root.json")] if self.versions["root"] > 1 else []
        return found + [(role, self._name(role)) for role in ("timestamp", "snapshot", *self.targets)]

    def resign(self, role: str, document: dict[str, Any]) -> bytes:
        """The document signed with the role's keys, however odd it is; unsigned where it has no canonical form."""
        try:
            text = encode_canonical(document["signed"])
            payload = b"" if text is None else text.encode()
        except Exception:  # what the library says of odd values is not the subject here
            return json.dumps(document).encode()
        signers = self.keys[role] + (self._old_root_keys if role == "root" else [])
        made = {signer.public_key.keyid: signer.sign(payload) for signer in signers}
        signatures = [{"keyid": each.keyid, "sig": each.signature} for each in made.values()]
        return json.dumps({**document, "signatures": signatures}).encode()

    def _new_keys(self, role: str) -> list[CryptoSigner]:
        count = 2 if role in ("root", "targets") else 1
        self._free = self._free[count:] + self._free[:count]
        return self._free[:count]

    def _name(self, role: str) -> str:
        return file_name(role, None if role == "timestamp" or not self.consistent else self.versions[role])

    def _store(self, role: str, metadata: Metadata[Any]) -> MetaFile:
        signed: Metadata[Any] = Metadata(copy.deepcopy(metadata.signed))
        for signer in self.keys[role]:
            signed.sign(signer, append=True)
        data = self.files[self._name(role)] = signed.to_bytes()
        if not self.with_hashes:
            return MetaFile(metadata.signed.version)
        return MetaFile.from_data(metadata.signed.version, data, ["sha256"])

    def _publish_root(self) -> None:
        root = Root(self.versions["root"], None, EXPIRES, consistent_snapshot=self.consistent)
        for role in _TOP:
            keys = self.keys[role]
            root.roles[role] = Role([key.public_key.keyid for key in keys], len(keys))
            root.keys.update({key.public_key.keyid: key.public_key for key in keys})
        metadata: Metadata[Root] = Metadata(root)
        for signer in {*self.keys["root"], *self._old_root_keys}:
            metadata.sign(signer, append=True)
        self.files[f"{root.version}.root.json"] = metadata.to_bytes()

    def _build_targets(self) -> None:
        self._add("targets", ["top.txt"])
        match self.shape:
            case "plain":
                self._add("role/a", ["a/one.txt", "b/one.txt"])
                self._delegate("targets", "role/a", paths=["a/*"], terminating=True)
            case "nested":
                self._add("role/a", ["a/one.txt"])
                self._add("b", ["a/one.txt", "b/one.txt"])
                self._add("shared", ["a/two.txt", "b/deep.txt"])
                self._delegate("targets", "role/a", paths=["a/*"])
                self._delegate("targets", "b", paths=["a/*", "b/*"], terminating=True)
                self._delegate("role/a", "shared", paths=["a/t*"])
                self._delegate("b", "shared", paths=["b/*"])
                self._delegate("shared", "role/a", paths=["*/*"])
            case "prefixes":
                self._add("role/a", list(PATHS[1:5]))
                self._delegate("targets", "role/a", prefixes=["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a"])
            case _:
                self._add_succinct()

    def _add_succinct(self) -> None:
        keys = self.keys["bins"] = self._new_keys("bins")
        succinct = SuccinctRoles([key.public_key.keyid for key in keys], 1, 2, "bin")
        self.targets["targets"].delegations = Delegations(
            {key.public_key.keyid: key.public_key for key in keys}, succinct_roles=succinct
        )
        for name in succinct.get_roles():
            self.keys[name] = keys
            self._add(name, [path for path in PATHS[1:5] if succinct.get_role_for_target(path) == name])

    def _add(self, role: str, paths: list[str]) -> None:
        targets = Targets(version=1, expires=EXPIRES)
        for path in paths:
            targets.targets[path] = TargetFile.from_data(path, f"{role}:{path}".encode(), ["sha256"])
        self.targets[role] = targets
        self.versions[role] = 1
        self.keys.setdefault(role, self._new_keys(role))

    def _delegate(
        self,
        delegator: str,
        role: str,
        *,
        paths: list[str] | None = None,
        prefixes: list[str] | None = None,
        terminating: bool = False,
    ) -> None:
        targets = self.targets[delegator]
        if targets.delegations is None:
            targets.delegations = Delegations({}, roles={})
        keys = self.keys[role]
        targets.delegations.keys.update({key.public_key.keyid: key.public_key for key in keys})
        assert targets.delegations.roles is not None
        targets.delegations.roles[role] = DelegatedRole(
            role, [key.public_key.keyid for key in keys], 1, terminating, paths=paths, path_hash_prefixes=prefixes
        )
