"""The controller on a real database: decisions are stored, carried out, and survive the hub's end at every step."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_hub.ground import audit
from cloud_hub.ground.bus import DeviceReported
from cloud_hub.rollouts.values import PauseAsked
from shared.errors import Conflict, InvalidValue
from shared.ids import DeviceId
from shared.rollout import Condition, Phase, Verdict, parse_spec
from tests.fakes.rollout_room import MINUTE_MS, NEW, OLD, Cut, Power, RolloutRoom, refuses, well, worse


@pytest.fixture
def room(tmp_path: Path) -> Iterator[RolloutRoom]:
    room = RolloutRoom(tmp_path)
    yield room
    room.close()


def test_a_good_release_reaches_everybody(room: RolloutRoom) -> None:
    started = room.start()
    assert (started.id, started.phase, started.eligible) == ("digits-1.1.0-1", Phase.RUNNING, 4)
    room.look()
    assert asyncio.run(room.desk.get(started.id)).devices["offered"] == 1
    view = room.run(started.id, well)
    assert view.phase is Phase.COMPLETED
    assert room.versions() == [NEW] * 4
    assert view.devices["healthy"] == 4
    assert {reading.verdict for reading in view.gates} == {Verdict.PASS}


@pytest.mark.parametrize("behave", [worse, refuses])
def test_a_bad_release_is_taken_back_and_its_evidence_is_kept(
    room: RolloutRoom, behave: Callable[[RolloutRoom, str], None]
) -> None:
    started = room.start()
    view = room.run(started.id, behave)
    assert view.phase is Phase.ROLLED_BACK
    assert room.versions() == [OLD] * 4
    assert (view.returned, view.outstanding) == (1, 0)
    decisions = asyncio.run(room.desk.explain(started.id, limit=100))
    (failed,) = [decision for decision in decisions if decision.kind == "failed"]
    (reading,) = [one for one in failed.readings if one.verdict is Verdict.FAIL]
    assert reading.figures
    assert view.reason in failed.text
    (member,) = [m for m in asyncio.run(room.desk.devices(started.id, limit=10)) if m.condition != Condition.WAITING]
    assert member.before == OLD
    assert member.settled


def test_every_decision_has_its_audit_row(room: RolloutRoom) -> None:
    started = room.start()
    room.run(started.id, worse)
    decided = [decision.kind for decision in asyncio.run(room.desk.explain(started.id, limit=100))]
    entries = room.database.read_now(lambda conn: audit.entries(conn, after=0, limit=500))
    told = [e.action.removeprefix("rollout.") for e in entries if e.subject == f"rollout:{started.id}"]
    assert told == decided
    assert {"started", "offered", "stage", "failed", "returned", "ended"} <= set(told)
    assert room.database.read_now(audit.verify).broken_at is None


def test_the_rollback_gives_each_device_what_it_ran_before(tmp_path: Path) -> None:
    room = RolloutRoom(tmp_path, devices=2)
    row = room.releases.make_ready("0.9.0")
    asyncio.run(room.releases.publish("0.9.0"))
    room.manifests["0.9.0"] = row.files[0].digest
    room.add("older", version="0.9.0")
    started = room.start(stages=["100%"])
    assert room.run(started.id, worse).phase is Phase.ROLLED_BACK
    assert room.versions() == [OLD, OLD, "0.9.0"]
    room.close()


def test_what_cannot_be_given_back_is_told_and_does_not_hold_the_rest(tmp_path: Path) -> None:
    room = RolloutRoom(tmp_path, devices=2)
    room.manifests["0.8.0"] = "8" * 64
    room.add("lost", version="0.8.0")  # of a version that the hub does not have
    plan = asyncio.run(room.desk.plan(parse_spec(room.spec())))
    assert any("0.8.0 cannot go back" in warning for warning in plan.warnings)
    started = room.start(stages=["100%"])
    view = room.run(started.id, refuses)
    assert view.phase is Phase.ROLLED_BACK
    assert (view.returned, view.stranded) == (2, 1)
    room.close()


def test_two_rollouts_of_one_family_never_share_a_device(room: RolloutRoom) -> None:
    started = room.start(select={"devices": ["dev-0", "dev-1"]})
    with pytest.raises(Conflict, match=started.id) as caught:
        room.start()
    assert caught.value.code == "conflict.rollout"
    assert room.start(select={"devices": ["dev-2"]}).phase is Phase.RUNNING
    asyncio.run(room.desk.abort(started.id, actor="token:ann", reverting=False))
    room.look()
    assert room.start(select={"devices": ["dev-0"]}).phase is Phase.RUNNING


def test_a_plan_says_who_is_left_out_and_what_the_canary_can_miss(room: RolloutRoom) -> None:
    room.add("new-already", version=NEW)
    room.start(select={"devices": ["dev-0"]})
    plan = asyncio.run(room.desk.plan(parse_spec(room.spec(select={"all": True}, stages=[1, "100%"]))))
    assert sorted(plan.eligible) == ["dev-1", "dev-2", "dev-3"]
    assert {one.device: one.reason for one in plan.skipped} == {
        "dev-0": "in rollout digits-1.1.0-1",
        "new-already": "runs it already",
    }
    assert [(stage.devices, stage.added) for stage in plan.stages] == [(1, 1), (3, 2)]
    assert plan.stages[0].missed_rate == 0.95
    assert plan.bytes == 3 * plan.bytes_per_device > 0
    assert (plan.before_told, plan.before_wrong) == (600, 15)
    assert 0 < plan.answers_to_find < 1000
    assert 0 < plan.answers_to_clear < 1000


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"select": {"devices": ["nobody"]}}, "conflict.no_devices"),
        ({"select": {"labels": {"site": "moon"}}}, "conflict.no_devices"),
        ({"version": "9.9.9"}, "not_found"),
        ({"version": OLD}, "conflict.no_devices"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_and_leaves_nothing(
    room: RolloutRoom, fields: dict[str, object], code: str
) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        room.start(**fields)
    assert getattr(caught.value, "code", "") == code
    assert asyncio.run(room.desk.page(limit=10)) == []


def test_a_draft_waits_until_it_is_started(room: RolloutRoom) -> None:
    draft = asyncio.run(room.desk.draft(parse_spec(room.spec()), actor="token:ann"))
    room.look()
    assert (draft.phase, draft.eligible) == (Phase.DRAFT, 0)
    started = asyncio.run(room.desk.start_draft(draft.id, actor="token:bob"))
    assert (started.id, started.phase, started.eligible) == (draft.id, Phase.RUNNING, 4)
    with pytest.raises(Conflict):
        asyncio.run(room.desk.start_draft(draft.id, actor="token:bob"))


def test_operators_steer_and_what_makes_no_sense_now_is_refused(room: RolloutRoom) -> None:
    name = room.start().id
    with pytest.raises(Conflict, match="resume is not possible"):
        asyncio.run(room.desk.resume(name, actor="token:ann"))
    paused = asyncio.run(room.desk.pause(name, actor="token:ann", reason="lunch"))
    assert (paused.phase, paused.reason) == (Phase.PAUSED, "paused by token:ann: lunch")
    room.look()
    assert asyncio.run(room.desk.get(name)).devices["offered"] == 0
    asyncio.run(room.desk.resume(name, actor="token:ann"))
    room.look()
    room.deliver(well)
    asyncio.run(room.desk.abort(name, actor="token:ann", reverting=True))
    assert room.run(name, well).phase is Phase.ABORTED
    assert room.versions() == [OLD] * 4


def test_a_report_wakes_the_controller(room: RolloutRoom) -> None:
    room.start()
    room.look()
    controller = room.desk.controller

    async def news(device: str) -> bool:
        controller._wake.clear()
        await room.bus.publish(DeviceReported(device=DeviceId(device), assignment_version=1, models=()))
        return controller._wake.is_set()

    assert asyncio.run(news("dev-0"))
    assert not asyncio.run(news("stranger"))


def test_the_loop_runs_a_rollout_to_its_end(room: RolloutRoom) -> None:
    """The real loop, with the real pace of its waits: only the devices' clock is moved by the test."""
    name = room.start(stages=["100%"], soak_s=0).id

    async def work() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            loop = group.create_task(room.desk.run())
            while (await room.desk.get(name)).phase is not Phase.COMPLETED:
                await asyncio.sleep(0.02)
                rows = await room.releases.desk.assigning.page(after="", limit=10)
                for row in rows:
                    device = room.releases.fleet.devices[row.assignment.device]
                    if device.assignment_version < row.assignment.version:
                        room.releases.fleet.add(device.id, assignment_version=row.assignment.version)
                        well(room, device.id)
                        await room.bus.publish(DeviceReported(device=device.id, assignment_version=1, models=()))
            loop.cancel()

    asyncio.run(work())
    assert room.versions() == [NEW] * 4


