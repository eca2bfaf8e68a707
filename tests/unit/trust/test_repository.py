"""The publishing side: what it makes is what devices accept, and what is sent in is held against what is published."""

from __future__ import annotations

import copy

import pytest

from shared.errors import Conflict, InvalidValue, TrustError
from shared.ids import FamilyName
from shared.trust import keys, library
from shared.trust import publication as publications
from shared.trust import repository as repo
from shared.trust.library import DelegatedRole, Delegations, TargetFile
from tests.fakes.trust_repository import DAY_MS, NOW_MS, TrustRepository, make_manifest

DIGITS = FamilyName("digits")
ROLE = "models/digits"


@pytest.fixture
def hub() -> TrustRepository:
    hub = TrustRepository()
    hub.release(make_manifest())
    return hub


def check(
    hub: TrustRepository, role: bytes, targets: bytes | None = None, *, now_ms: int = NOW_MS
) -> publications.Publication:
    return publications.check_publication(
        hub.files[f"{hub.root.signed.version}.root.json"],
        family=DIGITS,
        current_targets=hub.files["2.targets.json"],
        current_role=hub.files["1.models%2Fdigits.json"],
        targets=targets,
        role=role,
        now_ms=now_ms,
    )


def next_role(hub: TrustRepository, version: str = "1.1.0") -> library.Metadata[library.Targets]:
    return repo.add_release(hub.roles[ROLE], make_manifest(version, counter=2), now_ms=NOW_MS)


def test_lifetimes_are_those_of_the_house(hub: TrustRepository) -> None:
    assert hub.snapshot is not None
    assert hub.timestamp is not None
    days = [
        (item.signed.expires.timestamp() * 1000 - NOW_MS) / DAY_MS
        for item in (hub.root, hub.targets, hub.roles[ROLE], hub.snapshot, hub.timestamp)
    ]
    assert days == [365, 90, 90, 7, 1]


def test_nothing_given_is_changed(hub: TrustRepository) -> None:
    before = copy.deepcopy((hub.targets.to_dict(), hub.roles[ROLE].to_dict()))
    next_role(hub)
    repo.delegate_family(hub.targets, FamilyName("cats"), hub.public("release"), now_ms=NOW_MS)
    repo.sign(hub.targets, *hub.keys["targets"])
    assert (hub.targets.to_dict(), hub.roles[ROLE].to_dict()) == before


def test_a_family_is_delegated_once(hub: TrustRepository) -> None:
    assert repo.is_delegated(hub.targets, DIGITS, hub.public("release"))
    assert not repo.is_delegated(hub.targets, FamilyName("cats"), hub.public("release"))
    assert not repo.is_delegated(hub.targets, DIGITS, hub.public("targets"))
    again = repo.delegate_family(hub.targets, DIGITS, hub.public("targets"), now_ms=NOW_MS)
    assert again.signed.version == hub.targets.signed.version + 1
    delegations = again.signed.delegations
    assert delegations is not None
    assert set(delegations.keys) == set(hub.public("targets").keys[0].keyid.split()), "keys without a role are dropped"


def test_a_released_version_never_changes(hub: TrustRepository) -> None:
    with pytest.raises(Conflict):
        repo.add_release(hub.roles[ROLE], make_manifest(model=b"another"), now_ms=NOW_MS)
    again = repo.add_release(hub.roles[ROLE], make_manifest(), now_ms=NOW_MS)
    assert again.signed.targets == hub.roles[ROLE].signed.targets
    assert again.signed.version == 2


def test_files_must_be_those_of_the_manifest(hub: TrustRepository) -> None:
    manifest = make_manifest("1.1.0", counter=2)
    files = repo.release_files(manifest)
    assert [file.path.rsplit("/", 1)[1] for file in files] == ["manifest.json", "golden.bin", "int8.onnx"]
    repo.add_release(hub.roles[ROLE], manifest, files, now_ms=NOW_MS)
    with pytest.raises(InvalidValue):
        repo.add_release(hub.roles[ROLE], manifest, files[:2], now_ms=NOW_MS)
    with pytest.raises(InvalidValue):
        repo.add_release(hub.roles[ROLE], manifest, files[1:], now_ms=NOW_MS)


def test_a_threshold_needs_as_many_different_keys(hub: TrustRepository) -> None:
    one = hub.public("root").keys[0]
    with pytest.raises(InvalidValue):
        repo.delegate_family(hub.targets, DIGITS, repo.RoleKeys(keys=(one, one), threshold=2), now_ms=NOW_MS)


def test_a_snapshot_never_goes_back(hub: TrustRepository) -> None:
    assert hub.snapshot is not None
    with pytest.raises(Conflict):
        repo.new_snapshot(hub.snapshot, {"targets": hub.files["2.targets.json"]}, now_ms=NOW_MS)


def test_what_was_written_is_read_back(hub: TrustRepository) -> None:
    assert repo.read_root(hub.first_root).signed == hub.root.signed
    assert repo.read_targets(hub.files["2.targets.json"]).signed == hub.targets.signed
    assert hub.snapshot is not None
    assert repo.read_snapshot(hub.files["1.snapshot.json"]).signed == hub.snapshot.signed
    assert hub.timestamp is not None
    assert repo.read_timestamp(hub.files["timestamp.json"]).signed == hub.timestamp.signed


