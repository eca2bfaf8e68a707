"""The client workflow of the TUF specification 1.0.34, sections 5.3 to 5.6, without I/O.

A generator says which file it needs next and is sent the bytes, None where the repository has none; what it accepted
and is worth keeping it hands out at once, so that a run that breaks off has not been for nothing. The transport, the
store and the clock are whoever drives it: the agent's verifier child (by way of shared/trust/refresh.py), the
conformance client, the fuzz against python-tuf's own client.

Rules:
1. One reference time for a whole run (5.2).
2. Intermediate roots may have expired, final metadata may not; old metadata serves as base for comparison.
3. Floors outrank the cache. They are kept by role and key set, so that new keys begin with a floor of their own.
4. What has not changed is not asked for again; only what was accepted is kept, and roots link by link.

Not here: assignments, manifests, downloads of targets (5.7), several repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Final, NamedTuple, TypeVar

from shared import limits
from shared.errors import TransferRefused, TrustError
from shared.trust import metadata as md
from shared.trust.library import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from shared.trust.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, file_name
from shared.wire.verification import Keep, Need

R = TypeVar("R")
Steps = Generator[Need | Keep, bytes | None, R]
Delegator = Root | Targets
Loader = Callable[[str, Delegator, str], Steps[Targets]]
"""Loads a role as a delegator trusts it: the role's name, the delegator, the delegator's name."""


class Found(NamedTuple):
    """Where a target was found.

    Attributes:
        chain: the roles from the top-level targets to the one that lists it, each trusted by the one before: a role's
            name alone says nothing, because whoever delegates may call a role as he likes.
        expires_ms: when the metadata that lists it expires.
        target: what it says.
    """

    chain: tuple[str, ...]
    expires_ms: int
    target: TargetFile


MAX_ROLES_PER_SEARCH: Final = 32
"""How many delegated roles one target's search may visit, beside the top-level targets."""


