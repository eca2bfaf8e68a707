"""What a thief of the hub's learned key cannot do: the opt-in delegation of docs/keys.md (rows 10 and 19)."""

from __future__ import annotations

from typing import Final

from tests.attacks.defence import Defence, against

_LEARNED: Final = "tests/unit/trust/test_learned_releases.py::"
_ORIGIN: Final = ("shared.trust.refresh.check_origin", "shared.trust.stored.check_origin")
_LISTED: Final = ("shared.trust.refresh.check_listed", "shared.trust.stored.check_listed")
_MANIFEST: Final = "shared.trust.refresh.check_learned_manifest"
_DELEGATIONS: Final = "shared.trust.publication.check_learned_delegations"


async def _passes(*_: object, **__: object) -> None:
    return None


DEFENCES: Final[tuple[Defence, ...]] = (
    against(10, _LEARNED + "test_only_the_plain_delegation_is_published", _DELEGATIONS),
    against(10, _LEARNED + "test_a_change_of_keys_lets_no_other_delegation_in", _DELEGATIONS),
    against(10, _LEARNED + "test_the_key_of_the_targets_or_of_the_root_is_not_the_hubs", _DELEGATIONS),
    against(19, _LEARNED + "test_a_device_that_did_not_opt_in_takes_none", *_ORIGIN),
    against(19, _LEARNED + "test_a_release_without_a_base_is_nobodys_but_a_persons", *_ORIGIN),
    against(19, _LEARNED + "test_a_base_that_the_thief_made_himself_is_none", *_ORIGIN),
    against(19, _LEARNED + "test_what_was_learned_is_no_base", _MANIFEST),
    against(19, _LEARNED + "test_labels_floors_counters_profiles_and_preparations_are_the_bases", _MANIFEST),
    against(19, _LEARNED + "test_the_golden_set_is_the_bases", _MANIFEST),
    against(19, _LEARNED + "test_a_base_with_bounds_of_the_thiefs_is_not_the_one_that_was_signed", *_LISTED),
    against(19, _LEARNED + "test_another_family_is_out_of_reach", *_LISTED),
    against(19, _LEARNED + "test_after_the_delegation_was_withdrawn_nothing_is_installed", *_LISTED),
    against(19, _LEARNED + "test_a_stolen_key_cannot_sign_for_years", "shared.trust.refresh.check_life"),
    against(
        19,
        "tests/live/test_comparer_live.py::test_a_head_beyond_its_bound_is_refused",
        ("edge_agent.adapters.comparer.LiveComparer.compare", _passes),
    ),
    against(
        19,
        "tests/live/test_comparer_live.py::test_another_graph_is_refused",
        ("edge_agent.adapters.comparer.LiveComparer.compare", _passes),
    ),
)
