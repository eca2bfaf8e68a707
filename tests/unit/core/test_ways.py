"""Which way a file comes, and whether there is room."""

from __future__ import annotations

import pytest

from edge_agent.core.ways import PatchPolicy, Way, against_room, bytes_to_write, choose_way
from shared.ids import Digest
from shared.limits import MIB
from shared.model import FileRef
from shared.release import Patch

FILE = FileRef(path="models/a/2.0.0/int8.onnx", length=1000, digest=Digest("f" * 64))
BASE, OTHER = Digest("b" * 64), Digest("c" * 64)


def patch(length: int, *, base: Digest = BASE, result: Digest = FILE.digest) -> Patch:
    return Patch(base=base, result=result, digest=Digest(f"{length:064d}"), length=length)


def choose(
    *patches: Patch, policy: PatchPolicy = "prefer_patch", part: int = 0, patch_part: int = 0, barred: str = ""
) -> Way | None:
    return choose_way(
        FILE,
        patches,
        policy=policy,
        is_here=lambda digest: digest == BASE,
        part_bytes=lambda digest: part if digest == FILE.digest else patch_part,
        is_barred=lambda digest: digest == barred,
    )


def test_the_shortest_patch_from_what_is_here_is_taken() -> None:
    assert choose(patch(300), patch(200), patch(50, base=OTHER), patch(60, result=OTHER)) == Way(FILE, patch(200))


@pytest.mark.parametrize(
    "way",
    [
        choose(),
        choose(patch(1000)),
        choose(patch(300), part=700),
        choose(patch(300), barred=patch(300).digest),
        choose(patch(300), policy="full"),
        choose(patch(300, base=OTHER)),
    ],
    ids=["none", "as long", "most of it came", "failed before", "policy", "no base"],
)
def test_the_file_comes_whole_where_no_patch_helps(way: Way | None) -> None:
    assert way == Way(FILE, None)


def test_a_patch_that_is_half_here_counts_by_its_rest() -> None:
    assert choose(patch(300), part=750, patch_part=200) == Way(FILE, patch(300))


def test_with_patches_only_nothing_comes_whole() -> None:
    assert choose(patch(1500), policy="patch_only") == Way(FILE, patch(1500))
    assert choose(policy="patch_only") is None
    assert choose(patch(300), policy="patch_only", barred=patch(300).digest) is None


def test_a_patch_lies_beside_what_it_makes() -> None:
    ways = [Way(FILE, patch(200)), Way(FILE, None)]
    assert bytes_to_write(ways, part_bytes=lambda _: 100) == (100 + 1000) + 900


def test_room_is_needed_on_the_disk_with_a_tenth_on_top_and_within_the_profile() -> None:
    room = {"write_bytes": 100 * MIB, "kept_bytes": 300 * MIB, "models_bytes": 300 * MIB}
    assert against_room(free_bytes=110 * MIB, **room) is None
    on_disk = against_room(free_bytes=110 * MIB - 1, **room)
    in_profile = against_room(free_bytes=2**40, write_bytes=1, kept_bytes=300 * MIB, models_bytes=299 * MIB)
    assert on_disk is not None
    assert in_profile is not None
    assert "110.0 MiB must be free" in on_disk.message
    assert "free disk space" in on_disk.hint
    assert "the profile allows 299.0 MiB" in in_profile.message
    assert "disk.models_bytes" in in_profile.hint
    assert "free disk space" not in in_profile.hint
