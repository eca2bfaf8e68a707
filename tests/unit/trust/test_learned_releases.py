"""What who stole the hub's key for learned releases cannot do, each by a whole refresh of a device.

The thief has all that lies on the hub: the keys of snapshot, timestamp and assignments too. What is left to him is to
move the head within the bound on devices that opted in (tests/unit/edge_agent/test_comparer.py has the file's side).
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from msgspec.structs import replace

from shared.errors import TrustError
from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import FileRef, Golden, Learning, Manifest, Preparation, encode_manifest, target_path
from shared.release import VerifiedAssignment
from shared.trust import ceremony, publication, stored
from shared.trust import repository as repo
from shared.trust.library import DelegatedRole, Delegations, Metadata, TargetFile, Targets
from shared.trust.roles import family_role, learned_paths, learned_role
from shared.wire.verification import Judged, StoredJob, StoredRelease
from tests.fakes.trust_repository import DIGITS, NOW_MS, Device, TrustRepository, make_manifest, promise_again

BOUNDS = Learning(variant="int8", tensors=("head.weight",), max_shift=2.0)
BASE = replace(make_manifest(), learning=BOUNDS)
LEARNED = ("digits", "1.1.0-learned.1")


def learned(base: Manifest = BASE, version: str = LEARNED[1], **changes: Any) -> Manifest:
    """An honest learned release: the base with another file of the same length."""
    number = ModelVersion(version)

    def at(file: FileRef, data: bytes | None = None) -> FileRef:
        digest = file.digest if data is None else Digest(hashlib.sha256(data).hexdigest())
        return replace(file, path=target_path(base.family, number, file.path.split("/")[-1]), digest=digest)

    variant = replace(base.variants[0], file=at(base.variants[0].file, b"INT8 MODEL"), accuracy=0.5, answers=(1, 1))
    made = replace(
        base,
        version=number,
        variants=(variant,),
        golden=replace(base.golden, file=at(base.golden.file)),
        learning=None,
        base=repo.manifest_ref(base),
    )
    return replace(made, **changes)


@pytest.fixture
def hub() -> TrustRepository:
    made = TrustRepository()
    made.release(BASE)
    made.allow_learned()
    return made


@pytest.fixture
def device(hub: TrustRepository) -> Device:
    made = Device(hub.first_root)
    made.accept_learned = True
    return made


def install(hub: TrustRepository, device: Device, *release: str) -> VerifiedAssignment:
    family, version = release or LEARNED
    return device.verify(hub.assign((family, version)), hub.serve)


def refusal(hub: TrustRepository, device: Device, *release: str) -> str:
    before = device.floors
    with pytest.raises(TrustError) as caught:
        install(hub, device, *release)
    assert caught.value.hint or caught.value.code == "trust.malformed"
    assert device.floors == before
    return caught.value.code


def test_a_learned_release_comes_with_what_its_file_is_held_against(hub: TrustRepository, device: Device) -> None:
    hub.learn(learned())
    (model,) = install(hub, device).models
    assert model.manifest == learned()
    assert model.ground is not None
    assert (model.ground.file, model.ground.bounds) == (BASE.variants[0].file, BOUNDS)


def test_a_release_that_a_person_signed_has_no_ground(hub: TrustRepository, device: Device) -> None:
    (model,) = install(hub, device, "digits", "1.0.0").models
    assert model.ground is None


def test_a_person_may_sign_what_was_learned_without_the_hub(hub: TrustRepository, device: Device) -> None:
    hub.learn(learned())
    hub.release(learned(version="1.2.0-learned.1"))
    hub.allow_learned(allowed=False)
    (model,) = install(hub, device, "digits", "1.2.0-learned.1").models
    assert model.ground is not None


def test_a_device_that_did_not_opt_in_takes_none(hub: TrustRepository, device: Device) -> None:
    hub.learn(learned())
    device.accept_learned = False
    assert refusal(hub, device) == "trust.learned_refused"
    hub.release(learned(version="1.2.0-learned.1"))
    assert refusal(hub, device, "digits", "1.2.0-learned.1") == "trust.learned_refused"
    install(hub, device, "digits", "1.0.0")


def test_a_release_without_a_base_is_nobodys_but_a_persons(hub: TrustRepository, device: Device) -> None:
    hub.learn(make_manifest("2.0.0-x-learned.1"))
    assert refusal(hub, device, "digits", "2.0.0-x-learned.1") == "trust.learned"


def test_a_plain_version_is_not_the_hubs_to_sign(hub: TrustRepository, device: Device) -> None:
    hub.learn(make_manifest("2.0.0"))
    assert refusal(hub, device, "digits", "2.0.0") == "trust.unknown_target"


def test_a_base_that_the_thief_made_himself_is_none(hub: TrustRepository, device: Device) -> None:
    own = replace(make_manifest("1.0.0-x-learned.1"), learning=replace(BOUNDS, max_shift=1e9))
    hub.learn(own)
    hub.learn(learned(own))
    assert refusal(hub, device) == "trust.learned"


def test_delegating_further_under_a_familys_name_makes_no_person(hub: TrustRepository, device: Device) -> None:
    """The hub's role delegates to a key of the thief's that it calls `models/digits`, which lists a base of his."""
    own = replace(make_manifest("1.0.0-x-learned.1"), learning=replace(BOUNDS, max_shift=1e9))
    hub.learn(learned(own))
    key = hub.keys["learned"][0].public_key
    name = family_role(DIGITS)
    forged = hub.roles[learned_role(DIGITS)].signed
    role = DelegatedRole(name, [key.keyid], 1, terminating=True, paths=[learned_paths(DIGITS)])
    forged.delegations = Delegations(keys={key.keyid: key}, roles={name: role})
    hub.roles[name] = repo.add_release(hub.roles[name], own, now_ms=hub.now_ms)
    ref = repo.manifest_ref(own)
    hub.files[ref.path] = encode_manifest(own)
    hub.publish()
    hub.store(name, hub.roles[name], hub.keys["learned"][0])
    promise_again(hub)
    assert refusal(hub, device) == "trust.learned"


def test_what_was_learned_is_no_base(hub: TrustRepository, device: Device) -> None:
    first = learned()
    hub.learn(first)
    hub.learn(learned(first, version="1.2.0-learned.1"))
    assert refusal(hub, device, "digits", "1.2.0-learned.1") == "trust.learned"


def test_nothing_is_learned_on_a_base_that_a_person_did_not_open(hub: TrustRepository, device: Device) -> None:
    closed = make_manifest("2.0.0", counter=2)
    hub.release(closed)
    hub.learn(learned(closed))
    assert refusal(hub, device) == "trust.learned"


def test_a_base_that_is_not_released_is_none(hub: TrustRepository, device: Device) -> None:
    never = replace(make_manifest("3.0.0"), learning=BOUNDS)
    hub.files[repo.manifest_ref(never).path] = encode_manifest(never)
    hub.learn(learned(never))
    assert refusal(hub, device) == "trust.unknown_target"


def test_a_base_with_bounds_of_the_thiefs_is_not_the_one_that_was_signed(hub: TrustRepository, device: Device) -> None:
    wider = replace(BASE, learning=replace(BOUNDS, max_shift=1e9))
    hub.files[repo.manifest_ref(wider).path] = encode_manifest(wider)
    hub.learn(learned(wider))
    assert refusal(hub, device) == "trust.digest"


def test_another_family_is_out_of_reach(hub: TrustRepository, device: Device) -> None:
    cats = FamilyName("cats")
    base = replace(make_manifest(family="cats"), learning=BOUNDS)
    hub.release(base)
    hub.learn(learned(base))  # listed by learned/digits, which speaks of digits only
    assert refusal(hub, device, "cats", LEARNED[1]) == "trust.unknown_target"
    hub.learn(learned(base), family=cats)  # and learned/cats nobody allowed
    assert refusal(hub, device, "cats", LEARNED[1]) == "trust.unknown_target"


def test_a_base_of_another_family_is_none(hub: TrustRepository, device: Device) -> None:
    cats = replace(make_manifest(family="cats"), learning=BOUNDS)
    hub.release(cats)
    forged = replace(learned(), base=repo.manifest_ref(cats))
    role = learned_role(DIGITS)
    hub.learn(learned())
    ref = repo.manifest_ref(forged)
    data = encode_manifest(forged)
    hub.files[ref.path] = data
    hub.manifests[LEARNED] = forged
    hub.roles[role].signed.targets[ref.path] = TargetFile(len(data), {"sha256": ref.digest}, ref.path)
    hub.publish()
    assert refusal(hub, device) == "trust.malformed"


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("yes", "no")},
        {"min_release_counter": 1},
        {"release_counter": 7},
        {"profiles": ("x86-gateway",)},
        {"preparations": (Preparation(input="x", scale=2.0),)},
        {"task": "raw"},
    ],
)
def test_labels_floors_counters_profiles_and_preparations_are_the_bases(
    hub: TrustRepository, device: Device, changes: dict[str, Any]
) -> None:
    hub.learn(learned(**changes))
    assert refusal(hub, device) == "trust.learned"


def test_the_golden_set_is_the_bases(hub: TrustRepository, device: Device) -> None:
    honest = learned()

    def with_golden(golden: Golden, version: str) -> Manifest:
        made = learned(version=version)
        return replace(made, golden=replace(golden, file=replace(golden.file, path=made.golden.file.path)))

    easier = with_golden(replace(honest.golden, min_agreement=0.0), "1.1.0-learned.2")
    other = with_golden(
        replace(honest.golden, file=replace(honest.golden.file, digest=Digest("d" * 64))), "1.1.0-learned.3"
    )
    for manifest in (easier, other):
        hub.learn(manifest)
        assert refusal(hub, device, "digits", manifest.version) == "trust.learned"


def test_a_security_floor_that_withdrew_the_base_withdrew_what_was_learned_on_it(
    hub: TrustRepository, device: Device
) -> None:
    hub.release(make_manifest("2.0.0", counter=2, floor=2))
    install(hub, device, "digits", "2.0.0")
    hub.learn(learned())
    assert refusal(hub, device) == "trust.rollback"
    hub.learn(learned(version="1.2.0-learned.1", release_counter=2))
    assert refusal(hub, device, "digits", "1.2.0-learned.1") == "trust.learned"


def test_a_stolen_key_cannot_sign_for_years(hub: TrustRepository, device: Device) -> None:
    hub.learn(learned(), days=15)
    assert refusal(hub, device) == "trust.learned"
    hub.roles[learned_role(DIGITS)].signed.expires = repo.in_days(NOW_MS, 14)
    hub.publish()
    install(hub, device)


def test_what_has_expired_is_not_installed_and_people_are_not_held_up(hub: TrustRepository, device: Device) -> None:
    hub.learn(learned(), days=-1)
    assert refusal(hub, device) == "trust.freeze"
    install(hub, device, "digits", "1.0.0")


def test_after_the_delegation_was_withdrawn_nothing_is_installed(hub: TrustRepository, device: Device) -> None:
    hub.learn(learned())
    hub.allow_learned(allowed=False)
    assert refusal(hub, device) == "trust.unknown_target"
    # The thief serves on with what he has; older targets are a rollback for who has seen the newer.
    hub.learn(learned(version="1.2.0-learned.1"))
    assert refusal(hub, device, "digits", "1.2.0-learned.1") == "trust.unknown_target"


def test_another_key_than_the_one_that_was_allowed_signs_nothing(hub: TrustRepository, device: Device) -> None:
    hub.keys["learned"] = hub.keys["snapshot"]
    hub.learn(learned())
    assert refusal(hub, device) == "trust.signature"


def judged(device: Device, *, accept: bool) -> Judged:
    ref = repo.manifest_ref(learned())
    release = StoredRelease(
        family=DIGITS, version=ModelVersion(LEARNED[1]), digest=ref.digest, data=device.manifests[ref.digest]
    )
    return stored.judge(
        StoredJob(
            document=device.previous,
            device=device.name,
            profile=device.profile,
            root=device.root,
            cache=device.cache,
            floors=device.floors,
            releases=(release,),
            accept_learned=accept,
        )
    )


def test_at_the_next_start_what_was_learned_holds_only_where_it_is_still_wanted_and_allowed(
    hub: TrustRepository, device: Device
) -> None:
    hub.learn(learned())
    install(hub, device)
    assert judged(device, accept=True) == Judged(refused={}, undecided={})
    assert [said.code for said in judged(device, accept=False).refused.values()] == ["trust.learned_refused"]
    hub.allow_learned(allowed=False)
    install(hub, device, "digits", "1.0.0")
    device.cache["targets"] = repo.sign(hub.targets, *hub.keys["targets"])
    assert [said.code for said in judged(device, accept=True).refused.values()] == ["trust.unknown_target"]


# What the hub lets through


def check(hub: TrustRepository, targets: Metadata[Targets]) -> None:
    publication.check_learned_delegations(targets, hub.root.signed)


def test_only_the_plain_delegation_is_published(hub: TrustRepository) -> None:
    check(hub, hub.targets)
    for change in ("paths", "terminating", "order", "key"):
        targets = repo.delegate_learned(hub.targets, DIGITS, hub.keys["learned"][0].public_key, now_ms=NOW_MS)
        assert targets.signed.delegations is not None
        roles = targets.signed.delegations.roles
        assert roles is not None
        name = learned_role(DIGITS)
        if change == "paths":
            roles[name].paths = ["models/digits/*/*"]
        elif change == "terminating":
            roles[name].terminating = True
        elif change == "order":
            roles[name] = roles.pop(name)
        else:
            key = hub.keys["release"][0].public_key
            targets = repo.delegate_learned(hub.targets, DIGITS, key, now_ms=NOW_MS)
        with pytest.raises(TrustError) as caught:
            check(hub, targets)
        assert caught.value.code == "trust.delegation"


def test_a_change_of_keys_lets_no_other_delegation_in(hub: TrustRepository) -> None:
    current = {
        "root": hub.first_root,
        "targets": repo.sign(hub.targets, *hub.keys["targets"]),
        family_role(DIGITS): repo.sign(hub.roles[family_role(DIGITS)], *hub.keys["release"]),
    }

    def change(targets: Metadata[Targets]) -> None:
        parts = {"targets": repo.sign(targets, *hub.keys["targets"])}
        ceremony.check_change(current, parts, now_ms=NOW_MS)

    change(repo.delegate_learned(hub.targets, DIGITS, hub.keys["time"][0].public_key, now_ms=NOW_MS))
    change(repo.delegate_learned(hub.targets, DIGITS, None, now_ms=NOW_MS))
    wider = repo.delegate_learned(hub.targets, DIGITS, hub.keys["learned"][0].public_key, now_ms=NOW_MS)
    assert wider.signed.delegations is not None
    assert wider.signed.delegations.roles is not None
    wider.signed.delegations.roles[learned_role(DIGITS)].paths = ["models/digits/*/*"]
    with pytest.raises(TrustError, match="more than learned"):
        change(wider)


def test_the_key_of_the_targets_or_of_the_root_is_not_the_hubs(hub: TrustRepository) -> None:
    for role in ("root", "targets"):
        with pytest.raises(TrustError, match="more than learned"):
            check(hub, repo.delegate_learned(hub.targets, DIGITS, hub.keys[role][0].public_key, now_ms=NOW_MS))