def steps_of(tmp_path: Path, behave: Callable[[RolloutRoom, str], None]) -> int:
    """How many writes and assignments a whole rollout takes."""
    room = RolloutRoom(tmp_path, devices=3)
    room.run(room.start().id, behave)
    steps = room.power.steps
    room.close()
    return steps


@pytest.mark.parametrize(
    ("behave", "end", "version"),
    [(well, Phase.COMPLETED, NEW), (worse, Phase.ROLLED_BACK, OLD), (refuses, Phase.ROLLED_BACK, OLD)],
)
def test_the_hub_may_end_at_any_step_and_goes_on_to_the_right_end(
    tmp_path: Path, behave: Callable[[RolloutRoom, str], None], end: Phase, version: str
) -> None:
    (tmp_path / "whole").mkdir()
    steps = steps_of(tmp_path / "whole", behave)
    assert steps > 5
    for step in range(1, steps + 1):
        for when in ("before", "after"):
            folder = tmp_path / f"{step}-{when}"
            folder.mkdir()
            room = RolloutRoom(folder, devices=3)
            name = room.start().id
            room.power = Power(left=step, when=when)
            with contextlib.suppress(Cut):
                room.run(name, behave)
                pytest.fail(f"step {step} was never reached")
            room.power = Power()
            room.desk = room.open_desk()
            room.clock.advance(MINUTE_MS // 2)
            view = room.run(name, behave)
            assert (view.phase, set(room.versions())) == (end, {version}), (step, when)
            if end is Phase.COMPLETED:
                assert view.devices["healthy"] == 3, (step, when)  # nobody was given it unwatched
            assert room.database.read_now(audit.verify).broken_at is None
            room.close()


def test_a_specification_is_checked_again_by_the_desk(room: RolloutRoom) -> None:
    import msgspec

    spec = msgspec.structs.replace(parse_spec(room.spec()), stages=("50%",))
    with pytest.raises(InvalidValue):
        asyncio.run(room.desk.start(spec, actor="token:ann"))


def test_a_state_that_somebody_else_has_moved_on_is_not_overwritten(room: RolloutRoom) -> None:
    name = room.start().id
    stale = asyncio.run(room.desk.controller.load(name))
    room.look()
    event = PauseAsked(at_ms=room.clock.wall, actor="token:ann")
    with pytest.raises(Conflict) as caught:
        asyncio.run(room.desk.controller._decide(stale, event))
    assert caught.value.code == "conflict.rollout_moved"
    assert asyncio.run(room.desk.get(name)).phase is Phase.RUNNING


def test_a_long_look_does_not_keep_operators_waiting(room: RolloutRoom) -> None:
    name = room.start().id

    async def work() -> None:
        room.figures.gate = asyncio.Event()
        look = asyncio.create_task(room.desk.controller.look())
        while not room.figures.asked:
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await room.desk.pause(name, actor="token:ann")
        room.figures.gate.set()
        await look

    asyncio.run(work())
    view = asyncio.run(room.desk.get(name))
    assert (view.phase, view.devices["offered"]) == (Phase.PAUSED, 0)


def test_a_conflict_that_passes_strands_nobody(room: RolloutRoom) -> None:
    name = room.start().id
    room.refusals = [Conflict("somebody else is writing", code="conflict.assignment_moved")]
    room.look()
    view = asyncio.run(room.desk.get(name))
    assert (view.stranded, view.devices["offered"]) == (0, 1)
    assert room.run(name, well).phase is Phase.COMPLETED


def test_a_conflict_that_stays_is_told(room: RolloutRoom) -> None:
    name = room.start().id
    room.refusals = [Conflict("below the floor", code="conflict.floor")]
    room.look()
    view = asyncio.run(room.desk.get(name))
    assert (view.stranded, view.devices["unresolved"]) == (1, 1)


def test_what_an_earlier_attempt_left_behind_is_no_evidence(room: RolloutRoom) -> None:
    """Each cohort's figures of the release are read from its own offer on."""
    name = room.start(stages=[1, "100%"], soak_s=0).id
    room.run(name, well)
    (first, *others) = asyncio.run(room.desk.devices(name, limit=10))
    room.figures.asked.clear()
    again = asyncio.run(room.desk.controller.load(name))
    asyncio.run(room.desk._lookout.picture(again, {}))
    asked = {devices: since_ms for since_ms, devices in room.figures.asked}
    assert asked[frozenset({first.device})] == first.offered_ms
    assert asked[frozenset(one.device for one in others)] == others[0].offered_ms > first.offered_ms


def test_of_the_control_only_some_are_asked_for(tmp_path: Path) -> None:
    room = RolloutRoom(tmp_path, devices=70)
    room.start()
    room.look()
    room.figures.asked.clear()
    room.look()
    assert sorted(len(devices) for _, devices in room.figures.asked) == [1, 50, 70]
    room.close()


def test_what_takes_long_to_read_is_not_read_again_soon(room: RolloutRoom) -> None:
    room.start()
    room.figures.takes_ms, room.figures.clock = 1000, room.clock
    everybody = frozenset(room.releases.fleet.devices)

    def reads() -> int:
        return sum(devices == everybody for _, devices in room.figures.asked)

    room.look()
    room.clock.advance(10_000)
    room.look()
    assert reads() == 1 + 1  # the past, and once the control, which was everybody before the first offer
    room.clock.advance(20_000)
    room.look()
    assert reads() == 3


def test_silence_counts_from_when_the_link_came_up_again(room: RolloutRoom) -> None:
    lookout = room.desk._lookout
    state = asyncio.run(room.desk.controller.load(room.start().id))
    started_ms = room.clock.wall

    def since_ms() -> int:
        return asyncio.run(lookout.picture(state, {})).watching_since_ms

    room.clock.advance(MINUTE_MS)
    assert since_ms() == started_ms
    room.link = None
    room.clock.advance(MINUTE_MS)
    assert since_ms() == room.clock.wall
    room.link = up_ms = room.clock.wall + MINUTE_MS
    room.clock.advance(5 * MINUTE_MS)
    assert since_ms() == up_ms


def test_a_rollout_of_devices_that_were_heard_begins_at_once_however_late_it_is_asked_for(room: RolloutRoom) -> None:
    room.link = room.clock.wall
    for name in list(room.releases.fleet.devices):
        room.report(name, version=OLD)
    room.clock.advance(1000)
    name = room.start().id
    room.look()
    assert asyncio.run(room.desk.get(name)).devices["offered"] == 1
