"""The planted faults: what somebody might well write, and what the simulator must notice within 2,000 seeds.

A fault takes the place of a part of the world (faulty_parts.py), or of attributes of the journal's modules and classes
while it lasts (faulty_journal.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from cloud_hub.telemetry import taking
from tests.fakes.telemetry_store import MemoryTransaction
from tests.sim import faulty_journal as journal
from tests.sim import faulty_parts as wrong
from tests.sim import hub as hub_module
from tests.sim.fault import Fault, Patch
from tests.sim.parts import Parts


def _part(**changed: Any) -> Callable[[Parts], Parts]:
    return lambda parts: replace(parts, **changed)


def _fault(what: str, profile: str, shows_as: str, patches: tuple[Patch, ...] = (), **parts: Any) -> Fault:
    return Fault(
        what=what, profile=profile, shows_as=frozenset(shows_as.split()), parts=_part(**parts), patches=patches
    )


def _store(kind: Any) -> tuple[Patch, ...]:
    return (Patch(hub_module, "MemoryTransaction", lambda _: kind),)


def _gaps_over_records() -> tuple[Patch, ...]:
    """What is here is not looked at when a gap is taken."""
    return (Patch(taking, "within", lambda _: lambda ranges, first, last: ()),)


def _conflicts_dropped() -> tuple[Patch, ...]:
    """What is stored under a number is not compared."""

    def comparing(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda records, rows: original(records, ())

    return (Patch(taking, "_compared", comparing),)


def _epochs_untold() -> tuple[Patch, ...]:
    """Notes are written of nothing."""
    return (Patch(MemoryTransaction, "note", lambda _: lambda self, note, *, at_ms: None),)


FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(
    {
        # The disk
        "no_sync": _fault("contents are never synced", "power", "undurable", disk=journal.UnsyncedDisk),
        "no_name_sync": _fault("names are never synced", "power", "undurable", disk=journal.UnsyncedNames),
        "cursor_not_synced": _fault(
            "the cursor is written and not synced", "fullness", "lost spoiled reused", disk=journal.UnsyncedCursor
        ),
        "sync_error_ignored": _fault(
            "a sync that fails is taken for one that did not", "io_errors", "undurable lost spoiled reused refused",
            disk=journal.DeafDisk,
        ),
        "read_error_as_damage": _fault(
            "what cannot be read is taken for damaged", "io_errors", "spoiled reused lost", disk=journal.BlankDisk
        ),
        "opens_without_sync": _fault(
            "what a killed process wrote is handed out unsynced", "crashes", "undurable",
            disk=journal.LazyDisk, journal=journal.HastyJournal,
        ),
        # Frames
        "no_checksum": _fault(
            "a torn tail is kept", "power", "crash spoiled lost reused invented refused twice",
            journal.without_checksum(),
        ),
        "stale_frames": _fault(
            "the generation is not in the checksum", "fullness",
            "invented reused lost refused spoiled boundaries twice",
            journal.without_generation(),
        ),
        "tail_not_read": _fault(
            "the cursor is believed about the last number", "power", "reused lost spoiled", journal.tail_not_read()
        ),
        "no_start_mark": _fault(
            "a batch that was sent grows", "line", "boundaries", journal.no_start_mark()
        ),
        # The cursor
        "cursor_at_highest": _fault(
            "what lies below an acknowledged number counts as acknowledged", "network", "lost",
            journal.settled_is_highest(),
        ),
        "older_slot": _fault("the older slot of the cursor counts", "fullness", "lost spoiled", journal.older_slot()),
        "freed_before_cursor": _fault(
            "a segment is given back before the cursor is written", "power", "spoiled", journal.freed_before_cursor()
        ),
        # Gaps, room, time
        "gap_forgotten": _fault("what is evicted is not told", "fullness", "lost", journal.gap_forgotten()),
        "gap_after_unlink": _fault(
            "a gap is recorded after its segment was written over", "fullness", "spoiled lost",
            journal.gap_after_unlink(),
        ),
        "precious_evicted": _fault("events are evicted", "fullness", "precious", journal.precious_evicted()),
        "room_miscounted": _fault("two files more than there may be", "fullness", "quota", journal.room_miscounted()),
        "overwrites_when_full": _fault(
            "after a failed new segment, records are written over older ones", "fullness", "spoiled",
            journal.overwrites_when_full(),
        ),
        "wall_clock": _fault("ages are counted by the wall clock", "clocks", "early late", journal.wall_clock()),
        "clock_restarts": _fault(
            "the store's clock begins anew with each start", "clocks", "late", journal.clock_restarts()
        ),
        "epoch_anew": _fault("each start draws an epoch", "crashes", "epoch", journal.epoch_anew()),
        # Sending
        "sends_before_durable": _fault(
            "records are sent before they are synced", "power", "undurable",
            disk=journal.LazyDisk, process=wrong.SendsBeforeDurable,
        ),
        "settles_on_puback": _fault(
            "the broker's word is taken for the hub's", "calm", "settled", process=wrong.SettlesOnPuback
        ),
        "settles_on_refusal": _fault(
            "what the broker refuses for now is given up", "network", "settled", process=wrong.SettlesOnRefusal
        ),
        "any_order": _fault("a class's batches overtake each other", "line", "order", process=wrong.SendsInAnyOrder),
        "never_sends_again": _fault(
            "an answer is waited for without end", "network", "pending", process=wrong.NeverSendsAgain
        ),
        # The hub
        "no_dedupe": _fault("what comes again is stored again", "network", "twice", _store(wrong.KnowsNothing)),
        "highest_number": _fault(
            "all below the highest number counts as received", "network", "lost twice", _store(wrong.KnowsTheHighest)
        ),
        "answers_before_commit": _fault(
            "the hub answers before it commits", "crashes", "settled lost", hub=wrong.AnswersBeforeCommit
        ),
        "commits_in_parts": _fault(
            "rows and ranges are not in one transaction", "crashes", "twice", hub=wrong.CommitsInParts
        ),
        "no_row_lock": _fault(
            "two hub processes write one stream at the same time", "fleet", "twice lost", hub=wrong.LocksNothing
        ),
        "gap_over_records": _fault(
            "a gap counts records that are here", "fullness", "twice", _gaps_over_records()
        ),
        "conflict_dropped": _fault(
            "a record that differs under a known number counts as a duplicate", "copies", "lost reported",
            _conflicts_dropped(),
        ),
        "epoch_untold": _fault("a lost store is not told", "copies", "reported", _epochs_untold()),
        # Releases
        "any_version": _fault(
            "an older assignment is accepted", "slots", "floors", slots=wrong.TrustsAnyVersion
        ),
        "floors_forgotten": _fault("a restart forgets the floors", "slots", "floors", slots=wrong.LosesFloors),
        "files_trusted": _fault(
            "fetched files are not hashed again", "slots", "unverified", slots=wrong.TrustsItsFiles
        ),
        "goes_on_blindly": _fault(
            "a restart goes on in the saved phase", "slots", "stuck", slots=wrong.GoesOnBlindly
        ),
    }
)  # fmt: skip
