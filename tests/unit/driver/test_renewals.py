"""The driver's part of renewal: a new certificate is adopted and the link made anew; trouble is shown, never fatal."""

from __future__ import annotations

import pytest

from edge_agent.core.renewal import WRONG_LIFE
from edge_agent.core.trusted_time import WRONG_DATES
from edge_agent.ports import CertificateLife
from shared.errors import OutriderError, StorageError, TransferRefused, TrustError
from shared.inference import AgentState, Measure, Status
from tests.fakes.agent_world import AgentWorld, until
from tests.fakes.renewer import FakeRenewer

FAR_MS = 10**15
DAY_MS = 86_400_000
EXPIRED = CertificateLife(not_before_ms=1, not_after_ms=2)
FRESH = CertificateLife(not_before_ms=1, not_after_ms=FAR_MS)
REVOKED = TransferRefused("the certificate was revoked", code="renew.revoked", hint="enrol again")


async def status(world: AgentWorld) -> AgentState:
    reply = await world.ask(Status(id="s"))
    assert isinstance(reply, AgentState)
    return reply


def test_a_new_certificate_is_adopted_and_the_link_made_anew_without_losing_a_record() -> None:
    world = AgentWorld()
    world.certificate, world.renewer = EXPIRED, FakeRenewer(StorageError("full"), StorageError("full"), FRESH)

    async def story() -> None:
        await until(lambda: world.uplink.online, "the link is up")
        await world.ask(Measure(id="m", name="level", value=1.0))
        await until(lambda: bool(world.adopted), "the new certificate is used")
        await until(lambda: world.hub.births == 2, "the link is made anew")
        await until(lambda: "certificate.renewed" in world.hub.events(), "the hub hears of it")
        await until(lambda: world.waiting() == 0, "every record is at the hub")
        seen = await status(world)
        assert (seen.certificate_expires_ms, seen.certificate_trouble) == (FAR_MS, "")
        assert seen.certificate_due_ms > FAR_MS // 2

    world.life(story)
    assert world.renewer.asked == 3


def test_a_refusal_for_good_is_shown_with_what_to_do() -> None:
    world = AgentWorld()
    world.certificate, world.renewer = EXPIRED, FakeRenewer(REVOKED)

    async def story() -> None:
        await until(lambda: "certificate.refused" in world.hub.events(), "the refusal is noted")
        seen = await status(world)
        assert (seen.certificate_trouble, seen.certificate_todo) == ("the certificate was revoked", "enrol again")

    world.life(story)
    assert (world.adopted, world.renewer.asked) == ([], 1)


def test_what_fails_by_itself_is_tried_again() -> None:
    world = AgentWorld()
    world.certificate, world.renewer = EXPIRED, FakeRenewer(StorageError("the disk is full"), FRESH)

    async def story() -> None:
        await until(lambda: bool(world.adopted), "renewed at the second try")

    world.life(story)
    assert world.renewer.asked == 2


def test_an_identity_without_dates_is_looked_into_first() -> None:
    world = AgentWorld()
    world.certificate = CertificateLife()

    async def story() -> None:
        await until(lambda: world.renewer.looked == 1, "the dates are read")
        await until(lambda: world.renewals.expires_ms == FAR_MS, "they are known")

    world.life(story)
    assert world.renewer.asked == 0


def test_a_certificate_that_cannot_be_loaded_stops_nothing() -> None:
    world = AgentWorld()
    world.certificate, world.renewer = EXPIRED, FakeRenewer(FRESH)

    class Full(list[int]):
        def append(self, _: int) -> None:
            raise StorageError("the disk is gone")

    world.adopted = Full()

    async def story() -> None:
        await until(lambda: world.renewals.expires_ms == FAR_MS, "renewed")
        await until(lambda: world.uplink.online, "the link is up")

    world.life(story)


def test_the_trusted_time_decides_as_soon_as_the_hub_has_told_it() -> None:
    """A clock that stands still has the certificate look young; it has ended."""
    world = AgentWorld()
    now_ms = world.clock.wall_ms()
    world.certificate = CertificateLife(not_before_ms=now_ms - DAY_MS, not_after_ms=now_ms + 29 * DAY_MS)
    world.renewer = FakeRenewer(FRESH)

    async def story() -> None:
        await until(lambda: world.uplink.online, "the link is up")
        assert world.renewer.asked == 0
        world.time_source.says = now_ms + 365 * DAY_MS
        world.timekeeping.ask()
        await until(lambda: bool(world.adopted), "renewed at once")

    world.life(story)


@pytest.mark.parametrize(
    "wrong",
    [TransferRefused("it expired", code=WRONG_DATES), TrustError("it begins in 2036", code=WRONG_LIFE)],
    ids=["server", "own"],
)
def test_dates_that_do_not_agree_have_the_time_asked_again(wrong: OutriderError) -> None:
    world = AgentWorld()
    world.time_source.says = world.clock.wall_ms()
    world.certificate, world.renewer = EXPIRED, FakeRenewer(wrong)

    async def story() -> None:
        await until(lambda: len(world.time_source.asked) >= 2, "asked at the start, and again")

    world.life(story)
