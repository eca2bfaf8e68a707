"""Stores a group of batches; when that fails, finds the batch at fault, so that it does not stop the others.

The group first, then device by device, then batch by batch. What fails alone:
1. by a defect that the batch meets: it is refused, because it would come again for ever;
2. by what the database holds (a damaged row): the device's batches are not answered, because that can be mended, and
   they come again.

A database that cannot write now ends the search: nothing more is stored, and what is not answered comes again. So
does a defect that meets all devices of a group of several: that is the hub's, and no device shall lose records by it.

Not here: transactions, acknowledgements, the log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy.exc import DataError

from cloud_hub.telemetry.rules import Opened
from cloud_hub.telemetry.taking import Taken
from shared.errors import StorageError

DEFECT: Final = "telemetry.defect"
"""Told to the device of a batch that cannot be stored."""

Write = Callable[[Sequence[Opened]], Awaitable[Sequence[Taken]]]


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch that failed alone."""

    batch: Opened
    error: Exception

    @property
    def name(self) -> str:
        """Of the error's type, for telling it once."""
        return type(self.error).__name__


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a group.

    Attributes:
        taken: for each batch in their order; None for those that are not to be answered.
        failures: what failed alone.
        error: what stopped the whole group, so that there is something to wait for; None when some of it is stored.
    """

    taken: list[Taken | None]
    failures: list[Failure]
    error: Exception | None


async def store_apart(batches: Sequence[Opened], write: Write) -> Stored:
    """Store what can be stored.

    Args:
        batches: in the order in which they are to be taken.
        write: stores some in one transaction, and raises what made that fail.
    """
    taken: dict[int, Taken] = {}
    failed: dict[int, Exception] = {}
    groups = [list(range(len(batches)))] if batches else []
    while groups:
        places = groups.pop(0)
        try:
            found = await write([batches[place] for place in places])
        except Exception as error:
            # Whatever it is, it must not stop the batches of others.
            if _is_of_now(error):
                return _stored(batches, taken, {}, error)
            split = _split(batches, places, error)
            groups[:0] = split
            if not split:
                failed.update(dict.fromkeys(places, error))
        else:
            taken.update(zip(places, found, strict=True))
    return _stored(batches, taken, failed, None)


def _stored(
    batches: Sequence[Opened], taken: dict[int, Taken], failed: dict[int, Exception], error: Exception | None
) -> Stored:
    met = {batches[place].stream.device for place, one in failed.items() if _is_defect(one)}
    is_ours = not taken and len(met) > 1
    refused = {place for place, one in failed.items() if _is_defect(one) and not is_ours}
    taken |= dict.fromkeys(refused, Taken("refused", code=DEFECT))
    if failed and not taken:
        error = next(iter(failed.values()))
    return Stored(
        taken=[taken.get(place) for place in range(len(batches))],
        failures=[Failure(batches[place], one) for place, one in failed.items()],
        error=error,
    )


def _split(batches: Sequence[Opened], places: list[int], error: Exception) -> list[list[int]]:
    """Into devices, or the batches of one device; nothing when nobody else would be helped by it."""
    devices: dict[str, list[int]] = {}
    for place in places:
        devices.setdefault(batches[place].stream.device, []).append(place)
    if len(devices) > 1:
        return list(devices.values())
    # What the database holds of a device is in the way of all its batches.
    return [[place] for place in places] if len(places) > 1 and _is_defect(error) else []


def _is_of_now(error: Exception) -> bool:
    """Whether it has nothing to do with what was written."""
    return isinstance(error, MemoryError) or (isinstance(error, StorageError) and error.retry)


def _is_defect(error: Exception) -> bool:
    """Whether the batch met a defect; values that the database's types do not hold are one."""
    return not isinstance(error, StorageError) or isinstance(error.__cause__, DataError)
