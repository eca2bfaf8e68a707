"""The room's decisions over plain values."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.releases import rules
from cloud_hub.releases.rules import Candidate, Gate, Push, Selector, Skipped
from shared import limits
from shared.errors import Conflict, InvalidValue, TrustError
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.model import FileRef, manifest_path
from shared.release import AssignedModel, Assignment

A, B = "a" * 64, "b" * 64
DAY_MS = 24 * 3600 * 1000


def push(**changes: Any) -> Push:
    fields = {"family": "digits", "version": "1.0.0", "model": A, "golden": B, "labels": ["x", "y"]}
    return msgspec.json.decode(msgspec.json.encode({**fields, **changes}), type=Push)


def model(family: str = "digits", version: str = "1.0.0") -> AssignedModel:
    path = manifest_path(FamilyName(family), ModelVersion(version))
    return AssignedModel(
        family=FamilyName(family),
        version=ModelVersion(version),
        manifest=FileRef(path=path, length=10, digest=Digest(A)),
    )


def candidate(name: str, **labels: str) -> Candidate:
    return Candidate(device=DeviceId(name), labels=labels, online=True, assignment_version=0)


def test_a_plain_push_is_taken() -> None:
    rules.check_push(push())
    rules.check_push(push(task="raw", labels=[], calibration=A))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "Digits"}, "family"),
        ({"version": "1"}, "semantic version"),
        ({"model": "a" * 63}, "SHA-256"),
        ({"calibration": "x"}, "SHA-256"),
        ({"labels": ["only"]}, "at least two labels"),
        ({"labels": ["x", "x"]}, "distinct"),
        ({"labels": ["x", ""]}, "1 to 200 characters"),
        ({"labels": [f"{number:05d}{'x' * 100}" for number in range(3000)]}, "a manifest of at most 262144 bytes"),
        ({"gate": {"max_drop_pt": -1}}, "gate.max_drop_pt"),
        ({"gate": {"min_accuracy": 1.5}}, "gate.min_accuracy"),
        ({"gate": {"min_agreement": -0.1}}, "gate.min_agreement"),
        ({"min_release_counter": -1}, "min_release_counter"),
        ({"signature": {"inputs": [], "outputs": []}}, "1 to 64 inputs"),
    ],
)
def test_an_unusable_push_is_refused_by_field(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        rules.check_push(push(**changes))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="max_drop"):
        push(gate={"max_drop": 1})


@given(st.lists(st.integers(1, 10**6), unique=True))
def test_counters_only_grow(counters: list[int]) -> None:
    following = rules.next_counter(counters)
    assert all(following > counter for counter in counters)
    assert following - max(counters, default=0) == 1


def test_a_used_up_counter_is_a_conflict() -> None:
    with pytest.raises(Conflict):
        rules.next_counter([rules.MAX_COUNTER])


def test_the_floor_stays_unless_asked_and_never_lies_above_the_release() -> None:
    assert rules.release_floor(wanted=None, present=3, counter=7) == 3
    assert rules.release_floor(wanted=0, present=3, counter=7) == 0
    assert rules.release_floor(wanted=7, present=3, counter=7) == 7
    with pytest.raises(InvalidValue, match="above the release's own counter 7"):
        rules.release_floor(wanted=8, present=3, counter=7)


def test_the_gate_decides_on_the_measured_drop() -> None:
    gate = Gate(max_drop_pt=1.0, min_accuracy=0.9)
    assert rules.gate_verdict(gate, accuracy=0.95, drop_pt=1.0) == ""
    assert rules.gate_verdict(gate, accuracy=0.95, drop_pt=100 * (0.96 - 0.95)) == ""
    assert "drops by 1.10 points" in rules.gate_verdict(gate, accuracy=0.95, drop_pt=1.1)
    assert "accuracy is 0.8999" in rules.gate_verdict(gate, accuracy=0.8999, drop_pt=0.0)
    assert rules.gate_verdict(Gate(), accuracy=0.1, drop_pt=-5.0) == ""


def test_metadata_must_list_exactly_what_was_built() -> None:
    built = [FileRef(path=f"models/digits/1.0.0/{name}", length=5, digest=Digest(A)) for name in ("m", "g")]
    rules.check_listed(built[::-1], release=built)
    for listed, code in (
        (built[:1], "trust.unknown_target"),
        ([*built, FileRef(path="models/digits/1.0.0/x", length=5, digest=Digest(A))], "trust.unknown_target"),
        ([built[0], msgspec.structs.replace(built[1], digest=Digest(B))], "trust.digest"),
        ([built[0], msgspec.structs.replace(built[1], length=6)], "trust.digest"),
    ):
        with pytest.raises(TrustError) as refusal:
            rules.check_listed(listed, release=built)
        assert refusal.value.code == code


def select(**fields: Any) -> tuple[tuple[DeviceId, ...], tuple[Skipped, ...]]:
    fleet = [candidate("a", site="x"), candidate("b", site="x", line="1"), candidate("c")]
    return rules.select(fleet, Selector(family=FamilyName("digits"), version=ModelVersion("1.0.0"), **fields))


def test_devices_are_selected_by_name_by_labels_or_all() -> None:
    assert select(all=True) == (("a", "b", "c"), ())
    assert select(labels={"site": "x"}) == (("a", "b"), ())
    assert select(labels={"site": "x", "line": "1"}) == (("b",), ())
    assert select(labels={"site": "y"}) == ((), ())
    assert select(devices=("c", "zz", "a", "c")) == (("c", "a"), (Skipped("zz", "unknown"),))


@pytest.mark.parametrize(
    "fields",
    [{}, {"devices": ()}, {"labels": {}}, {"all": True, "devices": ("a",)}, {"all": True, "labels": {"a": "b"}}],
)
def test_a_selector_says_exactly_one_thing(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="exactly one"):
        select(**fields)


def following(current: Assignment | None, wanted: AssignedModel | None, **changes: Any) -> Assignment | None:
    fields = {"device": DeviceId("a"), "seen": 0, "force": False, "now_ms": 1000, "ttl_ms": 500, **changes}
    return rules.next_assignment(current, () if wanted is None else (wanted,), **fields)


def test_families_that_change_together_are_a_set_until_they_are_taken_out_of_it() -> None:
    digits, faces, gaits = (FamilyName(name) for name in ("digits", "faces", "gaits"))
    sets = rules.sets_after((), [faces, digits], together=True)
    assert sets == ((digits, faces),)
    assert rules.sets_after(sets, [digits], together=None) == sets
    assert rules.sets_after(sets, [gaits, digits], together=True) == ((digits, gaits),)
    assert rules.sets_after(sets, [digits], together=False) == ()
    three = rules.sets_after((), [faces, digits, gaits], together=True)
    assert rules.sets_after(three, [faces], together=False) == ((digits, gaits),)


def test_an_assignment_keeps_its_sets_when_it_is_renewed_or_one_family_changes() -> None:
    first = rules.next_assignment(
        None, (model("digits"), model("faces")), device=DeviceId("a"), seen=0, force=False, now_ms=1000, ttl_ms=500,
        together=True,
    )  # fmt: skip
    assert first is not None
    assert first.together == (("digits", "faces"),)
    for wanted in (None, model("digits", "2.0.0")):
        after = following(first, wanted)
        assert after is not None
        assert after.together == first.together


@pytest.mark.parametrize("others", [["digits"], ["faces", "faces"], [f"f{number}" for number in range(16)]])
def test_a_selector_names_each_family_once_and_not_too_many(others: list[str]) -> None:
    named = tuple(rules.Named(family=FamilyName(name), version=ModelVersion("1.0.0")) for name in others)
    selector = Selector(family=FamilyName("digits"), version=ModelVersion("1.0.0"), together=named, all=True)
    with pytest.raises(InvalidValue, match="each once"):
        rules.named(selector)


def test_an_assignment_is_the_full_state_with_one_family_changed() -> None:
    first = following(None, model("digits"))
    assert first is not None
    assert (first.version, first.models, first.issued_ms, first.expires_ms) == (1, (model("digits"),), 1000, 1500)
    second = following(first, model("faces"), force=True)
    assert second is not None
    assert (second.version, second.force) == (2, ("faces",))
    assert second.models == (model("digits"), model("faces"))
    third = following(second, model("digits", "2.0.0"), seen=2)
    assert third is not None
    assert third.models == (model("digits", "2.0.0"), model("faces"))
    assert third.force == ()


def test_a_renewal_keeps_what_is_forced_until_the_device_has_seen_it() -> None:
    forced = following(None, model(), force=True)
    assert forced is not None
    unseen = following(forced, None, seen=0)
    assert unseen is not None
    assert (unseen.version, unseen.force) == (2, ("digits",))
    seen = following(forced, None, seen=1)
    assert seen is not None
    assert (seen.version, seen.force) == (2, ())


def test_versions_pass_what_the_device_has_seen_and_ignore_nonsense() -> None:
    current = following(None, model())
    assert current is not None
    ahead = following(current, None, seen=41)
    assert ahead is not None
    assert ahead.version == 42
    nonsense = following(current, None, seen=2**53 - 1)
    assert nonsense is not None
    assert nonsense.version == 2


def test_a_device_holds_a_bounded_number_of_models() -> None:
    current: Assignment | None = None
    for number in range(limits.MAX_MODELS_PER_DEVICE):
        current = following(current, model(f"family-{number}"))
        assert current is not None
    assert following(current, model("one-more")) is None
    assert following(current, model("family-3", "2.0.0")) is not None
    assert following(None, None) is None


def test_documents_are_due_at_half_of_their_life_and_when_the_clock_went_back() -> None:
    life = {"issued_ms": 1000, "expires_ms": 2000}
    assert not rules.is_due(**life, now_ms=1499)
    assert rules.is_due(**life, now_ms=1500)
    assert rules.is_due(**life, now_ms=999)
