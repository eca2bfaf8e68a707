"""What a device believes: metadata, assignments, keys and time (rows 1 to 5, 7, 8, 10 to 14, 18 to 21)."""

from __future__ import annotations

import json
from typing import Any, Final

from shared.model import decode_manifest
from shared.release import Floors
from shared.trust import strict
from tests.attacks.defence import Defence, against, always

_ATTACKS: Final = "tests/unit/trust/test_attacks.py::"
_REFRESH: Final = "tests/unit/trust/test_refresh.py::"
_KEYS: Final = "tests/unit/trust/test_refresh_keys.py::"
_BYTES: Final = "tests/unit/trust/test_refresh_bytes.py::"
_ASSIGNMENT: Final = "tests/unit/trust/test_assignment.py::"
_FLOORS: Final = "tests/unit/trust/test_floors.py::"
_TIME: Final = "tests/unit/trust/test_time.py::"
_CHANGES: Final = "tests/unit/releases/test_key_changes.py::"
_DRAFTS: Final = "tests/unit/trust/test_drafts.py::"

_SIGNATURES: Final = "shared.trust.metadata.check_signatures"
_LISTED: Final = "shared.trust.refresh.check_listed"


def _any_json(data: bytes, **_: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(data)
    return document


_parse_json: Final = strict.parse_json


def _bounded_nowhere(data: bytes, *, what: str, max_bytes: int, floats: bool = False) -> dict[str, Any]:
    return _parse_json(data, what=what, max_bytes=2**40, floats=floats)


def _of_no_key(what: str, _root: Any) -> str:
    return f"{what}@"


DEFENCES: Final[tuple[Defence, ...]] = (
    against(1, _KEYS + "test_metadata_signed_by_another_key_is_refused", _SIGNATURES),
    against(1, _ATTACKS + "test_a_hub_in_other_hands_cannot_bring_a_model_of_its_own", _LISTED),
    against(
        1,
        _KEYS + "test_a_key_that_signs_twice_under_two_names_counts_once",
        ("shared.trust.metadata.key_material", lambda key: key.keyid),
    ),
    against(
        1,
        _ASSIGNMENT + "test_an_assignment_must_be_signed_by_a_key_that_the_root_authorises",
        "shared.trust.assignment.check_threshold",
    ),
    against(
        2,
        _BYTES + "test_more_bytes_than_promised_are_refused",
        "shared.trust.client.check_length",
        "shared.trust.metadata.check_promise",
    ),
    against(
        2,
        _BYTES + "test_an_endless_assignment_is_refused",
        ("shared.trust.strict.parse_json", _bounded_nowhere),
    ),
    against(3, _ATTACKS + "test_files_that_only_the_manifest_names_are_not_taken", _LISTED),
    against(
        4,
        _KEYS + "test_a_fast_forwarded_fleet_is_freed_by_new_keys",
        ("shared.trust.metadata.key_set", always(frozenset())),
    ),
    against(
        4,
        _CHANGES + "test_attack_4_fast_forward_by_a_stolen_timestamp_key_is_undone_by_a_new_one",
        ("shared.trust.metadata.key_set", always(frozenset())),
    ),
    against(5, _REFRESH + "test_expired_metadata_is_refused", "shared.trust.metadata.check_fresh"),
    against(5, _ATTACKS + "test_a_frozen_hub_is_noticed_whatever_the_clock_says", "shared.trust.metadata.check_fresh"),
    against(5, _TIME + "test_indefinite_freeze_whatever_the_clock_says", "shared.trust.time.check_attested"),
    against(
        5,
        _TIME + "test_expired_metadata_and_a_clock_of_1970_where_no_time_is_attested",
        "shared.trust.metadata.check_fresh",
    ),
    against(
        5,
        "tests/unit/core/test_trusted_time.py::test_what_is_known_to_have_passed_has_passed",
        ("edge_agent.core.trusted_time.now_ms", lambda time, *, wall_ms, boot_ms: wall_ms),
    ),
    against(
        5,
        "tests/unit/edge_agent/test_tls.py::test_the_trusted_time_decides_and_not_the_system_clock",
        "edge_agent.adapters.tls.check_dates",
    ),
    against(
        5, _ATTACKS + "test_an_old_assignment_is_refused_beside_fresh_metadata", "shared.trust.assignment.check_expiry"
    ),
    against(
        4,
        _FLOORS + "test_attack_4_an_assignment_that_was_pushed_up_as_far_as_numbers_go_binds_no_new_key",
        ("shared.trust.floors._name", _of_no_key),
    ),
    against(
        4,
        _FLOORS + "test_attack_4_a_time_that_a_thief_has_pushed_ahead_binds_no_new_key",
        ("shared.trust.floors._name", _of_no_key),
    ),
    against(
        4,
        _FLOORS + "test_attack_4_an_assignment_from_the_future_is_refused_where_the_time_is_attested",
        "shared.trust.floors.check_issued",
    ),
    against(7, _REFRESH + "test_a_second_file_of_the_same_version_is_refused", "shared.trust.metadata.check_promise"),
    against(
        7,
        _REFRESH + "test_a_version_that_is_not_the_promised_one_is_refused_without_hashes_too",
        "shared.trust.client._check_promised_version",
    ),
    against(
        7,
        _REFRESH + "test_mixed_versions_are_refused",
        "shared.trust.metadata.check_promise",
        "shared.trust.client._check_promised_version",
    ),
    against(8, _REFRESH + "test_rollback_is_refused", "shared.trust.metadata.check_version"),
    against(8, _ATTACKS + "test_floors_outlive_the_cache", "shared.trust.metadata.check_version"),
    against(
        8, _ATTACKS + "test_a_targets_floor_is_kept_through_new_snapshot_keys", "shared.trust.metadata.check_version"
    ),
    against(
        8, _REFRESH + "test_an_older_release_may_be_assigned_above_the_security_floor", "shared.trust.refresh.check_fit"
    ),
    against(8, _ASSIGNMENT + "test_an_older_assignment_is_refused", "shared.trust.assignment.check_newer"),
    against(
        8,
        _ASSIGNMENT + "test_another_assignment_of_the_same_version_is_refused",
        "shared.trust.assignment._check_same",
    ),
    against(
        8,
        "tests/unit/edge_agent/test_broken_disk.py::test_floors_that_cannot_be_read_are_lost_and_not_zero",
        ("edge_agent.adapters.ledger._floors", always(Floors())),
    ),
    against(10, _ATTACKS + "test_one_root_key_of_three_makes_no_root", _SIGNATURES),
    against(10, _ATTACKS + "test_a_single_key_of_another_role_signs_no_targets", _SIGNATURES),
    against(10, _CHANGES + "test_attack_10_each_single_key_fails_to_change_a_key", _SIGNATURES),
    against(
        10,
        _CHANGES + "test_attack_10_the_old_threshold_and_the_new_one_must_both_have_signed",
        "shared.trust.ceremony.require_signed",
    ),
    against(
        10,
        _CHANGES + "test_attack_10_a_release_below_its_familys_threshold_is_refused",
        "shared.trust.publication.require_signed",
    ),
    against(
        10,
        _CHANGES + "test_attack_10_a_family_changes_hands_only_by_the_targets_keys",
        "shared.trust.ceremony.require_signed",
    ),
    against(10, _DRAFTS + "test_attack_10_a_root_of_strangers_is_not_followed", _SIGNATURES),
    against(
        10,
        _DRAFTS + "test_attack_10_a_forged_basis_does_not_pass_for_what_there_was",
        "shared.trust.ceremony._check_basis",
    ),
    against(
        10,
        _DRAFTS + "test_a_familys_key_is_never_an_online_key",
        "shared.trust.publication.check_family_keys",
    ),
    against(
        10,
        "tests/unit/cli/test_key_ceremony.py::test_a_draft_of_strangers_is_not_signed",
        "cloud_hub.commands.keys._require_known",
    ),
    against(
        11,
        _ATTACKS + "test_a_signed_manifest_under_another_name_is_refused",
        _LISTED,
        ("shared.trust.refresh.open_manifest", lambda data, _assigned: decode_manifest(data)),
    ),
    against(
        12,
        _ATTACKS + "test_a_chain_of_delegations_is_followed_so_far_and_no_further",
        "shared.trust.client.check_depth",
    ),
    against(12, _ATTACKS + "test_in_a_diamond_each_side_must_stand_behind_the_shared_role", _SIGNATURES),
    against(
        13,
        _KEYS + "test_a_role_name_never_becomes_a_path",
        ("shared.trust.roles.quote", lambda text, safe="": text),
    ),
    against(
        13,
        _ATTACKS + "test_a_manifest_cannot_name_a_file_outside_its_release",
        "shared.model.check_place",
        _LISTED,
    ),
    against(
        14,
        _ATTACKS + "test_json_that_can_be_read_in_two_ways_is_refused_before_any_signature",
        ("shared.trust.strict.parse_json", _any_json),
        _SIGNATURES,
    ),
    against(
        14,
        _ATTACKS + "test_signed_oddities_do_not_pass_for_their_signature",
        "shared.trust.strict.check_metadata",
        _LISTED,
    ),
    against(
        18,
        _ATTACKS + "test_an_assignment_replayed_to_another_device_is_refused",
        "shared.trust.assignment.check_device",
    ),
    against(19, _ATTACKS + "test_a_hub_in_other_hands_cannot_bring_a_model_of_its_own", _SIGNATURES),
    against(19, _CHANGES + "test_attack_19_the_hubs_own_keys_make_no_release", _SIGNATURES),
    against(20, _TIME + "test_time_attestation_replayed", "shared.trust.time.check_question"),
    against(20, _TIME + "test_time_attestation_of_another_device", "shared.trust.time.check_asker"),
    against(
        20,
        _TIME + "test_time_attestation_by_a_key_that_is_for_something_else",
        "shared.trust.time.check_threshold",
    ),
    against(
        20,
        _TIME + "test_time_attestation_by_a_stranger_under_the_right_key_identifier",
        "shared.trust.time.check_threshold",
    ),
    against(20, _TIME + "test_time_attestation_altered_after_signing", "shared.trust.time.check_threshold"),
    against(20, _TIME + "test_time_attestation_of_an_impossible_time", "shared.trust.time.check_possible"),
    against(20, _TIME + "test_time_attestation_below_what_signed_documents_prove", "shared.trust.time.check_possible"),
    against(20, _TIME + "test_time_attestation_dropped_is_no_leave_to_go_on", "shared.trust.time.check_attested"),
    against(
        21,
        _ATTACKS + "test_a_release_for_other_hardware_is_refused_whatever_the_hub_says",
        "shared.trust.refresh.check_fit",
    ),
)