def test_a_good_publication_says_what_is_new(hub: TrustRepository) -> None:
    role = repo.sign(next_role(hub), *hub.keys["release"])
    publication = check(hub, role)
    assert publication.targets is None
    assert publication.role == role
    assert publication.role_name == ROLE
    assert set(publication.files) == set(repo.release_files(make_manifest("1.1.0", counter=2)))


def test_a_first_release_brings_its_delegation() -> None:
    hub = TrustRepository()
    first = repo.sign(hub.targets, *hub.keys["targets"])
    delegated = repo.delegate_family(hub.targets, DIGITS, hub.public("release"), now_ms=NOW_MS)
    role = repo.add_release(None, make_manifest(), now_ms=NOW_MS)
    targets = repo.sign(delegated, *hub.keys["targets"])
    signed = repo.sign(role, *hub.keys["release"])
    publication = publications.check_publication(
        hub.first_root, family=DIGITS, current_targets=first, current_role=None, targets=targets, role=signed,
        now_ms=NOW_MS,
    )  # fmt: skip
    assert publication.targets == targets
    with pytest.raises(TrustError) as caught:
        publications.check_publication(
            hub.first_root, family=DIGITS, current_targets=first, current_role=None, targets=None, role=signed,
            now_ms=NOW_MS,
        )  # fmt: skip
    assert caught.value.code == "trust.unknown_target"


def test_a_publication_by_the_wrong_key_is_refused(hub: TrustRepository) -> None:
    for held in ("root", "targets", "snapshot", "timestamp", "assignment"):
        with pytest.raises(TrustError) as caught:
            check(hub, repo.sign(next_role(hub), *hub.keys[held]))
        assert caught.value.code == "trust.signature"
    targets = repo.delegate_family(hub.targets, DIGITS, hub.public("snapshot"), now_ms=NOW_MS)
    with pytest.raises(TrustError) as caught:
        check(hub, repo.sign(next_role(hub), *hub.keys["snapshot"]), targets=repo.sign(targets, *hub.keys["snapshot"]))
    assert caught.value.code == "trust.signature"


@pytest.mark.parametrize("held", ["snapshot", "timestamp", "assignment"])
def test_an_online_key_is_no_familys(hub: TrustRepository, held: str) -> None:
    """With the threshold of targets keys behind it: whoever has the hub would release by themselves."""
    targets = repo.delegate_family(hub.targets, DIGITS, hub.public(held), now_ms=NOW_MS)
    with pytest.raises(TrustError) as caught:
        check(hub, repo.sign(next_role(hub), *hub.keys[held]), targets=repo.sign(targets, *hub.keys["targets"]))
    assert caught.value.code == "trust.keys"


def test_a_publication_must_be_next(hub: TrustRepository) -> None:
    for version in (1, 3):
        role = next_role(hub)
        role.signed.version = version
        with pytest.raises(Conflict) as caught:
            check(hub, repo.sign(role, *hub.keys["release"]))
        assert caught.value.code == "conflict.metadata_version"


def test_a_publication_may_not_drop_or_change_what_was_released(hub: TrustRepository) -> None:
    role = next_role(hub)
    del role.signed.targets["models/digits/1.0.0/int8.onnx"]
    with pytest.raises(Conflict):
        check(hub, repo.sign(role, *hub.keys["release"]))
    role = next_role(hub)
    role.signed.targets["models/digits/1.0.0/int8.onnx"].hashes["sha256"] = "00" * 32
    with pytest.raises(Conflict):
        check(hub, repo.sign(role, *hub.keys["release"]))
    targets = repo.new_targets(now_ms=NOW_MS)
    targets.signed.version = 3
    with pytest.raises(Conflict):
        check(hub, repo.sign(next_role(hub), *hub.keys["release"]), targets=repo.sign(targets, *hub.keys["targets"]))


@pytest.mark.parametrize("path", ["models/cats/1.0.0/int8.onnx", "models/digits/../x", "models/digits/1.0.0/a/b", "/x"])
def test_a_publication_stays_in_its_family(hub: TrustRepository, path: str) -> None:
    role = next_role(hub)
    role.signed.targets[path] = TargetFile(1, {"sha256": "00" * 32}, path)
    with pytest.raises(TrustError) as caught:
        check(hub, repo.sign(role, *hub.keys["release"]))
    assert caught.value.code == "trust.unknown_target"


def test_a_publication_may_not_delegate_further(hub: TrustRepository) -> None:
    role = next_role(hub)
    key = hub.public("release").keys[0]
    inner = DelegatedRole("x", [key.keyid], 1, True, paths=["*"])
    role.signed.delegations = Delegations(keys={key.keyid: key}, roles={"x": inner})
    with pytest.raises(TrustError):
        check(hub, repo.sign(role, *hub.keys["release"]))


def test_an_expired_publication_is_refused(hub: TrustRepository) -> None:
    role = repo.sign(next_role(hub), *hub.keys["release"])
    with pytest.raises(TrustError) as caught:
        check(hub, role, now_ms=NOW_MS + 91 * DAY_MS)
    assert caught.value.code == "trust.freeze"


def test_a_key_survives_being_written_and_nothing_else_is_a_key() -> None:
    pem = keys.new_private_pem()
    assert keys.signer_from_pem(pem).public_key == keys.signer_from_pem(pem).public_key
    for data in (b"", b"x", pem[:40], pem.replace(b"PRIVATE", b"PUBLIC")):
        with pytest.raises(InvalidValue) as caught:
            keys.signer_from_pem(data)
        assert "BEGIN" not in str(caught.value)
