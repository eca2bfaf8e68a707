"""Drafts that go from hand to hand: who is missing, what is signed, and what a signer's machine refuses to follow."""

from __future__ import annotations

import json

import msgspec
import pytest

from shared.errors import Conflict, InvalidValue, OutriderError, TrustError
from shared.trust import authority, ceremony, drafts, keys, repository
from shared.trust.drafts import Draft
from shared.trust.library import CryptoSigner, Metadata, Root, SSlibKey
from shared.trust.repository import RoleKeys
from tests.fakes.trust_repository import DAY_MS, NOW_MS, make_manifest

ONLINE = ("snapshot", "timestamp", "assignment")


def new_key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def public(*signers: CryptoSigner, threshold: int = 1) -> RoleKeys:
    return RoleKeys(keys=tuple(signer.public_key for signer in signers), threshold=threshold)


class Team:
    """Three root keys of which two decide, two targets keys that must both sign, and a hub's online keys."""

    def __init__(self) -> None:
        self.root = [new_key() for _ in range(3)]
        self.targets = [new_key() for _ in range(2)]
        self.online = {role: new_key() for role in ONLINE}
        self.held = {
            "root": public(*self.root, threshold=2),
            "targets": public(*self.targets, threshold=2),
            **{role: public(key) for role, key in self.online.items()},
        }

    def first(self) -> Draft:
        root = ceremony.first_root(self.held, now_ms=NOW_MS)
        targets = repository.new_targets(now_ms=NOW_MS)
        return Draft(parts={"root": repository.sign(root).decode(), "targets": repository.sign(targets).decode()})

    def founded(self) -> Draft:
        return drafts.add_signatures(self.first(), [*self.root[:2], *self.targets])[0]

    def following(self, changes: dict[str, RoleKeys]) -> Draft:
        """A draft of the root that follows the founded one."""
        founded = self.founded().parts
        root = ceremony.next_root(repository.read_root(founded["root"].encode()), changes, now_ms=NOW_MS)
        return Draft(parts={"root": repository.sign(root).decode()}, basis=founded, roots=(founded["root"],))


@pytest.fixture
def team() -> Team:
    return Team()


def test_a_first_root_goes_round_until_nobody_is_missing(team: Team) -> None:
    draft = team.first()
    drafts.check_draft(draft, now_ms=NOW_MS)
    assert [(q.role, q.missing) for q in drafts.quorums(draft)] == [("root", 2), ("targets", 2)]
    seen = []
    for signers in ([team.root[2]], [team.targets[0]], [team.root[0], team.targets[1]]):
        with pytest.raises(TrustError):
            drafts.check_draft(draft, now_ms=NOW_MS, is_signed=True)
        draft, added = drafts.add_signatures(drafts.decode_draft(drafts.encode_draft(draft)), signers)
        seen += [role for role, _ in added]
    assert sorted(seen) == ["root", "root", "targets", "targets"]
    drafts.check_draft(draft, now_ms=NOW_MS, is_signed=True)
    assert drafts.missing(drafts.quorums(draft)) == ()
    assert drafts.add_signatures(draft, [team.root[0]])[1] == ()


def test_a_key_signs_only_what_asks_for_it(team: Team) -> None:
    stranger = new_key()
    draft, added = drafts.add_signatures(team.first(), [stranger, team.online["snapshot"]])
    assert added == ()
    assert all(not json.loads(text)["signatures"] for text in draft.parts.values())


def test_missing_signatures_are_named_by_key(team: Team) -> None:
    draft, _ = drafts.add_signatures(team.first(), [team.root[0], *team.targets])
    (line,) = drafts.missing(drafts.quorums(draft))
    assert "root 1 needs 1 more" in line
    assert authority.short(team.root[1].public_key.keyid) in line
    assert authority.short(team.root[0].public_key.keyid) not in line


def test_a_new_root_asks_the_old_keys_and_the_new_ones(team: Team) -> None:
    new = [new_key(), new_key()]
    draft = team.following({"root": public(*new, threshold=2)})
    assert [(q.authority, q.missing) for q in drafts.quorums(draft)] == [("root 1", 2), ("root 2", 2)]
    draft, _ = drafts.add_signatures(draft, [*team.root[1:], new[0]])
    assert [q.missing for q in drafts.quorums(draft)] == [0, 1]
    with pytest.raises(TrustError):
        drafts.check_draft(draft, now_ms=NOW_MS, is_signed=True)
    draft, _ = drafts.add_signatures(draft, new)
    drafts.check_draft(draft, now_ms=NOW_MS, is_signed=True)


