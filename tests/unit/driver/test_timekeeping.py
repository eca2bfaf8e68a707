"""The agent and the time: when it asks, what counts, what waits, and that nothing stops a model that runs."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.core import link, renewal, trusted_time
from edge_agent.core.trusted_time import BUILT_MS, WRONG_DATES
from edge_agent.driver.events import ForLink, TimeDoubted
from edge_agent.ports import CertificateLife
from shared.errors import OutriderError, StorageError, TransferRefused, TrustError, Unreachable
from shared.inference import AgentState, Answer, Status
from shared.release import Floors, VerifiedAssignment
from tests.fakes.agent_world import AgentWorld, release, until
from tests.fakes.courier import FakeCourier
from tests.fakes.renewer import FakeRenewer

DAY_MS = 86_400_000
TRUE_MS = BUILT_MS + 100 * DAY_MS
CLOCKS = {"1970": 0, "right": TRUE_MS, "2099": 4_083_000_000_000}


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted_time, "pause_ms", lambda _, jitter: 1)


async def status(world: AgentWorld) -> AgentState:
    reply = await world.ask(Status(id="s"))
    assert isinstance(reply, AgentState)
    return reply


async def serving(world: AgentWorld, version: str) -> None:
    def is_there() -> bool:
        slot = world.models.slot("digits")
        return slot is not None and slot.active is not None and slot.active.manifest.version == version

    await until(is_there, f"{version} serves")


def asked(world: AgentWorld, times: int) -> bool:
    return len(world.time_source.asked) >= times


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_release_waits_for_the_time_and_the_model_at_hand_runs_on(clock: str) -> None:
    world = AgentWorld()
    world.clock.wall = CLOCKS[clock]

    async def first() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await serving(world, "1.0.0")

    world.life(first)
    world.verifier.names_time_key = True
    world.time_source.says = Unreachable("the answer was dropped")

    async def second() -> None:
        document = world.publish(release(world, "1.1.0"))
        world.arrive(document)
        await until(lambda: "release.waits_for_time" in world.hub.events(), "the hub hears of it")
        world.arrive(document)
        before = len(world.time_source.asked)
        await until(lambda: asked(world, before + 3), "it is asked for the time again and again")
        assert (await status(world)).assignment_waits
        reply = await world.infer()
        assert isinstance(reply, Answer)
        assert reply.version == "1.0.0"
        world.time_source.says = TRUE_MS
        await serving(world, "1.1.0")
        state = await status(world)
        assert (state.time_basis, state.assignment_waits, state.time_detail) == ("attested", "", "")
        assert world.hub.events().count("release.waits_for_time") == 1
        assert abs(world.verifier.times[-1] - TRUE_MS) < DAY_MS

    world.life(second)
    assert world.ledger.floors.attested_ms == TRUE_MS


@pytest.mark.parametrize(
    "error",
    [
        TrustError("replayed", code="trust.time.replayed"),
        TrustError("for another", code="trust.time.wrong_device"),
        TrustError("by another", code="trust.time.signature"),
        TrustError("nonsense", code="trust.time.malformed"),
        TrustError("2**62", code="trust.time.too_far"),
        Unreachable("dropped"),
        TransferRefused("no", code="transfer.refused"),
    ],
)
def test_an_answer_that_is_not_to_be_trusted_leaves_the_time_as_it_was(error: OutriderError) -> None:
    world = AgentWorld()
    world.clock.wall = 0
    world.verifier.names_time_key = True
    world.time_source.says = error

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: asked(world, 4), "it is asked again and again")
        state = await status(world)
        assert (state.time_basis, state.time_ms) == ("floor", BUILT_MS)
        assert error.code in state.time_detail
        assert world.models.slot("digits") is None
        if isinstance(error, TrustError):
            await until(lambda: "time.refused" in world.hub.events(), "the hub hears of the attack")
            await until(lambda: asked(world, 12), "again")
            assert world.hub.events().count("time.refused") == 1

    world.life(story)
    assert world.ledger.floors.attested_ms == 0


def test_a_hub_that_attests_no_time_is_left_in_peace_and_its_devices_go_on_as_before() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await serving(world, "1.0.0")
        assert world.verifier.times == [world.clock.wall]
        assert (await status(world)).time_basis == "clock"
        # Once at the start, once when the link came up.
        assert 1 <= len(world.time_source.asked) <= 2

    world.life(story)


def test_the_time_goes_by_the_boot_clock_through_a_suspend_and_a_jump() -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS

    async def story() -> None:
        await until(lambda: world.timekeeping.attested, "attested")
        world.clock.suspend(7 * DAY_MS)
        world.clock.wall = 5
        assert world.timekeeping.now_ms() == TRUE_MS + 7 * DAY_MS
        assert world.timekeeping.clock_error_ms() == 5 - TRUE_MS - 7 * DAY_MS

    world.life(story)


def test_each_boot_asks_anew_and_starts_from_what_was_known() -> None:
    world = AgentWorld()
    world.ledger.floors = Floors(time_ms=TRUE_MS)
    world.time_source.says = TRUE_MS + DAY_MS

    async def attest() -> None:
        await until(lambda: world.timekeeping.attested, "attested")
        assert world.time_source.asked[0].time_ms == TRUE_MS

    async def dropped() -> None:
        world.clock.wall = 0
        await until(lambda: asked(world, 3), "asked")
        assert not world.timekeeping.attested
        assert world.timekeeping.now_ms() == TRUE_MS + DAY_MS

    world.life(attest)
    world.time_source.says = Unreachable("dropped")
    world.time_source.asked.clear()
    world.life(dropped)


def test_a_time_that_the_disk_does_not_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS
    keep = world.ledger.remember_time
    seen: list[bool] = []

    async def refuse(time_ms: int) -> None:
        seen.append(world.timekeeping.attested)
        if len(seen) < 3:
            raise StorageError("the disk refuses")
        await keep(time_ms)

    monkeypatch.setattr(world.ledger, "remember_time", refuse)

    async def story() -> None:
        await until(lambda: world.timekeeping.attested, "attested")
        assert seen == [False] * 3
        assert world.ledger.floors.attested_ms == TRUE_MS

    world.life(story)


def test_dates_that_do_not_agree_with_an_attested_time_have_the_hub_asked_again() -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS + 200 * DAY_MS  # a thief of the time key

    async def story() -> None:
        await until(lambda: world.timekeeping.attested, "attested")
        world.time_source.says = TRUE_MS
        world.inbox.post(TimeDoubted())
        await until(lambda: world.timekeeping.now_ms() < TRUE_MS + DAY_MS, "set back by a fresh answer")
        assert world.ledger.floors.attested_ms == TRUE_MS

    world.life(story)


def test_a_link_that_comes_back_has_the_hub_asked_again_but_not_at_once() -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS + 3 * DAY_MS  # the hub's clock was wrong when the device started

    async def again() -> None:
        births = world.hub.births
        world.inbox.post(ForLink(link.Reconnect()))
        await until(lambda: world.hub.births > births, "the link is made anew")

    async def story() -> None:
        await until(lambda: world.timekeeping.attested and world.uplink.online, "attested and online")
        world.time_source.says = TRUE_MS
        before = len(world.time_source.asked)
        for _ in range(3):
            await again()
        assert len(world.time_source.asked) == before
        world.clock.advance(trusted_time.AGAIN_MS)
        await again()
        await until(lambda: world.timekeeping.now_ms() == TRUE_MS, "set back by a fresh answer")

    world.life(story)


def freezing(world: AgentWorld) -> None:
    """Metadata that expires a day after the true time."""
    inner = world.verifier.verify

    async def verify(
        document: bytes, *, floors: Floors, wall_ms: int, time_attested: bool = False
    ) -> VerifiedAssignment:
        verified = await inner(document, floors=floors, wall_ms=wall_ms, time_attested=time_attested)
        if wall_ms > TRUE_MS + DAY_MS:
            raise TrustError("the timestamp metadata has expired", code="trust.freeze")
        return verified

    world.verifier.verify = verify  # type: ignore[method-assign]


def test_what_has_expired_by_a_time_that_was_wrong_is_judged_once_more() -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS + 3 * DAY_MS
    freezing(world)

    async def story() -> None:
        await until(lambda: world.timekeeping.attested, "attested")
        world.time_source.says = TRUE_MS
        world.arrive(world.publish(release(world, "1.0.0")))
        await serving(world, "1.0.0")
        assert "release.refused" not in world.hub.events()

    world.life(story)


def test_what_has_expired_is_refused_when_the_hub_says_the_same_time_and_is_not_asked_for_each() -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS + 3 * DAY_MS
    freezing(world)

    async def refused(number: int) -> None:
        world.arrive(world.publish(release(world, f"1.{number}.0")))
        await until(lambda: world.hub.events().count("release.refused") == number, "refused")

    async def story() -> None:
        await until(lambda: world.timekeeping.attested, "attested")
        before = len(world.time_source.asked)
        for number in (1, 2, 3):
            await refused(number)
        assert len(world.time_source.asked) == before + 1
        assert len(world.verifier.times) == 3

    world.life(story)


def test_a_certificate_that_really_is_out_of_date_makes_no_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    world.time_source.says = TRUE_MS
    expired = TransferRefused("it expired", code=WRONG_DATES)
    world.certificate, world.renewer = CertificateLife(not_before_ms=1, not_after_ms=DAY_MS), FakeRenewer(expired)
    connects: list[str] = []

    async def refuse(_: FakeCourier, *, will_topic: str, will_payload: bytes, subscribe: str) -> None:
        connects.append(will_topic)
        raise expired

    monkeypatch.setattr(FakeCourier, "connect", refuse)
    for machine in (link, renewal):
        monkeypatch.setattr(machine, "drawn_ms", lambda *_, **__: 3_600_000)

    def tried() -> tuple[int, int, int]:
        return len(connects), world.renewer.asked, len(world.time_source.asked)

    async def at_rest() -> None:
        for _ in range(500):
            await asyncio.sleep(0)

    async def story() -> None:
        await until(lambda: min(tried()) >= 2, "both are tried again with the first attestation, then it is doubted")
        await at_rest()
        before = tried()
        assert max(before) <= 3
        world.inbox.post(TimeDoubted())
        await at_rest()
        assert tried() == before
        # A minute later the hub is asked, and says the same.
        world.clock.advance(trusted_time.AGAIN_MS)
        world.time_source.says = TRUE_MS + trusted_time.AGAIN_MS
        world.inbox.post(TimeDoubted())
        await until(lambda: asked(world, before[2] + 1), "asked")
        await at_rest()
        assert tried() == (*before[:2], before[2] + 1)
        # Then another time, by which they may be right.
        world.clock.advance(trusted_time.AGAIN_MS)
        world.time_source.says = TRUE_MS
        world.inbox.post(TimeDoubted())
        await until(lambda: tried()[0] > before[0] and tried()[1] > before[1], "tried by the other time")
        await at_rest()
        assert max(tried()) <= max(before) + 3

    world.life(story)


def test_a_clock_that_is_wrong_is_told_once() -> None:
    world = AgentWorld()
    world.clock.wall = 0
    world.time_source.says = TRUE_MS

    async def story() -> None:
        await until(lambda: "time.clock_wrong" in world.hub.events(), "told")
        world.inbox.post(TimeDoubted())
        await until(lambda: asked(world, 2), "asked again")
        await asyncio.sleep(0)
        assert world.hub.events().count("time.clock_wrong") == 1

    world.life(story)
