"""Bringing files in: budgets, room, patches, failures by kind, and being given up at every point."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from edge_agent.core.slot_values import (
    MAX_REFETCHES,
    Event,
    Fetch,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesVerified,
    VerifyFiles,
)
from edge_agent.core.spending import DAY_HOURS, HOUR_MS
from edge_agent.core.ways import PatchPolicy
from edge_agent.driver.bringing import Bringing, Supplies
from edge_agent.driver.events import ForSlot
from edge_agent.driver.files import Files
from edge_agent.driver.loop import Loop
from edge_agent.driver.metering import Meter
from shared.errors import (
    OutriderError,
    PatchFailed,
    StorageError,
    StorageFull,
    TransferCorrupt,
    TransferRefused,
    Unreachable,
)
from shared.ids import Digest, FamilyName
from shared.limits import KIB, MIB
from shared.model import FileRef
from shared.release import Patch
from tests.fakes.agent_world import until
from tests.fakes.clock import FakeMoments
from tests.fakes.fetcher import FakeFetcher
from tests.fakes.ledger import FakeLedger
from tests.fakes.patcher import FakePatcher, build_fake_patch
from tests.fakes.shelf import FakeShelf

FAMILY = FamilyName("digits")
OLD, NEW = b"old" * 100_000, b"new" * 100_000


class Place:
    """A shelf, a hub and a ledger, and someone who brings files in. `restart` forgets what is not on the disk."""

    def __init__(
        self, *, daily_bytes: int = 0, policy: PatchPolicy = "prefer_patch", models_bytes: int = 2**30
    ) -> None:
        self.shelf = FakeShelf()
        self.fetcher = FakeFetcher()
        self.ledger = FakeLedger()
        self.moments = FakeMoments()
        self.patcher = FakePatcher(self.shelf)
        self.daily_bytes = daily_bytes
        self.policy: PatchPolicy = policy
        self.models_bytes = models_bytes
        self.kept: dict[Digest, FileRef] = {}
        self.notes: list[tuple[str, str]] = []
        self.collected = 0
        self.restart()

    def restart(self) -> None:
        self.meter = Meter(ledger=self.ledger, moments=self.moments, daily_bytes=self.daily_bytes)
        supplies = Supplies(fetcher=self.fetcher, meter=self.meter, patcher=self.patcher, policy=self.policy)
        self.bringing: Bringing = supplies.bringing(
            shelf=self.shelf, models_bytes=self.models_bytes, kept=lambda: self.kept, make_room=self._collect
        )

    def _collect(self) -> None:
        self.collected += 1
        self.shelf.collect(frozenset(self.kept))

    def note(self, name: str, detail: dict[str, str]) -> None:
        self.notes.append((name, detail["code"]))

    def serve(self, data: bytes, *, instead: bytes | None = None) -> FileRef:
        file = FileRef(path=f"file-{len(self.fetcher.files)}", length=len(data), digest=digest_of(data))
        self.fetcher.files[file.digest] = data if instead is None else instead
        self.kept[file.digest] = file
        return file

    def put(self, data: bytes) -> FileRef:
        """On the shelf, and kept by a slot."""
        file = FileRef(path="here", length=len(data), digest=digest_of(data))
        self.shelf.append(file.digest, data, offset=0)
        self.shelf.publish(file)
        self.kept[file.digest] = file
        return file

    def patch(self, base: bytes = OLD, result: bytes = NEW, *, data: bytes | None = None) -> Patch:
        """A patch at the hub; the fake's are as long as what they make, so one that shall be shorter is given."""
        made = build_fake_patch(base, result) if data is None else data
        self.fetcher.files[digest_of(made)] = made
        return Patch(base=digest_of(base), result=digest_of(result), digest=digest_of(made), length=len(made))

    async def bring(self, *files: FileRef, patches: tuple[Patch, ...] = ()) -> None:
        await self.bringing.bring(files, patches, note=self.note)

    async def fails(
        self, kind: type[OutriderError], code: str, *files: FileRef, patches: tuple[Patch, ...] = ()
    ) -> None:
        with pytest.raises(kind) as caught:
            await self.bring(*files, patches=patches)
        assert caught.value.code == code


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def play(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await story()

    asyncio.run(limited())


# Budgets


def test_a_file_that_exceeds_the_days_budget_comes_over_days_and_is_paid_once() -> None:
    place = Place(daily_bytes=MIB)
    data = bytes(range(256)) * 4 * 1024 * 3  # 3 MiB
    file = place.serve(data)

    async def story() -> None:
        for day in range(1, 4):
            if day < 3:
                await place.fails(Unreachable, "transfer.budget", file)
                assert place.shelf.resume_at(file.digest) == day * MIB
                asked = len(place.fetcher.fetched)
                place.moments.reboot(off_ms=100 * HOUR_MS)  # neither a power cut nor time off refills it
                place.restart()
                await place.fails(Unreachable, "transfer.budget", file)
                assert len(place.fetcher.fetched) == asked
                place.moments.advance((DAY_HOURS + 1) * HOUR_MS)
        await place.bring(file)

    play(story)
    assert place.shelf.files[file.digest] == data
    assert place.fetcher.asked_bytes == len(data) == place.ledger.spending.total_bytes


def test_a_power_cut_in_the_midst_leaves_the_bytes_counted() -> None:
    place = Place(daily_bytes=MIB)
    file = place.serve(bytes(2 * MIB))
    counted: list[int] = []

    async def story() -> None:
        place.fetcher.on_piece = lambda: counted.append(sum(place.ledger.spending.hours.values()))
        await place.fails(Unreachable, "transfer.budget", file)

    play(story)
    arrived = [64 * KIB * number for number in range(1, len(counted) + 1)]
    assert all(kept >= came for kept, came in zip(counted, arrived, strict=True))
    assert place.fetcher.asked_bytes == MIB


def test_a_connection_that_breaks_costs_what_came_and_is_resumed() -> None:
    place = Place(daily_bytes=MIB)
    file = place.serve(bytes(600_000))

    async def story() -> None:
        place.fetcher.breaks_after = 10_000
        await place.fails(Unreachable, "transfer.unreachable", file)
        assert place.meter.figures()["day_bytes"] == 10_000
        await place.bring(file)

    play(story)
    assert place.fetcher.asked_bytes == 600_000
    assert place.meter.figures()["left_bytes"] == MIB - 600_000


def test_a_disk_that_keeps_no_count_fetches_nothing_and_loses_no_budget() -> None:
    place = Place(daily_bytes=MIB)
    file = place.serve(bytes(600_000))
    save = place.ledger.save_spending

    async def refuses(spending: Any) -> None:
        raise StorageFull("no room")

    async def story() -> None:
        place.ledger.save_spending = refuses  # type: ignore[method-assign]
        for _ in range(30):
            await place.fails(StorageFull, "storage.full", file)
        assert place.fetcher.fetched == []
        place.ledger.save_spending = save  # type: ignore[method-assign]
        await place.bring(file)

    play(story)


# Room


def test_what_finds_no_room_is_refused_before_a_byte_is_fetched_and_comes_when_there_is_some() -> None:
    place = Place()
    file = place.serve(NEW)

    async def story() -> None:
        place.shelf.free = len(NEW) * 110 // 100 - 1
        await place.fails(StorageFull, "storage.room", file)
        assert (place.fetcher.fetched, place.collected) == ([], 1)
        place.shelf.free += 1
        await place.bring(file)

    play(story)


def test_the_profile_bounds_the_sum_of_what_is_kept() -> None:
    place = Place(models_bytes=len(OLD) + len(NEW) - 1)
    place.put(OLD)
    file = place.serve(NEW)

    async def story() -> None:
        await place.fails(StorageFull, "storage.room", file)
        assert place.fetcher.fetched == []
        place.models_bytes += 1
        place.restart()
        await place.bring(file)

    play(story)


def test_room_for_a_patch_is_room_for_what_it_makes_too() -> None:
    place = Place()
    place.put(OLD)
    file, patch = place.serve(NEW + bytes(100)), place.patch(result=NEW + bytes(100))
    short = Patch(base=patch.base, result=patch.result, digest=patch.digest, length=patch.length - 500)

    async def story() -> None:
        place.shelf.free = (file.length + short.length) * 110 // 100 - 1
        await place.fails(StorageFull, "storage.room", file, patches=(short,))
        assert place.fetcher.fetched == []

    play(story)


# Patches


def test_a_file_is_made_by_a_patch_and_the_patch_goes() -> None:
    place = Place(policy="patch_only")
    place.put(OLD)
    file, patch = place.serve(NEW), place.patch()
    play(lambda: place.bring(file, patches=(patch,)))
    assert place.shelf.has(file.digest)
    assert not place.shelf.has(patch.digest)
    assert place.fetcher.fetched == [f"a patch to {file.path}"]
    assert (place.ledger.spending.patched, place.ledger.spending.patch_failed) == (1, 0)
    assert place.fetcher.asked_bytes == patch.length


@pytest.mark.parametrize("trouble", ["apply", "junk", "missing", "base damaged", "hangs", "does nothing"])
def test_on_any_doubt_about_a_patch_the_whole_file_comes_once(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.driver.bringing.PATCH_DEADLINE_S", 0.02)
    place = Place()
    base = place.put(OLD)
    file = place.serve(NEW)
    patch = place.patch(data=b"a patch that is short")
    match trouble:
        case "apply":
            place.patcher.error = PatchFailed("does not apply")
        case "junk":
            place.fetcher.files[patch.digest] = b"something as long as it"[: patch.length]
        case "missing":
            del place.fetcher.files[patch.digest]
        case "base damaged":
            place.shelf.spoil(base.digest, b"!" + OLD[1:])
        case "hangs":
            place.patcher.hangs = True
        case "does nothing":

            async def nothing(*_: Any, **__: Any) -> None:
                return

            monkeypatch.setattr(place.patcher, "apply", nothing)

    async def story() -> None:
        await place.bring(file, patches=(patch,))
        place.shelf.drop(file.digest)
        place.fetcher.fetched.clear()
        await place.bring(file, patches=(patch,))  # what failed once is not tried again with the next offer

    play(story)
    assert place.shelf.has(file.digest)
    assert place.fetcher.fetched == [file.path]
    assert [name for name, _ in place.notes] == ["patch.failed"]
    assert place.ledger.spending.patch_failed == 1
    assert not place.shelf.has(patch.digest)


def test_a_hub_that_is_away_does_not_speak_against_a_patch() -> None:
    place = Place()
    place.put(OLD)
    file, patch = place.serve(NEW), place.patch(data=b"a patch that is short")

    async def story() -> None:
        place.fetcher.away = True
        await place.fails(Unreachable, "transfer.unreachable", file, patches=(patch,))

    play(story)
    assert place.ledger.spending.patch_failed == 0


def test_with_patches_only_nothing_is_ever_fetched_whole() -> None:
    place = Place(policy="patch_only")
    place.put(OLD)
    file, patch = place.serve(NEW), place.patch(data=b"a patch that is short")

    async def story() -> None:
        await place.fails(TransferRefused, "transfer.patch_only", file)
        place.patcher.error = PatchFailed("does not apply")
        await place.fails(TransferRefused, "transfer.patch_only", file, patches=(patch,))
        await place.fails(TransferRefused, "transfer.patch_only", file, patches=(patch,))

    play(story)
    assert place.fetcher.fetched == [f"a patch to {file.path}"]


# Failures by kind, and loops


def test_what_comes_wrong_is_fetched_once_more_and_then_left_alone_across_restarts() -> None:
    place = Place()
    file = place.serve(NEW, instead=b"!" + NEW[1:])

    async def story() -> None:
        await place.fails(TransferCorrupt, "transfer.corrupt", file)
        assert place.fetcher.fetched == [file.path] * 2
        for _ in range(10):  # offered again and again, by a hub that repeats itself
            place.moments.reboot()
            place.restart()
            await place.fails(TransferCorrupt, "transfer.barred", file)
        assert place.fetcher.fetched == [file.path] * 2
        place.moments.advance(HOUR_MS)
        place.fetcher.files[file.digest] = NEW
        await place.bring(file)

    play(story)


def test_a_damaged_part_is_no_reason_to_give_up() -> None:
    place = Place(daily_bytes=10 * MIB)
    file = place.serve(NEW)
    place.shelf.append(file.digest, b"!" * 1000, offset=0)
    play(lambda: place.bring(file))
    assert place.shelf.files[file.digest] == NEW


def test_a_disk_that_damages_a_file_each_time_ends_in_no_loop() -> None:
    place = Place()
    file = place.serve(NEW)

    async def story() -> None:
        for _ in range(MAX_REFETCHES + 1):
            await place.bring(file)
            place.shelf.spoil(file.digest, b"!" + NEW[1:])
            with pytest.raises(TransferCorrupt):
                await place.bringing.check(file)
        await place.fails(TransferCorrupt, "transfer.barred", file)
        place.moments.advance(HOUR_MS)
        await place.bring(file)
        await place.bringing.check(file)

    play(story)
    assert place.ledger.spending.strikes == {}


# Through Files: what the slot hears


def with_files(place: Place, story: Callable[[Files, Loop], Awaitable[None]]) -> list[Event]:
    heard: list[Event] = []

    async def limited() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            loop = Loop(group)
            files = Files(loop=loop, bringing=place.bringing, note=place.note)
            await story(files, loop)
            loop.end()
            while not loop.inbox._queue.empty():
                event = await loop.inbox.next()
                assert isinstance(event, ForSlot)
                heard.append(event.event)

    asyncio.run(limited())
    return heard


async def idle(loop: Loop) -> None:
    await until(
        lambda: not loop.works.running(("fetch", FAMILY)) and not loop.works.running(("verify", FAMILY)), "done"
    )


def test_what_waits_is_told_once_with_its_reason_and_goes_on() -> None:
    place = Place(daily_bytes=64 * KIB)
    file = place.serve(NEW[: 128 * KIB])

    async def story(files: Files, loop: Loop) -> None:
        for _ in range(3):
            files.fetch(FAMILY, Fetch("key", (file,)))
            await idle(loop)
        place.moments.advance((DAY_HOURS + 1) * HOUR_MS)
        files.fetch(FAMILY, Fetch("key", (file,)))
        await idle(loop)
        files.verify(FAMILY, VerifyFiles("key", (file,)))
        await idle(loop)

    *waits, here, verified = with_files(place, story)
    assert all(isinstance(event, FetchFailed) and event.retry and event.code == "transfer.budget" for event in waits)
    assert len({event.message for event in waits if isinstance(event, FetchFailed)}) == 1
    assert (here, verified) == (FilesHere("key"), FilesVerified("key"))
    assert place.notes == [("release.waits", "transfer.budget")]


@pytest.mark.parametrize(
    ("error", "retry"),
    [(TransferRefused("404"), False), (Unreachable("503"), True), (StorageError("read-only"), False)],
    ids=["4xx", "5xx", "read-only"],
)
def test_the_slot_hears_whether_to_try_again(
    error: OutriderError, retry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place()
    file = place.serve(NEW)

    async def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place.fetcher, "blob", refuse)

    async def story(files: Files, loop: Loop) -> None:
        files.fetch(FAMILY, Fetch("key", (file,)))
        await idle(loop)

    (failed,) = with_files(place, story)
    assert isinstance(failed, FetchFailed)
    assert (failed.retry, failed.code) == (retry, error.code)
    assert 0 <= failed.jitter <= 1


@pytest.mark.parametrize("point", ["turn", "charge", "transfer", "patch transfer", "patch", "check"])
def test_a_newer_assignment_ends_what_is_under_way_at_every_point(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(daily_bytes=100 * MIB)
    place.put(OLD)
    file, newer = place.serve(NEW), place.serve(b"newer" * 1000)
    patch = place.patch(data=b"a patch that is short")
    reached = asyncio.Event()

    async def held(*_: Any, **__: Any) -> Any:
        reached.set()
        await asyncio.Event().wait()

    async def story(files: Files, loop: Loop) -> None:
        with monkeypatch.context() as patched:
            wanted = Fetch("old", (file,), (patch,) if "patch" in point else ())
            match point:
                case "turn":
                    patched.setattr(files._turns, "acquire", held)
                case "charge":
                    patched.setattr(place.ledger, "save_spending", held)
                case "patch":
                    patched.setattr(place.patcher, "apply", held)
                case "check":
                    patched.setattr("edge_agent.driver.bringing.asyncio.to_thread", held)
                case _:
                    patched.setattr(place.fetcher, "blob", held)
            if point == "check":
                place.put(NEW)
                files.verify(FAMILY, VerifyFiles("old", (file,)))
            else:
                files.fetch(FAMILY, wanted)
            await reached.wait()
            files.cancel(FAMILY)
            await idle(loop)
        files.fetch(FAMILY, Fetch("new", (newer,)))
        await idle(loop)

    assert with_files(place, story) == [FilesHere("new")]


def test_a_transfer_that_is_cancelled_costs_no_less_than_what_came_and_little_more() -> None:
    place = Place(daily_bytes=100 * MIB)
    file = place.serve(bytes(3 * MIB))

    async def story(files: Files, loop: Loop) -> None:
        place.fetcher.hangs = True
        files.fetch(FAMILY, Fetch("key", (file,)))
        await until(lambda: place.fetcher.asked_bytes > 0, "begun")
        files.cancel(FAMILY)
        await idle(loop)

    assert with_files(place, story) == []
    assert place.fetcher.asked_bytes <= place.meter.figures()["day_bytes"] <= place.fetcher.asked_bytes + 256 * KIB


def test_a_file_that_the_disk_changed_is_told_as_such() -> None:
    place = Place()
    file = place.put(NEW)
    place.shelf.spoil(file.digest, b"!" + NEW[1:])

    async def story(files: Files, loop: Loop) -> None:
        files.verify(FAMILY, VerifyFiles("key", (file,)))
        await idle(loop)
        files.verify(FAMILY, VerifyFiles("key", (file,)))
        await idle(loop)

    changed, gone = with_files(place, story)
    assert isinstance(changed, FilesBad)
    assert isinstance(gone, FilesBad)
    assert (changed.retry, gone.retry) == (False, True)