class Client:
    """One run of the workflow: `follow_roots`, then `refresh`, then `find` as often as it takes.

    Each private method is one step of the specification and leaves what it verified in a field.
    """

    def __init__(self, *, root: bytes, cache: Mapping[str, bytes], floors: Mapping[str, int]) -> None:
        """
        Args:
            root: the newest root that is trusted already.
            cache: metadata accepted earlier, by role; whatever in it does not hold is ignored.
            floors: as `floors` returned them after earlier runs (shared.release.Floors.roles).
        """
        self._trusted_root = root
        self._cache = dict(cache)
        self._floors = dict(floors)
        self._floor_names: dict[str, str] = {}
        self._now_ms = 0
        self._root: Root
        self._timestamp: Timestamp
        self._snapshot: Snapshot
        self._targets: dict[tuple[str, str], Targets] = {}

    def follow_roots(self) -> Steps[Root]:
        """5.3: from the trusted root to the newest one, each signed by the one before and by itself.

        Raises:
            TrustError: `.malformed`, `.signature`, `.rollback`, `.endless_data`; its expiry is `refresh`'s to judge.
        """
        trusted = md.load(Root, self._trusted_root, role=ROOT, max_bytes=limits.MAX_ROOT_BYTES)
        md.check_signatures(trusted.signed, ROOT, trusted)
        self._root = trusted.signed
        for _ in range(limits.MAX_ROOT_ROTATIONS):
            version = self._root.version + 1
            data = yield Need(name=file_name(ROOT, version), max_bytes=limits.MAX_ROOT_BYTES)
            if data is None:
                break
            newer = md.load(Root, data, role=ROOT, max_bytes=limits.MAX_ROOT_BYTES)
            md.check_signatures(self._root, ROOT, newer)
            md.check_signatures(newer.signed, ROOT, newer)
            if newer.signed.version != version:
                raise TrustError(
                    f"root {version} calls itself version {newer.signed.version}", code="trust.rollback", hint=md.RESEND
                )
            drops = self._rotated(newer.signed)
            self._root = newer.signed
            yield Keep(role=ROOT, data=data, drops=drops)
        else:
            raise TrustError(
                f"more than {limits.MAX_ROOT_ROTATIONS} roots in one go",
                code="trust.endless_data",
                hint="what was verified is kept; a further try goes on from there",
            )
        md.check_version(self._root.version, floor=self._floors.get(ROOT, 0), role=ROOT)
        self._floors[ROOT] = self._root.version
        return self._root

    def refresh(self, *, now_ms: int) -> Steps[None]:
        """5.3.10, 5.4 and 5.5: the root's expiry, the timestamp and the snapshot, all at this moment."""
        self._now_ms = now_ms
        md.check_fresh(self._root, role=ROOT, now_ms=now_ms)
        yield from self._load_timestamp()
        yield from self._load_snapshot()

    def load_targets(self) -> Steps[Targets]:
        """5.6: the top-level targets, for who wants them without looking for anything."""
        return (yield from self._load_role(TARGETS, self._root, ROOT))

    def find(self, path: str) -> Steps[Found | None]:
        """5.6.7: what the releases say of this target; None when no role that may speak of it lists it."""
        return (yield from search(path, self._root, self._load_role))

    def floors(self) -> dict[str, int]:
        """The floors after this run: only upwards, except for roles whose keys their delegator has replaced."""
        self._raise_floor(self._root, TIMESTAMP, self._timestamp.version)
        self._raise_floor(self._root, SNAPSHOT, self._snapshot.version)
        return {n: v for n, v in self._floors.items() if self._floor_names.get(n.rpartition("@")[0], n) == n}

    def _rotated(self, newer: Root) -> tuple[str, ...]:
        """5.3.11: when timestamp or snapshot keys change, what they signed before is no base for comparison."""
        if all(md.key_set(self._root, role) == md.key_set(newer, role) for role in (TIMESTAMP, SNAPSHOT)):
            return ()
        self._cache.pop(TIMESTAMP, None)
        self._cache.pop(SNAPSHOT, None)
        return TIMESTAMP, SNAPSHOT

    def _load_timestamp(self) -> Steps[None]:
        """5.4. An equal version means that nothing has changed: the one at hand stays."""
        trusted = self._cached(Timestamp, TIMESTAMP, self._root, limits.MAX_TIMESTAMP_BYTES)
        data = yield from self._fetch(TIMESTAMP, None, limits.MAX_TIMESTAMP_BYTES)
        newer = md.load(Timestamp, data, role=TIMESTAMP, max_bytes=limits.MAX_TIMESTAMP_BYTES)
        md.check_signatures(self._root, TIMESTAMP, newer)
        floor = self._floor(self._root, TIMESTAMP)
        if trusted is not None:
            floor = max(floor, trusted.signed.version)
        md.check_version(newer.signed.version, floor=floor, role=TIMESTAMP)
        if trusted is not None and newer.signed.version == trusted.signed.version:
            self._timestamp = trusted.signed
            md.check_fresh(self._timestamp, role=TIMESTAMP, now_ms=self._now_ms)
            return
        floor = self._floor(self._root, SNAPSHOT)
        if trusted is not None:
            floor = max(floor, trusted.signed.snapshot_meta.version)
        md.check_version(newer.signed.snapshot_meta.version, floor=floor, role=SNAPSHOT)
        md.check_fresh(newer.signed, role=TIMESTAMP, now_ms=self._now_ms)
        self._timestamp = newer.signed
        yield Keep(role=TIMESTAMP, data=data)

    def _load_snapshot(self) -> Steps[None]:
        """5.5. The snapshot at hand serves if the timestamp names it, and as a base for comparison if not."""
        meta = self._timestamp.snapshot_meta
        trusted = self._cached(Snapshot, SNAPSHOT, self._root, limits.MAX_SNAPSHOT_BYTES)
        if trusted is not None and is_promised(meta, trusted, self._cache[SNAPSHOT], role=SNAPSHOT):
            md.check_fresh(trusted.signed, role=SNAPSHOT, now_ms=self._now_ms)
            self._snapshot = trusted.signed
            return
        data = yield from self._fetch(SNAPSHOT, meta, limits.MAX_SNAPSHOT_BYTES)
        md.check_promise(meta, data, role=SNAPSHOT)
        newer = md.load(Snapshot, data, role=SNAPSHOT, max_bytes=limits.MAX_SNAPSHOT_BYTES)
        md.check_signatures(self._root, SNAPSHOT, newer)
        _check_promised_version(newer.signed.version, meta, SNAPSHOT)
        for name, before in trusted.signed.meta.items() if trusted is not None else ():
            now = newer.signed.meta.get(name)
            if now is None:
                raise TrustError(
                    f"snapshot {newer.signed.version} no longer lists {name[:120]!r}",
                    code="trust.rollback",
                    hint="the hub's database may have been restored from a backup; publish the release again",
                )
            md.check_version(now.version, floor=before.version, role=name.removesuffix(".json"))
        md.check_fresh(newer.signed, role=SNAPSHOT, now_ms=self._now_ms)
        self._snapshot = newer.signed
        yield Keep(role=SNAPSHOT, data=data)

    def _load_role(self, role: str, delegator: Delegator, delegator_name: str) -> Steps[Targets]:
        """5.6: the role as this delegator trusts it; one that came through another delegator is checked again."""
        known = self._targets.get((delegator_name, role))
        if known is not None:
            return known
        meta = promised(self._snapshot, role)
        md.check_version(meta.version, floor=self._floor(delegator, role), role=role)
        trusted = self._cached(Targets, role, delegator, limits.MAX_TARGETS_BYTES)
        data: bytes | None = None
        if trusted is None or not is_promised(meta, trusted, self._cache[role], role=role):
            data = yield from self._fetch(role, meta, limits.MAX_TARGETS_BYTES)
            md.check_promise(meta, data, role=role)
            trusted = md.load(Targets, data, role=role, max_bytes=limits.MAX_TARGETS_BYTES)
            md.check_signatures(delegator, role, trusted)
            _check_promised_version(trusted.signed.version, meta, role)
        md.check_fresh(trusted.signed, role=role, now_ms=self._now_ms)
        if data is not None:
            self._cache[role] = data
            yield Keep(role=role, data=data)
        self._targets[(delegator_name, role)] = trusted.signed
        self._raise_floor(delegator, role, meta.version)
        return trusted.signed

    def _raise_floor(self, delegator: Delegator, role: str, version: int) -> None:
        name = md.floor_name(delegator, role)
        self._floors[name] = max(version, self._floors.get(name, 0))
        self._floor_names[role] = name

    def _floor(self, delegator: Delegator, role: str) -> int:
        return self._floors.get(md.floor_name(delegator, role), 0)

    def _cached(self, kind: type[md.S], role: str, delegator: Delegator, max_bytes: int) -> Metadata[md.S] | None:
        """What the cache holds, if today's delegator still stands behind it; a damaged cache is no error."""
        data = self._cache.get(role)
        if data is None:
            return None
        try:
            cached = md.load(kind, data, role=role, max_bytes=max_bytes)
            md.check_signatures(delegator, role, cached)
        except TrustError:
            return None
        return cached

    def _fetch(self, role: str, meta: MetaFile | None, bound: int) -> Steps[bytes]:
        """The file that `meta` promises, or the timestamp; names carry versions only where the root says so (6.2)."""
        version = meta.version if meta is not None and self._root.consistent_snapshot else None
        max_bytes = bound if meta is None or meta.length is None else min(meta.length, bound)
        name = file_name(role, version)
        data = yield Need(name=name, max_bytes=max_bytes)
        if data is None:
            raise missing(name)
        check_length(data, max_bytes=max_bytes, name=name)
        return data