def test_a_signature_that_was_changed_is_missing_and_can_be_made_again(team: Team) -> None:
    draft = team.founded()
    root = json.loads(draft.parts["root"])
    root["signatures"][0]["sig"] = "00" * 64
    draft = msgspec.structs.replace(draft, parts={**draft.parts, "root": json.dumps(root)})
    assert drafts.quorums(draft)[0].missing == 1
    draft, _ = drafts.add_signatures(draft, team.root[:2])
    assert drafts.quorums(draft)[0].missing == 0


def test_targets_that_would_no_longer_hold_are_part_of_the_change(team: Team) -> None:
    draft = team.following({"targets": public(new_key())})
    with pytest.raises(TrustError) as caught:
        drafts.check_draft(draft, now_ms=NOW_MS)
    assert caught.value.code == "trust.signature"
    key = new_key()
    draft = team.following({"targets": public(key)})
    targets = ceremony.next_targets(
        repository.read_targets(draft.basis["targets"].encode()), {"models/cats": public(new_key())}, now_ms=NOW_MS
    )
    draft = msgspec.structs.replace(draft, parts={**draft.parts, "targets": repository.sign(targets).decode()})
    drafts.check_draft(draft, now_ms=NOW_MS)
    draft, added = drafts.add_signatures(draft, [*team.root, key, *team.targets])
    assert [role for role, _ in added] == ["root"] * 3 + ["targets"]
    drafts.check_draft(draft, now_ms=NOW_MS, is_signed=True)


def test_what_changes_is_told_beside_what_stays(team: Team) -> None:
    new = new_key()
    lines = drafts.describe(team.following({"root": public(*team.root[:2], new, threshold=3)}))
    assert lines[0].startswith("root 2, until ")
    assert "  root: 3 of 3, was 2" in lines
    assert f"    {authority.short(new.public_key.keyid)}  NEW" in lines
    assert f"    {authority.short(team.root[2].public_key.keyid)}  REMOVED" in lines
    assert f"    {authority.short(team.root[0].public_key.keyid)}" in lines
    assert "  snapshot: 1 of 1" in lines


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"parts":{},"kind":"x"}', b'{"parts":{"root":3}}', b"[" * 90000])
def test_what_is_no_draft_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidValue):
        drafts.decode_draft(data)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"signed": {}, "signatures": []}'])
def test_a_draft_of_rubbish_is_refused(team: Team, text: str) -> None:
    for draft in (
        Draft(parts={"root": text, "targets": text}),
        Draft(parts={"root": text}, basis=team.founded().parts),
    ):
        for ask in (drafts.quorums, lambda draft: drafts.check_draft(draft, now_ms=NOW_MS), drafts.describe):
            with pytest.raises(OutriderError):
                ask(draft)


def test_attack_10_a_forged_basis_does_not_pass_for_what_there_was(team: Team) -> None:
    """Whoever has the hub shows signers keys and files of its own as if they had been there before."""
    thief, founded = new_key(), team.founded()
    family = {"models/digits": public(thief)}
    targets = ceremony.next_targets(repository.read_targets(founded.parts["targets"].encode()), family, now_ms=NOW_MS)
    role = repository.add_release(None, make_manifest(), now_ms=NOW_MS)
    following = {
        "targets": repository.sign(ceremony.next_targets(targets, {}, now_ms=NOW_MS)).decode(),
        "models/digits": repository.sign(ceremony.next_role(role, now_ms=NOW_MS)).decode(),
    }
    honest = repository.sign(targets, *team.targets).decode()
    forged = repository.sign(targets, thief).decode()
    released, slipped_in = repository.sign(role, thief).decode(), repository.sign(role, new_key()).decode()
    for basis_targets, basis_role, is_refused in (
        (honest, released, False),
        (forged, released, True),
        (honest, slipped_in, True),
    ):
        basis = {"root": founded.parts["root"], "targets": basis_targets, "models/digits": basis_role}
        draft = Draft(parts=following, basis=basis, roots=(basis["root"],))
        if not is_refused:
            drafts.check_draft(draft, now_ms=NOW_MS)
            continue
        with pytest.raises(TrustError) as caught:
            drafts.check_draft(draft, now_ms=NOW_MS)
        assert caught.value.code == "trust.signature"


