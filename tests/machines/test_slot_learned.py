"""Learned releases in the slot machine and in the driver: held against their base before anything of them is loaded."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_agent.core import slots
from edge_agent.core.slot_values import (
    Event,
    Fetch,
    FilesBad,
    FilesHere,
    FilesRefused,
    FilesVerified,
    Offered,
    Phase,
    Restarted,
    StartHost,
    VerifyFiles,
)
from edge_agent.driver.bringing import Bringing, Supplies
from edge_agent.driver.files import Files
from edge_agent.driver.loop import Loop
from edge_agent.driver.metering import Meter
from shared.errors import OutriderError, TrustError
from shared.ids import FamilyName
from shared.model import FileRef, Learning
from shared.release import Ground
from tests.fakes.clock import FakeMoments
from tests.fakes.fetcher import FakeFetcher
from tests.fakes.ledger import FakeLedger
from tests.machines.slot_parts import PROBATION, file, key, offer
from tests.machines.slot_script import Script, committed
from tests.unit.driver.test_bringing import Place, idle, with_files

GROUND = Ground(file=file("1.0.0", "int8.onnx"), bounds=Learning(variant="int8", tensors=("w",), max_shift=1.0))
V2 = key("2.0.0")
BROUGHT = (file("2.0.0", "int8.onnx"), file("2.0.0", "golden.bin"), GROUND.file)
REFUSED = FilesRefused(key=V2, code="trust.learned", message="its head moved by 9")


def learned(*, at: int) -> Offered:
    made = offer("2.0.0", at=at)
    return replace(made, model=replace(made.model, ground=GROUND))


def test_the_base_is_fetched_with_it_and_held_against_it() -> None:
    script = Script().say(*committed("1.0.0", at=1)).say(learned(at=2))
    script.wants(Fetch(V2, BROUGHT))
    script.say(FilesHere(V2))
    script.wants(VerifyFiles(V2, BROUGHT, GROUND))
    script.say(Restarted(PROBATION))
    script.wants(VerifyFiles(V2, BROUGHT, GROUND))
    assert GROUND.file.digest in slots.files_to_keep([script.slot])


def test_one_that_moved_too_far_is_never_loaded_and_never_taken_in_again() -> None:
    script = Script().say(*committed("1.0.0", at=1)).say(learned(at=2), FilesHere(V2), REFUSED)
    script.stands(Phase.COMMITTED)
    script.wants_no(StartHost)
    assert (script.slot.error_code, script.slot.quarantine) == ("trust.learned", (V2,))
    script.say(learned(at=3))
    assert script.notes == ["release.refused"]


def test_a_refusal_that_comes_late_changes_nothing() -> None:
    script = Script().say(*committed("1.0.0", at=1)).say(learned(at=2), FilesHere(V2), FilesVerified(V2))
    before = script.slot
    script.say(REFUSED, replace(REFUSED, key=key("1.0.0")))
    assert script.slot == before


class FakeComparer:
    """Says what it was told to say."""

    def __init__(self, said: OutriderError | None = None) -> None:
        self.said = said
        self.asked: list[tuple[FileRef, Ground]] = []

    async def compare(self, file: FileRef, ground: Ground) -> None:
        self.asked.append((file, ground))
        if self.said is not None:
            raise self.said


def verified(comparer: FakeComparer | None) -> tuple[list[Event], FileRef, Ground]:
    place = Place()
    made, base = place.put(b"learned"), place.put(b"base...")
    ground = Ground(file=base, bounds=GROUND.bounds)
    meter = Meter(ledger=FakeLedger(), moments=FakeMoments(), daily_bytes=0)
    supplies = Supplies(fetcher=FakeFetcher(), meter=meter, comparer=comparer)
    bringing: Bringing = supplies.bringing(
        shelf=place.shelf, models_bytes=2**30, kept=lambda: place.kept, make_room=lambda: None
    )
    place.bringing = bringing

    async def story(files: Files, loop: Loop) -> None:
        files.verify(FamilyName("digits"), VerifyFiles("key", (made, base), ground))
        await idle(loop)

    return with_files(place, story), made, ground


def test_the_driver_asks_the_comparer_and_says_what_it_said() -> None:
    comparer = FakeComparer()
    heard, made, ground = verified(comparer)
    assert heard == [FilesVerified("key")]
    assert comparer.asked == [(made, ground)]
    heard, _, _ = verified(FakeComparer(TrustError("moved", code="trust.learned")))
    assert heard == [FilesRefused(key="key", code="trust.learned", message="moved")]


def test_an_agent_without_a_comparer_takes_none() -> None:
    heard, _, _ = verified(None)
    assert isinstance(heard[0], FilesRefused)


@pytest.mark.parametrize("code", ["comparer.lost", "comparer.deadline"])
def test_a_comparison_without_an_end_blames_nobody_and_installs_nothing(code: str) -> None:
    heard, _, _ = verified(FakeComparer(OutriderError("gone", code=code)))
    assert heard == [FilesBad(key="key", code=code, message="gone", retry=True)]
    script = Script().say(*committed("1.0.0", at=1)).say(learned(at=2), FilesHere(V2), replace(heard[0], key=V2))
    script.stands(Phase.COMMITTED)
    assert script.slot.quarantine == ()
    script.wants_no(StartHost)