def search(path: str, root: Root, load: Loader) -> Steps[Found | None]:
    """5.6.7: look through the delegations in pre-order; the first role that lists the path decides.

    Raises:
        TrustError: `trust.endless_data` when more roles than MAX_ROLES_PER_SEARCH would have to be visited, beside
            what `load` raises.
    """
    stack: list[tuple[str, str]] = [(TARGETS, ROOT)]
    visited: set[str] = set()
    loaded: dict[str, Delegator] = {ROOT: root}
    chains: dict[str, tuple[str, ...]] = {ROOT: ()}
    while stack:
        role, delegator_name = stack.pop()
        if role in visited:
            continue
        check_depth(len(visited), path=path)
        visited.add(role)
        targets = yield from load(role, loaded[delegator_name], delegator_name)
        loaded[role] = targets
        chains[role] = chain = (*chains[delegator_name], role)
        if path in targets.targets:
            return Found(chain, md.expires_ms(targets), targets.targets[path])
        children: list[tuple[str, str]] = []
        with md.translated(f"delegations of {role}"):
            for name, terminating in targets.delegations.get_roles_for_target(path) if targets.delegations else ():
                children.append((name, role))
                if terminating:
                    stack.clear()
                    break
        stack.extend(reversed(children))
    return None


def check_length(data: bytes, *, max_bytes: int, name: str) -> None:
    """Raise TrustError `trust.endless_data` when a file has more bytes than were promised or may be."""
    if len(data) > max_bytes:
        raise TrustError(
            f"{name} has more than the {max_bytes} bytes that may be", code="trust.endless_data", hint=md.RESEND
        )


def check_depth(visited: int, *, path: str) -> None:
    """Raise TrustError `trust.endless_data` when a search has visited so many roles already."""
    if visited > MAX_ROLES_PER_SEARCH:
        raise TrustError(
            f"more than {MAX_ROLES_PER_SEARCH} roles would have to be asked for {path[:120]!r}",
            code="trust.endless_data",
            hint="delegate less deeply; a family needs one role",
        )


def promised(snapshot: Snapshot, role: str) -> MetaFile:
    """What the snapshot says of this role; raises TrustError `trust.mix_and_match` when it says nothing."""
    meta = snapshot.meta.get(f"{role}.json")
    if meta is None:
        raise TrustError(
            f"the snapshot does not list {role!r}",
            code="trust.mix_and_match",
            hint="publish the release again; the snapshot must name every role that is delegated to",
        )
    return meta


def is_promised(meta: MetaFile, metadata: Metadata[md.S], data: bytes, *, role: str) -> bool:
    """Whether this is the very file that newer metadata names."""
    if metadata.signed.version != meta.version:
        return False
    try:
        md.check_promise(meta, data, role=role)
    except TrustError:
        return False
    return True


def missing(name: str) -> TransferRefused:
    """The refusal for want of a file that must be there."""
    return TransferRefused(
        f"the hub has no {name}",
        code="transfer.missing",
        hint="publish the release again; the hub's store lacks a file",
    )


def _check_promised_version(found: int, meta: MetaFile, role: str) -> None:
    if found != meta.version:
        raise TrustError(
            f"{role} metadata has version {found} where version {meta.version} is promised",
            code="trust.mix_and_match",
            hint=md.RESEND,
        )