# Thresholds and sides


def test_a_root_lists_reachable_thresholds_and_keeps_the_hub_apart(team: Team) -> None:
    shared = new_key()
    for changes in (
        {"root": public(new_key(), threshold=2)},
        {"root": public(team.online["snapshot"])},
        {"targets": public(team.online["assignment"])},
        {"timestamp": public(new_key(), new_key(), threshold=2)},
        {"root": public(shared), "timestamp": public(shared)},
        {"root": RoleKeys(keys=())},
    ):
        with pytest.raises(InvalidValue):
            team.following(changes)
    root = repository.read_root(team.following({"time": public(shared)}).basis["root"].encode())
    assert authority.role_keys(root.signed, "time") is None
    following = ceremony.next_root(root, {"time": public(shared)}, now_ms=NOW_MS)
    assert authority.role_keys(following.signed, "time") == public(shared)
    assert authority.root_roles(following.signed)[-2:] == ("assignment", "time")


def test_a_root_that_forgets_a_role_is_refused(team: Team) -> None:
    founded = {role: text.encode() for role, text in team.founded().parts.items()}
    root = ceremony.next_root(repository.read_root(founded["root"]), {"time": public(new_key())}, now_ms=NOW_MS)
    with_time = {**founded, "root": repository.sign(root, *team.root)}
    gone = ceremony.next_root(root, {}, now_ms=NOW_MS)
    del gone.signed.unrecognized_fields["x-outrider"]["time"]
    with pytest.raises(TrustError) as caught:
        ceremony.check_change(with_time, {"root": repository.sign(gone, *team.root)}, now_ms=NOW_MS)
    assert caught.value.code == "trust.malformed"


def test_a_change_that_has_expired_is_refused(team: Team) -> None:
    draft = team.founded()
    with pytest.raises(TrustError) as caught:
        drafts.check_draft(draft, now_ms=NOW_MS + 366 * DAY_MS, is_signed=True)
    assert caught.value.code == "trust.freeze"


def test_targets_delegate_nothing_but_families(team: Team) -> None:
    founded = {role: text.encode() for role, text in team.founded().parts.items()}
    targets = ceremony.next_targets(
        repository.read_targets(founded["targets"]), {"models/cats": public(new_key())}, now_ms=NOW_MS
    )
    delegations = targets.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles["models/cats"].paths = ["models/*/*/*"]
    with pytest.raises(TrustError):
        ceremony.check_change(founded, {"targets": repository.sign(targets, *team.targets)}, now_ms=NOW_MS)
    delegations.roles = {"other": delegations.roles["models/cats"]}
    delegations.roles["other"].name = "other"
    with pytest.raises(TrustError) as caught:
        ceremony.check_change(founded, {"targets": repository.sign(targets, *team.targets)}, now_ms=NOW_MS)
    assert caught.value.code == "trust.delegation"


def test_a_familys_key_is_never_an_online_key(team: Team) -> None:
    """Whichever of the two comes first, and under whatever name it is listed."""
    founded = {role: text.encode() for role, text in team.founded().parts.items()}
    before = repository.read_targets(founded["targets"])
    snapshot, own = team.online["snapshot"].public_key, new_key()
    twin = SSlibKey("twin", snapshot.keytype, snapshot.scheme, {"public": snapshot.keyval["public"].upper()})
    for key in (snapshot, twin):
        held = {"models/digits": RoleKeys(keys=(own.public_key, key))}
        targets = ceremony.next_targets(before, held, now_ms=NOW_MS)
        with pytest.raises(TrustError) as caught:
            ceremony.check_change(founded, {"targets": repository.sign(targets, *team.targets)}, now_ms=NOW_MS)
        assert caught.value.code == "trust.keys"
    targets = ceremony.next_targets(before, {"models/digits": public(own)}, now_ms=NOW_MS)
    with_family = {**founded, "targets": repository.sign(targets, *team.targets)}
    for role in ("timestamp", "time"):
        root = ceremony.next_root(repository.read_root(founded["root"]), {role: public(own)}, now_ms=NOW_MS)
        with pytest.raises(TrustError) as caught:
            ceremony.check_change(with_family, {"root": repository.sign(root, *team.root)}, now_ms=NOW_MS)
        assert caught.value.code == "trust.keys"


