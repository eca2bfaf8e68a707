"""Answers by their deadline whatever the hub does, late answers joined, and kept answers given again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from edge_agent.adapters.oip import Conversation, HttpRequest
from edge_agent.adapters.waiting import Place, WaitingRoom
from edge_agent.core.cascade import FAILURES_TO_OPEN, LONGEST_OPEN_MS, MOST_ON_THE_WAY, Policy
from edge_agent.core.slot_values import Phase
from edge_agent.ports import CloudRefusal, HostAnswer
from shared.errors import HostLost, InputRefused, StorageFull, TransferCorrupt, TransferError, Unreachable
from shared.inference import AgentState, Answer, Done, Feedback, Infer, Late, Refusal, Reply, Status, TensorHead
from shared.model import Manifest, Variant
from shared.telemetry import Body, Grade, Outcome, Result
from tests.fakes.agent_world import AgentWorld, profile, release, until
from tests.fakes.agent_world import answer as local_answer
from tests.fakes.cloud import cloud_answer
from tests.fakes.hosts import FakeHost
from tests.fakes.outbox import KeptTicket

UNSURE = Policy(model="digits-large", below=0.95, margin_ms=10)
"""The model of this world is never surer than 0.9."""

Story = Callable[[AgentWorld], Awaitable[None]]


def tell(story: Story, *, policy: Policy = UNSURE, cache_entries: int = 0) -> AgentWorld:
    """Play a story in a world whose device serves digits/1.0.0 and is online."""
    world = AgentWorld()
    world.profile = profile(duration_ms=0, good_answers=0)
    world.policy = policy
    world.cache_entries = cache_entries

    async def play() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: world.models.routes().get("digits") is not None and host(world) is not None, "served")
        await until(lambda: world.uplink.online, "online")
        await until(lambda: settled(world), "committed")
        await story(world)

    world.life(play)
    return world


def settled(world: AgentWorld) -> bool:
    slot = world.models.slot("digits")
    return slot is not None and slot.phase is Phase.COMMITTED


def host(world: AgentWorld) -> FakeHost | None:
    """The host that answers now."""
    release = world.models.routes()["digits"].release
    found = world.models.hosting.get(release.key) if release is not None else None
    assert found is None or isinstance(found, FakeHost)
    return found


async def infer(world: AgentWorld, id: str = "r1", *, deadline_ms: int = 200, value: int = 0, rows: int = 1) -> Answer:
    reply = await ask(world, id, deadline_ms=deadline_ms, value=value, rows=rows)
    assert isinstance(reply, Answer), reply
    return reply


async def ask(world: AgentWorld, id: str = "r1", *, deadline_ms: int = 200, value: int = 0, rows: int = 1) -> Reply:
    head = TensorHead(name="x", dtype="fp32", shape=(rows, 4))
    request = Infer(model="digits", inputs=(head,), id=id, deadline_ms=deadline_ms)
    return await world.ask(request, bytes([value]) * 16 * rows)


def records(world: AgentWorld, kind: type) -> list[object]:
    return [record.body for record in world.hub.records.values() if isinstance(record.body, kind)]


# The cascade


def test_an_unsure_answer_is_the_hubs_when_it_comes_in_time() -> None:
    async def story(world: AgentWorld) -> None:
        answer = await infer(world)
        assert (answer.rung, answer.escalated, answer.degraded) == ("cloud", "answered", False)
        assert (answer.model, answer.version, answer.labels) == ("digits-large", "3.0.0", ("7",))
        assert "0.90" in answer.reason
        (question,) = world.cloud.asked
        assert (question.model, question.payload) == ("digits-large", bytes(16))
        assert question.deadline_ms <= 190
        await until(lambda: bool(records(world, Result)), "the result reaches the hub")
        (result,) = records(world, Result)
        assert isinstance(result, Result)
        assert (result.rung, result.model, result.version, result.label) == ("cloud", "digits-large", "3.0.0", "7")
        feedback = world.answering.outcome(Feedback(request="r1", label="7"))
        assert isinstance(feedback, Outcome)
        assert (feedback.model, feedback.correct) == ("digits-large", True)
        status = await world.ask(Status())
        assert isinstance(status, AgentState)
        assert status.escalations == {"answered": 1}

    tell(story)


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(model="digits-large", below=0.5), Policy(model="m", below=1.0, family="dogs")]
)
def test_a_sure_answer_and_one_without_a_policy_stay_local(policy: Policy) -> None:
    async def story(world: AgentWorld) -> None:
        answer = await infer(world)
        assert (answer.rung, answer.escalated, answer.degraded, answer.reason) == ("full", "", False, "")
        assert world.cloud.asked == []

    tell(story, policy=policy)


def test_several_rows_stay_local() -> None:
    async def story(world: AgentWorld) -> None:
        assert (await infer(world, rows=2)).escalated == ""

    world = tell(story)
    assert world.cloud.asked == []


@pytest.mark.parametrize(
    ("says", "escalated", "words"),
    [
        (CloudRefusal(status=429, message="queue full", retry_after_ms=2_000), "refused", "queue full"),
        (TransferCorrupt("that is no answer"), "refused", "no answer"),
        (Unreachable("the connection broke"), "offline", "broke"),
    ],
)
def test_the_local_answer_comes_marked_when_the_hub_fails(
    says: CloudRefusal | TransferError, escalated: str, words: str
) -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.says = says
        answer = await infer(world)
        assert (answer.rung, answer.labels, answer.degraded) == ("full", ("1.0.0",), True)
        assert answer.escalated == escalated
        assert words in answer.reason
        assert answer.deadline_met

    tell(story)


def test_a_defect_in_asking_the_hub_is_told_and_takes_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.says = OverflowError("a number that fits nowhere")
        told = [(await infer(world, f"r{number}")).escalated for number in range(MOST_ON_THE_WAY + 2)]
        assert told == ["refused"] * FAILURES_TO_OPEN + ["breaker"] * (len(told) - FAILURES_TO_OPEN)
        world.cloud.says = cloud_answer()
        world.clock.advance(LONGEST_OPEN_MS)
        assert (await infer(world)).escalated == "answered"

    tell(story)
    assert "asking the hub failed" in [record.message for record in caplog.records]


def test_a_defect_that_comes_late_gives_its_place_back_too() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        world.cloud.says = OverflowError("a number that fits nowhere")
        for number in range(2):
            assert (await infer(world, f"r{number}", deadline_ms=50)).escalated == "late"
        world.cloud.go_on()
        for number in range(2):
            while await world.ask(Late(request=f"r{number}", id="q")) != Done(id="q", detail="none"):
                await asyncio.sleep(0.002)
        world.cloud.says = cloud_answer()
        answers = await asyncio.gather(*(infer(world, f"s{number}") for number in range(MOST_ON_THE_WAY)))
        assert [answer.escalated for answer in answers] == ["answered"] * MOST_ON_THE_WAY

    tell(story)


def test_a_request_without_a_release_is_held_against_its_shape_before_the_hub_is_asked() -> None:
    world = AgentWorld()
    world.policy = Policy(model="digits-large")
    world.fetcher.away = True
    head = TensorHead(name="x", dtype="fp32", shape=(1, 4))

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: world.models.slot("digits") is not None and world.uplink.online, "assigned, not here")
        for wrong in (head, *(TensorHead(name="x", dtype="fp32", shape=shape) for shape in ((1, -4), (1,) * 9))):
            with pytest.raises(InputRefused):
                await world.ask(Infer(model="digits", inputs=(wrong,), id="bad"), bytes(15))
        with pytest.raises(InputRefused):
            await world.ask(Infer(model="digits", inputs=(head,) * 65, id="bad"), bytes(16 * 65))
        assert world.cloud.asked == []
        answer = await world.ask(Infer(model="digits", inputs=(head,), id="good"), bytes(16))
        assert isinstance(answer, Answer)
        assert answer.rung == "cloud"

    world.life(story)


@pytest.mark.parametrize(
    ("status", "escalated"), [(400, "refused"), (413, "refused"), (408, "breaker"), (429, "breaker"), (503, "breaker")]
)
def test_a_no_to_one_request_is_not_held_against_the_hub(status: int, escalated: str) -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.says = CloudRefusal(status=status, message="no")
        for number in range(FAILURES_TO_OPEN):
            assert (await infer(world, f"r{number}")).escalated == "refused"
        assert (await infer(world)).escalated == escalated

    tell(story)


def test_retry_after_is_heard() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.says = CloudRefusal(status=429, message="queue full", retry_after_ms=2_000)
        assert (await infer(world)).escalated == "refused"
        world.cloud.says = cloud_answer()
        world.clock.advance(1_999)
        assert (await infer(world)).escalated == "breaker"
        world.clock.advance(1)
        assert (await infer(world)).escalated == "answered"

    tell(story)


def test_every_answer_leaves_by_its_deadline_when_the_hub_never_answers() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        answers = [await infer(world, f"r{number}", deadline_ms=80) for number in range(12)]
        assert all(answer.deadline_met and answer.degraded and answer.rung == "full" for answer in answers)
        told = [answer.escalated for answer in answers]
        assert told == ["late"] * FAILURES_TO_OPEN + ["breaker"] * (12 - FAILURES_TO_OPEN)

    tell(story)


def test_many_at_once_do_not_queue_behind_a_silent_hub() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        answers = await asyncio.gather(*(infer(world, f"r{number}", deadline_ms=150) for number in range(20)))
        assert all(answer.deadline_met for answer in answers)
        assert [answer.escalated for answer in answers].count("late") == MOST_ON_THE_WAY
        assert {answer.escalated for answer in answers} == {"late", "budget"}

    tell(story)


def test_without_a_link_the_hub_is_not_asked() -> None:
    async def story(world: AgentWorld) -> None:
        world.uplink.lost("cut")
        await until(lambda: not world.uplink.online, "offline")
        answer = await infer(world)
        assert (answer.escalated, answer.degraded) == ("offline", True)
        assert world.cloud.asked == []

    tell(story)


def test_a_short_deadline_is_not_spent_on_the_hub() -> None:
    async def story(world: AgentWorld) -> None:
        answer = await infer(world, deadline_ms=11)
        assert answer.escalated == "no_time"
        assert world.cloud.asked == []

    tell(story)


def test_the_time_before_a_requests_turn_is_a_part_of_its_deadline() -> None:
    async def story(world: AgentWorld) -> None:
        head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
        request = Infer(model="digits", inputs=(head,), id="r", deadline_ms=500)
        now = asyncio.get_running_loop().time()
        reply, _ = await world.service.handle(request, bytes(16), now - 0.5)
        assert isinstance(reply, Refusal)
        assert reply.code == "deadline"
        reply, _ = await world.service.handle(request, bytes(16), now - 0.3)
        assert isinstance(reply, Answer)
        assert reply.took_us >= 300_000
        (question,) = world.cloud.asked
        assert question.deadline_ms <= 190

    tell(story)


@pytest.mark.parametrize(
    ("path", "outputs", "rung", "escalated"),
    [
        ("digits", ["y"], "cloud", "answered"),
        ("digits", [], "cloud", "answered"),
        ("digits/versions/1.0.0", ["y"], "full", ""),
        ("digits", ["h"], "full", "refused"),
    ],
)
def test_a_good_local_answer_never_becomes_an_error_because_the_hub_was_asked(
    path: str, outputs: list[str], rung: str, escalated: str
) -> None:
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}],
        "outputs": [{"name": name} for name in outputs],
        "parameters": {"timeout": 5_000_000},
    }

    def two_outputs(manifest: Manifest, variant: Variant, inputs: tuple[TensorHead, ...], payload: bytes) -> HostAnswer:
        told = local_answer(manifest, variant, inputs, payload)
        more = TensorHead(name="h", dtype="fp32", shape=(1, 1))
        return msgspec.structs.replace(told, outputs=(*told.outputs, more), payload=bytes(12))

    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running._script = two_outputs
        asked = HttpRequest(
            method="POST", target=f"/v2/models/{path}/infer", headers={}, body=bytearray(json.dumps(body).encode())
        )
        async with asyncio.TaskGroup() as tasks:
            room = WaitingRoom(handle=world.service.handle, tasks=tasks)
            said = await Conversation(reply_to=room.reply_to).respond(asked, Place(room))
        document = json.loads(b"".join(bytes(part) for part in said.parts))
        assert said.status == 200, document
        assert document["parameters"]["rung"] == rung
        assert document["parameters"].get("escalated", "") == escalated
        assert outputs in ([], [output["name"] for output in document["outputs"]])

    tell(story)


def test_a_version_that_is_not_served_is_nobodys_to_answer() -> None:
    async def story(world: AgentWorld) -> None:
        head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
        for _ in range(2):
            refused = await world.ask(Infer(model="digits", inputs=(head,), id="r", version="2.0.0"), bytes(16))
            assert isinstance(refused, Refusal)
            assert (refused.code, refused.retry) == ("model.unknown", False)
            running = host(world)
            if running is not None:
                running.crash()
        pinned = await world.ask(Infer(model="digits", inputs=(head,), id="r", version="1.0.0"), bytes(16))
        assert isinstance(pinned, Refusal)  # the hub's model has another version
        assert world.cloud.asked == []

    tell(story)


# Late answers


def test_a_late_answer_is_kept_for_the_hub_and_for_the_application() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        assert (await infer(world, "r1", deadline_ms=50)).escalated == "late"
        assert await world.ask(Late(request="r1", id="q1")) == Done(id="q1", detail="pending")
        assert await world.ask(Late(request="r2", id="q2")) == Done(id="q2", detail="none")
        world.cloud.go_on()
        await until(lambda: bool(records(world, Outcome)), "the label reaches the hub")
        (outcome,) = records(world, Outcome)
        assert isinstance(outcome, Outcome)
        assert (outcome.request, outcome.source, outcome.label, outcome.correct) == ("r1", "hub", "7", None)
        assert (outcome.model, outcome.version) == ("digits", "1.0.0")
        assert outcome.latency_us > 0
        late = await world.ask(Late(request="r1", id="q3"))
        assert isinstance(late, Answer)
        assert (late.id, late.rung, late.labels, late.version) == ("q3", "cloud", ("7",), "3.0.0")
        assert not late.deadline_met

    tell(story)


def test_a_late_refusal_leaves_nothing() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        world.cloud.says = Unreachable("gone")
        assert (await infer(world, deadline_ms=50)).escalated == "late"
        world.cloud.go_on()
        gone = Done(id="q", detail="none")
        while await world.ask(Late(request="r1", id="q")) != gone:
            await asyncio.sleep(0.002)

    world = tell(story)
    assert records(world, Outcome) == []


def test_a_late_answer_that_the_disk_refuses_is_still_there_for_the_application() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        await infer(world, deadline_ms=50)
        refused = asyncio.Event()

        def refuse(body: Body, *, at_ms: int, grade: Grade) -> KeptTicket:
            refused.set()
            raise StorageFull("no room")

        world.outbox.put, put = refuse, world.outbox.put  # type: ignore[method-assign,assignment]
        world.cloud.go_on()
        await asyncio.wait_for(refused.wait(), 5)
        world.outbox.put = put  # type: ignore[method-assign]
        assert isinstance(await world.ask(Late(request="r1", id="q")), Answer)

    tell(story)


def test_stopping_does_not_wait_for_the_hub() -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = True
        await infer(world, deadline_ms=50)

    assert tell(story).cloud.closed


# The ladder and the cache


def test_without_a_model_host_the_hub_answers_beside() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        world.hosts.fail_next = HostLost("no memory")
        running.crash()
        answer = await infer(world)
        assert (answer.rung, answer.labels, answer.degraded) == ("cloud", ("7",), False)
        assert "no release of 'digits' is loaded" in answer.reason

    tell(story, policy=Policy(model="digits-large"))


def test_without_host_cache_and_hub_the_refusal_says_all_of_it() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        world.cloud.says = CloudRefusal(status=404, message="there is no such model")
        running.crash()
        reply = await ask(world)
        assert isinstance(reply, Refusal)
        assert (reply.code, reply.retry) == ("model.not_loaded", True)
        assert "is loaded" in reply.message
        assert "no such model" in reply.message

    tell(story)


def test_a_host_that_dies_under_a_request_is_made_good_by_the_hub() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        asking = asyncio.create_task(infer(world, deadline_ms=2_000))
        await until(lambda: bool(running._pending), "on its way")
        running.crash()
        answer = await asking
        assert answer.rung == "cloud"
        assert "ended" in answer.reason

    tell(story)


def test_the_same_request_is_answered_from_the_cache_and_says_so() -> None:
    async def story(world: AgentWorld) -> None:
        first, again = await infer(world, "r1"), await infer(world, "r2")
        assert (first.rung, first.reason) == ("full", "")
        assert (again.rung, again.degraded, again.labels) == ("full", False, first.labels)
        assert "kept" in again.reason
        assert (await infer(world, "r3", value=1)).reason == ""

    tell(story, policy=Policy(), cache_entries=8)


def test_without_its_host_a_kept_answer_is_called_cached() -> None:
    async def story(world: AgentWorld) -> None:
        await infer(world)
        running = host(world)
        assert running is not None
        running.crash()
        answer = await infer(world)
        assert (answer.rung, answer.degraded, answer.labels) == ("cached", True, ("1.0.0",))
        assert "is loaded" in answer.reason
        assert isinstance(await ask(world, value=1), Refusal)

    tell(story, policy=Policy(), cache_entries=8)


def test_the_cache_is_off_unless_configured() -> None:
    async def story(world: AgentWorld) -> None:
        await infer(world)
        assert (await infer(world)).reason == ""
        running = host(world)
        assert running is not None
        running.crash()
        assert isinstance(await ask(world), Refusal)

    tell(story, policy=Policy())


def test_a_release_switch_forgets_what_was_kept() -> None:
    async def story(world: AgentWorld) -> None:
        assert (await infer(world)).labels == ("1.0.0",)
        world.arrive(world.publish(release(world, "2.0.0")))
        await until(lambda: settled(world) and version(world) == "2.0.0", "2.0.0")
        answer = await infer(world)
        assert (answer.labels, answer.reason) == (("2.0.0",), "")

    tell(story, policy=Policy(), cache_entries=8)


def joined(world: AgentWorld) -> int:
    """How many requests wait for an identical one that runs."""
    return sum(len(flight._callbacks or ()) for flight in world.answering._flights.values())


def version(world: AgentWorld) -> str:
    release = world.models.routes()["digits"].release
    return "" if release is None else release.manifest.version


def test_identical_requests_in_the_air_run_once() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        asking = [asyncio.create_task(infer(world, f"r{number}", deadline_ms=2_000)) for number in range(5)]
        other = asyncio.create_task(infer(world, "other", deadline_ms=2_000, value=9))
        await until(lambda: len(running._pending) == 2 and joined(world) == 4, "on their way")
        for waiting in list(running._pending):
            waiting.set_result(None)
        answers = [await task for task in asking]
        assert {answer.id for answer in answers} == {f"r{number}" for number in range(5)}
        await other

    tell(story, policy=Policy(), cache_entries=8)


def test_a_request_with_more_time_does_not_share_the_fate_of_one_with_less() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        short = asyncio.create_task(ask(world, "short", deadline_ms=50))
        await until(lambda: len(running._pending) == 1, "on its way")
        long = asyncio.create_task(infer(world, "long", deadline_ms=5_000))
        refused = await short
        assert isinstance(refused, Refusal)
        assert refused.code == "deadline"
        await until(lambda: len(running._pending) == 1, "run again")
        for waiting in list(running._pending):
            waiting.set_result(None)
        assert (await long).labels == ("1.0.0",)

    tell(story, policy=Policy(), cache_entries=8)


def test_a_request_that_was_given_up_leaves_its_work_to_those_who_wait() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        first = asyncio.create_task(infer(world, "first", deadline_ms=5_000))
        await until(lambda: len(running._pending) == 1, "on its way")
        second = asyncio.create_task(infer(world, "second", deadline_ms=5_000))
        await until(lambda: joined(world) == 1, "it waits for the first")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await until(lambda: len(running._pending) == 1, "run again")
        for waiting in list(running._pending):
            waiting.set_result(None)
        assert (await second).id == "second"

    tell(story, policy=Policy(), cache_entries=8)


def test_a_wrong_request_is_the_callers_fault_also_while_the_host_is_gone() -> None:
    async def story(world: AgentWorld) -> None:
        head = TensorHead(name="x", dtype="fp64", shape=(1, 4))
        for _ in range(2):
            with pytest.raises(InputRefused):
                await world.ask(Infer(model="digits", inputs=(head,), id="r"), bytes(32))
            running = host(world)
            if running is not None:
                running.crash()

    world = tell(story, cache_entries=8)
    assert world.cloud.asked == []


def test_results_carry_the_rung_that_answered() -> None:
    async def story(world: AgentWorld) -> None:
        await infer(world, "r1")
        running = host(world)
        assert running is not None
        running.crash()
        await infer(world, "r2")
        await until(lambda: world.hub.results() >= 2, "both arrive")
        rungs = {body.request: body.rung for body in records(world, Result) if isinstance(body, Result)}
        assert rungs == {"r1": "full", "r2": "cached"}

    tell(story, policy=Policy(), cache_entries=8)
