"""No batch stops others: a script of what each write says, and what became of each batch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from sqlalchemy.exc import DataError

from cloud_hub.telemetry.apart import Stored, store_apart
from cloud_hub.telemetry.rules import Opened, open_batch
from cloud_hub.telemetry.taking import Taken
from shared.errors import StorageError, StorageFull
from shared.ids import DeviceId
from tests.fakes.batches import batch_of, readings

ONE, TWO, THREE = (DeviceId(f"pi-{n}") for n in (1, 2, 3))
DONE = Taken("stored", fresh=1)
REFUSED = Taken("refused", code="telemetry.defect")


def opened(device: DeviceId, seq: int) -> Opened:
    return open_batch(device, batch_of(readings(seq)))


class Writes:
    """Fails for groups with certain batches; keeps what it was asked to write, as (device, number)."""

    def __init__(self, broken: Mapping[tuple[str, int], Exception], *, full_at: int | None = None) -> None:
        self._broken = broken
        self._full_at = full_at
        self.asked: list[list[tuple[str, int]]] = []
        self.stored: list[tuple[str, int]] = []

    async def write(self, batches: Sequence[Opened]) -> Sequence[Taken]:
        """Store them all or none."""
        names = [(one.stream.device, one.id.first) for one in batches]
        self.asked.append(list(names))
        if len(self.asked) == self._full_at:
            raise StorageFull("no room")
        for name in names:
            if name in self._broken:
                raise self._broken[name]
        self.stored += names
        return [DONE] * len(batches)


def run(writes: Writes, *batches: Opened) -> Stored:
    return asyncio.run(store_apart(batches, writes.write))


GROUP = (opened(ONE, 1), opened(TWO, 1), opened(ONE, 2), opened(TWO, 2), opened(THREE, 1))


def test_a_group_that_can_be_stored_is_one_write() -> None:
    writes = Writes({})
    assert run(writes, *GROUP) == Stored([DONE] * 5, [], None)
    assert len(writes.asked) == 1
    assert run(writes) == Stored([], [], None)
    assert len(writes.asked) == 1


def defect_of_a_value() -> StorageError:
    error = StorageError("integer out of range")
    error.__cause__ = DataError("INSERT", {}, ValueError())
    return error


@pytest.mark.parametrize("error", [ValueError("a defect"), defect_of_a_value()])
def test_a_batch_with_a_defect_is_refused_alone(error: Exception) -> None:
    writes = Writes({(TWO, 1): error})
    found = run(writes, *GROUP)
    assert found.taken == [DONE, REFUSED, DONE, DONE, DONE]
    assert [(one.batch, one.error) for one in found.failures] == [(GROUP[1], error)]
    assert found.error is None
    # The whole, three devices, and the batches of one of them; each device's in their order.
    assert [len(asked) for asked in writes.asked] == [5, 2, 2, 1, 1, 1]
    assert writes.stored == [(ONE, 1), (ONE, 2), (TWO, 2), (THREE, 1)]


def test_a_damaged_row_leaves_its_device_unanswered_and_no_other() -> None:
    error = StorageError("damaged")
    writes = Writes({(TWO, 1): error, (TWO, 2): error})
    found = run(writes, *GROUP)
    assert found.taken == [DONE, None, DONE, None, DONE]
    assert (found.error, [one.error for one in found.failures]) == (None, [error, error])
    assert [len(asked) for asked in writes.asked] == [5, 2, 2, 1]


def test_a_database_that_is_damaged_for_all_refuses_nobody() -> None:
    error = StorageError("malformed")
    writes = Writes({(device, 1): error for device in (ONE, TWO, THREE)})
    found = run(writes, *GROUP)
    assert (found.taken, found.error) == ([None] * 5, error)


@pytest.mark.parametrize("error", [StorageFull("no room"), MemoryError()])
def test_a_database_that_cannot_write_now_refuses_nobody_and_is_not_tried_again(error: Exception) -> None:
    writes = Writes({(ONE, 1): error})
    assert run(writes, *GROUP) == Stored([None] * 5, [], error)
    assert len(writes.asked) == 1


def test_what_was_stored_before_the_disk_was_full_is_answered() -> None:
    found = run(Writes({(TWO, 1): ValueError()}, full_at=5), *GROUP)
    assert found.taken == [DONE, None, DONE, None, None]
    assert isinstance(found.error, StorageFull)
    assert found.failures == []


def test_a_defect_that_meets_all_devices_is_ours_and_refuses_nobody() -> None:
    writes = Writes({(one.stream.device, one.id.first): ValueError() for one in GROUP})
    found = run(writes, *GROUP)
    assert found.taken == [None] * 5
    assert isinstance(found.error, ValueError)
    assert len(found.failures) == 5


def test_a_single_device_with_a_defect_is_refused() -> None:
    writes = Writes({(ONE, 1): ValueError()})
    found = run(writes, GROUP[0])
    assert (found.taken, found.error) == ([REFUSED], None)
