"""The flatbuffer reader: what the tests' own writer wrote is read back, and every place outside is refused."""

from __future__ import annotations

import pytest

from shared.flatbuffer import Buffer, Damaged
from tests.fakes import flatbuffers as fb

MADE = fb.write({0: fb.i32(-7), 1: "name", 2: fb.vector(1, 2, 3), 4: [{0: fb.i8(5)}, {}], 5: {1: fb.u64(2**40)}})


def buffer(data: bytes = MADE, *, visits: int = 100) -> Buffer:
    return Buffer(memoryview(data), visits=visits)


def test_what_was_written_is_read() -> None:
    root = buffer().root()
    assert root.fields == 6
    assert root.number(0, 4, signed=True) == -7
    assert root.number(3, 4, default=9) == 9
    assert root.text(1) == "name"
    assert root.text(9) == ""
    assert root.numbers(2, most=3) == [1, 2, 3]
    assert [table.number(0, 1) for table in root.tables(4)] == [5, 0]
    inner = root.table(5)
    assert inner is not None
    assert inner.number(1, 8) == 2**40
    assert root.table(3) is None


def test_longer_lists_than_may_be_and_more_visits_than_there_are_end_it() -> None:
    with pytest.raises(Damaged, match="longer than 2"):
        buffer().root().numbers(2, most=2)
    with pytest.raises(Damaged, match="more parts"):
        buffer(visits=3).root().tables(4)


def read_all(data: bytes) -> None:
    root = buffer(data).root()
    root.text(1)
    root.numbers(2, most=3)
    root.tables(4)
    inner = root.table(5)
    assert inner is not None
    inner.number(1, 8)


@pytest.mark.parametrize("length", range(0, len(MADE), 3))
def test_a_file_that_ends_early_is_damaged(length: int) -> None:
    with pytest.raises(Damaged):
        read_all(MADE[:length])


def test_offsets_to_elsewhere_are_damage() -> None:
    for offset in (0, 2**31, 2**32 - 1, len(MADE)):
        with pytest.raises(Damaged):
            buffer(fb.write({1: fb.Raw(offset)})).root().text(1)
