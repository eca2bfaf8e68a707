"""What a device does with what comes: transfers, hosts of models, disks, power (rows 2, 6, 9, 16, 17, 33 to 36)."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from edge_agent.core import offering, slot_moves
from edge_agent.core.slot_values import Slot
from shared.release import VerifiedAssignment
from tests.attacks.defence import Defence, against, always

_FETCHER: Final = "tests/unit/edge_agent/test_fetcher.py::"
_SHELF: Final = "tests/unit/edge_agent/test_shelf_power.py::"
_BRINGING: Final = "tests/unit/driver/test_bringing.py::"
_SETS: Final = "tests/machines/test_sets.py::"
_SLOTS: Final = "tests/machines/test_slots.py::"
_PATCH: Final = "tests/unit/shared/patch/test_patch.py::"
_FIRST: Final = "tests/unit/host/test_gate_first.py::"
_GATE: Final = "tests/unit/shared/test_model_gate.py::"
_CRASHING: Final = "tests/machines/test_attack_36_slots.py::"
_BROKEN: Final = "tests/unit/edge_agent/test_broken_disk.py::"


def _unbounded(_call: Any, response: Any, *, limit: int) -> Any:
    return iter(lambda: response.read1(65536), b"")


def _one_by_one(verified: VerifiedAssignment, *rest: Any) -> Any:
    return _offers(replace(verified, assignment=replace(verified.assignment, together=())), *rest)


_offers = offering.offers


def _forgiving(state: Slot, code: str, message: str) -> Any:
    return slot_moves.go_back(state, code, message, quarantine=state.quarantine)


def _alone(_states: Any, family: Any, event: Any) -> Any:
    return [(family, event)]


DEFENCES: Final[tuple[Defence, ...]] = (
    against(
        2,
        "tests/contracts/test_fetcher_contract.py::"
        "test_attack_2_and_6_what_is_not_the_file_is_corrupt_and_gets_no_name[https-None-too long]",
        ("edge_agent.adapters.fetcher._Call.chunks", _unbounded),
    ),
    against(
        6,
        "tests/unit/edge_agent/test_sources.py::test_attack_6_whatever_a_mirror_does_the_file_comes_from_the_hub",
        ("edge_agent.adapters.sources.TransferError", StopAsyncIteration),
    ),
    against(
        9,
        _FETCHER + "test_attack_9_a_server_just_above_the_stall_rule_meets_a_deadline_that_grows_with_the_length",
        ("edge_agent.adapters.fetcher.GRACE_STALLS", 10**9),
    ),
    against(
        9,
        _FETCHER + "test_a_server_that_drips_is_given_up",
        ("edge_agent.adapters.fetcher.MIN_PROGRESS", 0),
        may_hang=True,
    ),
    against(
        9,
        _BRINGING + "test_what_comes_wrong_is_fetched_once_more_and_then_left_alone_across_restarts",
        ("edge_agent.core.spending.barred_ms", always(0)),
    ),
    against(
        16,
        "tests/machines/test_rollout_machine.py::test_a_device_that_goes_silent_over_the_release_is_harmed",
        ("cloud_hub.rollouts.stages.silence_ms", always(0)),
    ),
    against(
        17,
        _SETS + "test_attack_17_partial_bundle_the_second_of_three_fails_and_none_is_switched",
        ("edge_agent.core.offering.offers", _one_by_one),
    ),
    against(33, _GATE + "test_hostile_litert_is_refused", "shared.model_gate.check_litert"),
    against(33, _GATE + "test_hostile_onnx_is_refused", "shared.model_gate.check_onnx"),
    against(
        33,
        _GATE + "test_what_is_no_graph_is_named",
        ("shared.model_gate.foreign_format", always("")),
        "shared.model_gate.check_onnx",
        "shared.model_gate.check_litert",
    ),
    against(33, _FIRST + "test_a_host_admits_before_its_runtime_opens", "edge_agent.host.child.check_model"),
    against(33, _FIRST + "test_a_trainer_admits_before_its_runtime_opens", "edge_agent.trainers.child.check_model"),
    against(33, _FIRST + "test_the_hub_admits_before_its_runtime_opens", "shared.model_gate.check_model"),
    against(33, _PATCH + "test_delta_out_of_bounds_seek_is_refused", "shared.patch.applying.check_read"),
    against(33, _PATCH + "test_delta_that_makes_more_than_promised_is_refused", "shared.patch.applying.check_made"),
    against(
        33,
        _PATCH + "test_delta_bomb_of_dictionaries_is_refused",
        "shared.patch.applying.check_memory",
        ("shared.patch.format.STREAM_MEMORY_BYTES", 2**40),
    ),
    against(33, _PATCH + "test_the_unpacker_itself_is_bounded", ("shared.patch.format.STREAM_MEMORY_BYTES", 2**40)),
    against(33, _PATCH + "test_a_patch_for_another_base_or_result_is_refused", "shared.patch.applying.check_terms"),
    against(
        33,
        _SHELF + "test_attack_33_a_file_that_is_exchanged_between_hash_and_rename_gets_no_name",
        "edge_agent.adapters.shelf._require_same",
    ),
    against(
        34,
        _SHELF + "test_attack_34_after_a_power_cut_at_every_write_the_file_is_there_whole_or_not_at_all",
        "edge_agent.adapters.shelf._sync_directory",
    ),
    against(
        34,
        "tests/machines/test_slot_crashes.py::test_power_cuts_in_every_probation_end_in_a_rollback",
        ("edge_agent.core.slot_steps.MAX_LOADS", 10**9),
        ("edge_agent.core.slot_steps.MAX_TRANSITIONS", 10**9),
    ),
    against(
        34,
        "tests/machines/test_set_crashes.py::test_attack_34_power_cut_at_every_write_ends_with_all_old_or_all_new",
        ("edge_agent.core.offering.offers", _one_by_one),
    ),
    against(
        35,
        _SHELF + "test_attack_35_a_bit_that_rots_is_found_before_the_file_is_loaded",
        "edge_agent.adapters.shelf._verify",
    ),
    against(
        35,
        _BRINGING + "test_what_finds_no_room_is_refused_before_a_byte_is_fetched_and_comes_when_there_is_some",
        ("edge_agent.driver.bringing.against_room", always("")),
    ),
    against(
        35,
        _SETS + "test_attack_35_bit_rot_or_distrust_of_one_takes_all_back_without_quarantine",
        ("edge_agent.core.sets._widened", _alone),
    ),
    against(
        35,
        _SLOTS + "test_files_that_the_disk_changes_are_fetched_again_and_then_given_up_without_blame",
        ("edge_agent.core.slot_steps.MAX_REFETCHES", 10**9),
        ("edge_agent.core.slot_steps.MAX_TRANSITIONS", 10**9),
    ),
    against(
        36,
        _CRASHING + "test_attack_36_a_model_that_crashes_when_it_is_loaded_is_given_up_and_never_serves",
        ("edge_agent.core.slot_steps.MAX_LOADS", 10**9),
    ),
    against(
        36,
        _CRASHING + "test_attack_36_a_model_that_crashes_on_trial_is_given_up_and_not_taken_again",
        ("edge_agent.core.slot_steps.give_up", _forgiving),
    ),
    against(
        36,
        _CRASHING + "test_attack_36_a_committed_model_that_crashes_is_started_ever_more_slowly_and_told",
        ("edge_agent.core.slot_steps.backoff_ms", always(0)),
    ),
)
