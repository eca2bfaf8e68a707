"""The driver with the real core on fakes: what an application, a hub and a power cut see of it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Never

import pytest

from edge_agent.core.slot_values import Phase
from shared.errors import OutriderError, StorageError, Unreachable
from shared.ids import Digest, FamilyName
from shared.inference import (
    AgentState,
    Answer,
    Control,
    Describe,
    Done,
    Feedback,
    Infer,
    Measure,
    Refusal,
    Status,
    TensorHead,
)
from shared.release import Patch
from shared.telemetry import Outcome, RecordClass
from shared.wire.verification import Judged
from shared.wire.verification import Refused as StoredRefusal
from tests.fakes.agent_world import AgentWorld, profile, release, until
from tests.fakes.hosts import FakeHost
from tests.fakes.patcher import build_fake_patch


def phase(world: AgentWorld) -> Phase | None:
    slot = world.models.slot("digits")
    return None if slot is None else slot.phase


def version(world: AgentWorld) -> str:
    slot = world.models.slot("digits")
    return "" if slot is None or slot.active is None else slot.active.manifest.version


def running(world: AgentWorld, wanted: str) -> list[FakeHost]:
    return [host for host in world.hosts.started if host.manifest.version == wanted and not host.stopped]


async def committed(world: AgentWorld, wanted: str) -> None:
    await until(lambda: phase(world) is Phase.COMMITTED and version(world) == wanted, f"{wanted} committed")


def test_an_assigned_release_is_fetched_tried_and_committed() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        reply = await world.infer("r1")
        assert isinstance(reply, Answer)
        assert (reply.version, reply.rung, reply.labels) == ("1.0.0", "full", ("1.0.0",))
        await until(lambda: "release.committed" in world.hub.events(), "the hub hears of the commit")
        await until(
            lambda: any(r.assignment_version == 1 and r.models[0].phase == "committed" for r in world.hub.reports),
            "reported",
        )

    world.life(story)


def test_a_bad_release_is_left_and_the_old_one_answers_on() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        world.hosts.agreement = 0.0
        world.arrive(world.publish(release(world, "2.0.0")))
        await until(lambda: "release.failed" in world.hub.events(), "the failure is told")
        reply = await world.infer()
        assert isinstance(reply, Answer)
        assert reply.version == "1.0.0"

    world.life(story)


def test_a_candidate_whose_host_dies_on_trial_is_rolled_back() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        world.arrive(world.publish(release(world, "2.0.0")))
        for _ in range(3):
            await until(lambda: phase(world) is Phase.PROBATION and bool(running(world, "2.0.0")), "on trial")
            running(world, "2.0.0")[0].crash()
        await until(lambda: phase(world) is Phase.COMMITTED, "rolled back")
        assert version(world) == "1.0.0"
        await until(lambda: "release.rolled_back" in world.hub.events(), "told")
        reply = await world.infer()
        assert isinstance(reply, Answer)
        assert reply.version == "1.0.0"

    world.profile = profile(duration_ms=300)
    world.life(story)


def test_a_wrong_signature_changes_nothing_and_is_told() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        world.arrive(b"forged")
        await until(lambda: "release.refused" in world.hub.events(), "told")
        assert version(world) == "1.0.0"

    world.life(story)


def test_what_no_longer_holds_is_told_and_not_served_until_it_is_trusted_again() -> None:
    world = AgentWorld()
    documents: list[bytes] = []

    async def install() -> None:
        documents.append(world.publish(release(world, "1.0.0")))
        world.arrive(documents[0])
        await committed(world, "1.0.0")

    async def revoked() -> None:
        await until(lambda: "release.revoked" in world.hub.events(), "told")
        assert [held.version for held in world.verifier.asked] == ["1.0.0"]
        reply = await world.infer()
        assert isinstance(reply, Refusal)
        assert reply.code == "model.not_loaded"
        world.arrive(documents[0])
        await answers(world)

    async def undecided() -> None:
        await answers(world)
        assert world.hub.events().count("release.revoked") == 1

    async def answers(world: AgentWorld) -> None:
        while not isinstance(await world.infer(), Answer):
            await asyncio.sleep(0.01)

    world.life(install)
    assert world.ledger.verified is not None
    (held,) = world.ledger.verified.models
    world.verifier.judged = Judged(
        refused={held.manifest_digest: StoredRefusal(code="trust.signature", message="revoked")}, undecided={}
    )
    world.life(revoked)
    world.verifier.judged = Judged(
        refused={}, undecided={held.manifest_digest: StoredRefusal(code="transfer.not_stored", message="gone")}
    )
    world.life(undecided)


def test_what_is_withheld_keeps_its_files_and_serves_at_the_next_start_at_which_it_holds() -> None:
    world = AgentWorld()

    async def install() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        world.broker.go_down()

    async def withheld() -> None:
        await until(lambda: "digits" in world.models.routes(), "restored")
        await until(lambda: world.models.routes()["digits"].release is None, "withheld")
        slot = world.models.slot("digits")
        assert slot is not None
        assert slot.error_code == "trust.wrong_hardware"
        assert slot.active is not None
        assert all(world.shelf.has(file.digest) for file in slot.active.files)
        await until(lambda: not world.models.hosting.pids(), "its host is not needed")
        world.fetcher.away = True

    async def corrected() -> None:
        await until(lambda: bool(running(world, "1.0.0")), "the host is up")
        assert isinstance(await world.infer(), Answer)
        await until(lambda: (slot := world.models.slot("digits")) is not None and not slot.error_code, "no error")

    world.life(install)
    assert world.ledger.verified is not None
    (held,) = world.ledger.verified.models
    refused = StoredRefusal(code="trust.wrong_hardware", message="signed for pi4")
    world.verifier.judged = Judged(refused={held.manifest_digest: refused}, undecided={})
    world.life(withheld)
    world.verifier.judged = Judged(refused={}, undecided={})
    world.life(corrected)


def test_nobody_goes_back_by_hand_to_what_is_withheld() -> None:
    world = AgentWorld()

    async def install() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")

    async def replaced() -> None:
        await until(lambda: "release.revoked" in world.hub.events(), "told")
        world.arrive(world.publish(release(world, "2.0.0")))
        await committed(world, "2.0.0")
        refusal = await world.ask(Control(command="model.rollback", argument="digits"))
        assert isinstance(refusal, Refusal)
        assert refusal.code == "release.no_previous"

    world.life(install)
    assert world.ledger.verified is not None
    (held,) = world.ledger.verified.models
    refused = StoredRefusal(code="trust.signature", message="revoked")
    world.verifier.judged = Judged(refused={held.manifest_digest: refused}, undecided={})
    world.life(replaced)


def test_a_look_at_what_is_installed_that_fails_stops_nothing() -> None:
    world = AgentWorld()

    async def install() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")

    async def serves() -> None:
        await until(lambda: bool(running(world, "1.0.0")), "the host is up")
        assert isinstance(await world.infer(), Answer)

    world.life(install)
    world.verifier.lost = OutriderError("no memory", code="verifier.start")
    world.life(serves)


def test_a_hub_that_drips_is_told_of_once_and_one_that_is_gone_is_not() -> None:
    world = AgentWorld()

    async def story() -> None:
        document = world.publish(release(world, "1.0.0"))
        world.verifier.error = Unreachable("nobody answered")
        world.arrive(document)
        world.verifier.error = Unreachable("3 bytes in 15 s", code="transfer.stalled")
        world.arrive(document)
        await until(lambda: "release.delayed" in world.hub.events(), "told")
        assert world.hub.events().count("release.delayed") == 1

    world.life(story)


def test_an_older_assignment_is_refused() -> None:
    world = AgentWorld()

    async def story() -> None:
        first = world.publish(release(world, "1.0.0"))
        world.arrive(first)
        await committed(world, "1.0.0")
        world.arrive(world.publish(release(world, "2.0.0")))
        await committed(world, "2.0.0")
        world.arrive(first)
        await until(lambda: "release.refused" in world.hub.events(), "told")
        assert version(world) == "2.0.0"

    world.life(story)


def test_the_hub_gone_answers_go_on_and_every_record_arrives_once_afterwards() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        before = world.hub.results()
        world.broker.go_down()
        for number in range(50):
            assert isinstance(await world.infer(f"r{number}"), Answer)
        done = await world.ask(Feedback(request="r7", label="1.0.0"))
        assert isinstance(done, Done)
        await until(lambda: world.outbox.depth().records[RecordClass.RESULT] >= 50, "results wait")
        status = await world.ask(Status())
        assert isinstance(status, AgentState)
        assert status.link != "online"
        world.broker.up = True
        await world.ask(Control(command="queue.flush"))
        await until(lambda: world.waiting() == 0, "the queue drains")
        assert world.hub.results() - before == 50
        outcomes = [record.body for record in world.hub.records.values() if isinstance(record.body, Outcome)]
        assert [(o.request, o.version, o.correct) for o in outcomes] == [("r7", "1.0.0", True)]

    world.life(story)


def test_an_unacknowledged_batch_is_sent_again_after_a_kill_and_counted_once() -> None:
    world = AgentWorld()

    async def first() -> None:
        world.hub.silent = True
        assert isinstance(await world.ask(Measure(name="t_c", value=21.5)), Done)
        await until(lambda: any("telemetry" in topic for topic, _ in world.broker.published), "sent")

    async def second() -> None:
        await until(lambda: world.hub.readings() == ["t_c"], "stored at last")
        await until(lambda: world.waiting() == 0, "acknowledged at last")

    world.life(first, clean=False)
    world.hub.silent = False
    world.life(second)
    assert world.hub.readings() == ["t_c"]


def test_after_a_kill_the_committed_release_serves_without_the_hub() -> None:
    world = AgentWorld()

    async def first() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")

    async def second() -> None:
        await until(
            lambda: world.models.routes().get("digits") is not None and world.models.routes()["digits"].up, "up"
        )
        reply = await world.infer()
        assert isinstance(reply, Answer)
        assert reply.version == "1.0.0"

    world.life(first, clean=False)
    world.broker.up = False
    world.fetcher.away = True
    world.life(second)


def test_files_that_cannot_be_fetched_are_fetched_when_the_link_is_back() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.fetcher.away = True
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: phase(world) is Phase.FETCHING, "fetching")
        world.fetcher.away = False
        world.broker.go_down()
        world.broker.up = True
        await committed(world, "1.0.0")

    world.life(story)


def test_a_verifier_without_its_files_is_asked_again() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.verifier.error = Unreachable("no metadata")
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: world.agent._intake.failures >= 1, "one failure")
        world.verifier.error = None
        await committed(world, "1.0.0")

    world.life(story)


def test_what_cannot_be_answered_is_refused_with_a_reason() -> None:
    world = AgentWorld()

    async def story() -> None:
        unknown = await world.infer()
        assert isinstance(unknown, Refusal)
        assert unknown.code == "model.unknown"
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        world.hosts.started[-1].hang = True
        late = await world.ask(
            Infer(model="digits", inputs=(TensorHead(name="x", dtype="fp32", shape=(1, 4)),), deadline_ms=20), bytes(16)
        )
        assert isinstance(late, Refusal)
        assert (late.code, late.retry) == ("deadline", True)
        assert isinstance(await world.ask(Describe(model="nothing")), Refusal)

    world.life(story)


def test_the_operator_of_the_device_can_go_back_one_release() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        nothing = await world.ask(Control(command="model.rollback", argument="digits"))
        assert isinstance(nothing, Refusal)
        world.arrive(world.publish(release(world, "2.0.0")))
        await committed(world, "2.0.0")
        assert isinstance(await world.ask(Control(command="model.rollback", argument="digits")), Done)
        await committed(world, "1.0.0")
        assert FamilyName("digits") in world.models.families()

    world.life(story)


def test_a_release_comes_by_a_patch_from_what_runs_here_and_the_door_tells_of_it() -> None:
    world = AgentWorld()
    world.patch_policy = "patch_only"

    async def story() -> None:
        old, new = release(world, "1.0.0"), release(world, "2.0.0")
        for file in (old.manifest.golden.file, *(variant.file for variant in old.manifest.variants)):
            world.shelf.append(file.digest, world.fetcher.files[file.digest], offset=0)
            world.shelf.publish(file)
        world.arrive(world.publish(old))
        await committed(world, "1.0.0")
        patches = []
        for before, after in (
            (old.manifest.golden.file, new.manifest.golden.file),
            *((a.file, b.file) for a, b in zip(old.manifest.variants, new.manifest.variants, strict=True)),
        ):
            made = build_fake_patch(world.fetcher.files[before.digest], world.fetcher.files.pop(after.digest))
            digest = Digest(hashlib.sha256(made).hexdigest())
            world.fetcher.files[digest] = made
            patches.append(Patch(base=before.digest, result=after.digest, digest=digest, length=len(made)))
        world.arrive(world.publish(new, patches=tuple(patches)))
        await committed(world, "2.0.0")
        state = await world.ask(Status(id="s"))
        assert isinstance(state, AgentState)
        assert state.updates["patched"] == len(world.patcher.applied) == 2  # the variant that runs, and the golden set
        assert state.updates["day_bytes"] == world.fetcher.asked_bytes > 0
        assert all(path.startswith("a patch to ") for path in world.fetcher.fetched)

    world.life(story)


def test_a_release_that_finds_no_room_waits_and_says_so_once() -> None:
    world = AgentWorld()

    async def story() -> None:
        world.shelf.free = 10
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: "release.waits" in world.hub.events(), "the hub hears of it")
        slot = world.models.slot("digits")
        assert slot is not None
        assert (slot.phase, slot.error_code, world.fetcher.fetched) == (Phase.FETCHING, "storage.room", [])
        world.shelf.free = 2**30
        await committed(world, "1.0.0")
        assert world.hub.events().count("release.waits") == 1

    world.life(story)


@pytest.mark.parametrize("call", ["has", "collect"])
def test_a_disk_that_does_not_show_its_files_ends_no_agent_and_no_decision(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = AgentWorld()
    refused: list[str] = []

    def refuses(*_: object) -> Never:
        refused.append(call)
        raise StorageError("Input/output error")

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")
        with monkeypatch.context() as patched:
            patched.setattr(world.shelf, call, refuses)
            world.arrive(world.publish(release(world, "2.0.0")))
            await until(lambda: bool(refused), "the disk was asked")
            await committed(world, "2.0.0" if call == "collect" else "1.0.0")
        answer = await world.infer()
        assert isinstance(answer, Answer)
        assert answer.version == ("2.0.0" if call == "collect" else "1.0.0")
        slot = world.models.slot("digits")
        assert slot is not None
        assert slot.error_code == ("" if call == "collect" else "storage")
        assert "the disk refuses the agent's state" not in caplog.text  # which would carry out half a decision twice

    world.life(story)


def test_what_a_power_cut_left_behind_is_collected_at_the_next_start() -> None:
    world = AgentWorld()
    stale = Digest("5" * 64)

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await committed(world, "1.0.0")

    world.life(story)
    kept = set(world.shelf.files)
    world.shelf.append(stale, b"a part of what nobody wants any more", offset=0)
    world.life(story)
    assert world.shelf.resume_at(stale) == 0
    assert set(world.shelf.files) == kept