def test_a_change_of_something_else_is_not_next(team: Team) -> None:
    founded = {role: text.encode() for role, text in team.founded().parts.items()}
    for role in ("root", "targets"):
        with pytest.raises(Conflict):
            ceremony.check_change(founded, {role: founded[role]}, now_ms=NOW_MS)


# What a signer's machine knows


def chain(team: Team, *, length: int) -> list[bytes]:
    roots = [team.founded().parts["root"].encode()]
    while len(roots) < length:
        following: Metadata[Root] = ceremony.next_root(repository.read_root(roots[-1]), {}, now_ms=NOW_MS)
        roots.append(repository.sign(following, *team.root[:2]))
    return roots


def test_a_machine_follows_the_roots_from_the_one_it_knows(team: Team) -> None:
    roots = chain(team, length=4)
    unsigned = repository.sign(repository.read_root(roots[0]))
    for known in (roots[0], roots[1], roots[3], unsigned):
        assert drafts.follow(known, roots).signed.version == 4
    assert drafts.follow(roots[1], roots[2:]).signed.version == 4


def test_attack_10_a_root_of_strangers_is_not_followed(team: Team) -> None:
    roots, others = chain(team, length=3), chain(Team(), length=4)
    thief = new_key()
    evil = ceremony.next_root(repository.read_root(roots[2]), {"root": public(thief)}, now_ms=NOW_MS)
    for known, offered in (
        (roots[0], others),
        (roots[2], [*roots[:2], others[2]]),
        (roots[2], [*roots, repository.sign(evil, thief)]),
        (roots[2], [*roots, repository.sign(evil, thief, team.root[0])]),
        (roots[2], roots[:2]),
        (roots[0], [roots[0], roots[2]]),
        (roots[0], []),
    ):
        with pytest.raises(TrustError) as caught:
            drafts.follow(known, offered)
        assert caught.value.code == "trust.root"


def test_who_has_signed_the_first_root_knows_it(team: Team) -> None:
    roots, others = chain(team, length=3), chain(Team(), length=2)
    mine = [team.root[0].public_key]
    found = drafts.own_first(roots, mine)
    assert found is not None
    assert found.to_bytes() == roots[0]
    drafts.follow(found.to_bytes(), roots)
    copied = json.loads(others[0])
    copied["signatures"].append(json.loads(roots[0])["signatures"][0])
    for offered, keys_here in (
        (roots, [team.root[2].public_key]),  # a root key that has not signed
        (roots, [team.targets[0].public_key, team.online["snapshot"].public_key]),
        (roots, []),
        (roots[1:], mine),
        (others, mine),
        ([json.dumps(copied).encode()], mine),
        ([], mine),
    ):
        assert drafts.own_first(offered, keys_here) is None


# Public halves


def test_a_public_half_is_carried_and_nothing_else_is_one() -> None:
    signer = new_key()
    data = keys.public_half("root", signer.public_key)
    assert keys.read_public_half(data) == ("root", signer.public_key)
    assert b"PRIVATE" not in data
    for other in (b"", b"{}", data.replace(b'"public"', b'"private"'), data[:-20] + b'"}', keys.new_private_pem()):
        with pytest.raises(InvalidValue) as caught:
            keys.read_public_half(other)
        assert "BEGIN" not in caught.value.message


def test_one_key_under_two_names_counts_once() -> None:
    signer = new_key()
    key = signer.public_key
    twin = SSlibKey("twin", key.keytype, key.scheme, {"public": key.keyval["public"].upper()})
    targets = repository.new_targets(now_ms=NOW_MS)
    signed = repository.read_targets(repository.sign(targets, signer, CryptoSigner(signer._private_key, twin)))
    held = RoleKeys(keys=(key, twin), threshold=2)
    assert len(authority.signed_by(held, signed)) == 1
