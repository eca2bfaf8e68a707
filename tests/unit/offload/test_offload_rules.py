"""Batches form without a timer, late ones are told at once, and overload leaves the capacity to those in time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.offload.rules import Batch, Line, Pace, Refused, Ticket

FAR = 10**12


def ticket(number: int, *, rows: int = 1, arrived: int = 0, deadline: int = FAR, shape: object = ()) -> Ticket[int]:
    return Ticket(rows=rows, shape=shape, arrived_us=arrived, deadline_us=deadline, load=number)


def loads(batch: Batch[int]) -> list[int]:
    return [one.load for one in batch.tickets]


def line(*, per_batch_us: int = 0, max_batch_rows: int = 32, max_waiting_rows: int = 4096) -> Line[int]:
    """A line whose engine is known to take so long for any batch."""
    made: Line[int] = Line(max_batch_rows=max_batch_rows, max_waiting_rows=max_waiting_rows)
    for rows in (1, 2, 4, 8, 16, 32):
        if per_batch_us:
            made.pace.note(rows, per_batch_us)
    return made


def test_whatever_waited_while_the_engine_ran_is_the_next_batch() -> None:
    queue = line()
    assert queue.offer(ticket(1), now_us=0) is None
    assert loads(queue.form(now_us=0)) == [1]
    for number in (2, 3, 4):
        assert queue.offer(ticket(number), now_us=1) is None
    queue.finish(1, took_us=10)
    assert loads(queue.form(now_us=10)) == [2, 3, 4]
    queue.finish(3, took_us=10)
    assert queue.form(now_us=20) == Batch((), ())


def test_a_batch_has_so_many_rows_and_a_larger_request_runs_alone() -> None:
    queue = line(max_batch_rows=8)
    for number, rows in enumerate((3, 4, 2, 20, 1)):
        assert queue.offer(ticket(number, rows=rows), now_us=0) is None
    batches = []
    while queue.waiting_rows:
        batch = queue.form(now_us=0)
        batches.append(loads(batch))
        queue.finish(batch.rows, took_us=1)
    assert batches == [[0, 1], [2], [3], [4]]


def test_only_requests_of_one_shape_share_a_batch() -> None:
    queue = line()
    for number, shape in enumerate(("a", "a", "b", "a")):
        queue.offer(ticket(number, shape=shape), now_us=0)
    assert loads(queue.form(now_us=0)) == [0, 1]
    assert loads(queue.form(now_us=0)) == [2]


def test_one_who_cannot_be_in_time_is_told_so_with_the_time_to_come_again() -> None:
    queue = line(per_batch_us=10_000)
    assert queue.offer(ticket(0), now_us=0) is None
    queue.form(now_us=0)
    refused = queue.offer(ticket(1, deadline=15_000), now_us=0)
    assert refused == Refused("late", retry_after_us=10_000)
    assert queue.offer(ticket(2, deadline=25_000), now_us=0) is None
    assert queue.waiting_rows == 1


def test_the_running_batch_counts_with_what_is_left_of_it() -> None:
    queue = line(per_batch_us=10_000)
    queue.offer(ticket(0), now_us=0)
    queue.form(now_us=0)
    assert queue.offer(ticket(1, deadline=22_000), now_us=0) is not None
    assert queue.offer(ticket(1, deadline=22_000), now_us=9_000) is None


def test_an_engine_that_is_overdue_is_not_predicted_to_be_free_at_once() -> None:
    queue = line(per_batch_us=10_000)
    queue.offer(ticket(0), now_us=0)
    queue.form(now_us=0)
    stuck_us = 5_000_000
    assert queue.wait_us(now_us=10_000) == 0
    assert queue.wait_us(now_us=stuck_us) >= stuck_us - 10_000
    refused = queue.offer(ticket(1, deadline=stuck_us + 1_000_000), now_us=stuck_us)
    assert refused == Refused("late", retry_after_us=stuck_us - 10_000)
    assert queue.offer(ticket(2, deadline=stuck_us + 10_000_000), now_us=stuck_us) is None
    queue.finish(1, took_us=stuck_us)
    assert queue.wait_us(now_us=stuck_us) == 0


def test_who_no_longer_waits_leaves_the_line_and_the_others_keep_their_order() -> None:
    queue = line()
    several = [ticket(number, rows=2) for number in range(3)]
    for one in several:
        queue.offer(one, now_us=0)
    assert queue.withdraw(several[1])
    assert not queue.withdraw(several[1])
    assert not queue.withdraw(ticket(0, rows=2)), "an equal one is another one"
    assert queue.waiting_rows == 4
    assert loads(queue.form(now_us=0)) == [0, 2]
    assert not queue.withdraw(several[0]), "it runs"


def test_full_batches_before_it_count() -> None:
    queue = line(per_batch_us=10_000, max_batch_rows=4)
    for number in range(8):
        assert queue.offer(ticket(number), now_us=0) is None
    assert queue.offer(ticket(8, deadline=30_000), now_us=0) is not None
    assert queue.offer(ticket(8, deadline=35_000), now_us=0) is None


def test_an_idle_engine_takes_whatever_still_has_time_so_no_prediction_locks_it() -> None:
    queue = line(per_batch_us=60_000_000)
    assert queue.offer(ticket(1, deadline=1_000), now_us=0) is None
    assert loads(queue.form(now_us=0)) == [1]
    queue.finish(1, took_us=500)
    assert queue.pace.predict_us(1) < 60_000_000
    assert isinstance(queue.offer(ticket(2, deadline=5), now_us=10), Refused)


def test_as_much_waits_as_may() -> None:
    queue = line(max_waiting_rows=4)
    for number in range(4):
        assert queue.offer(ticket(number), now_us=0) is None
    refused = queue.offer(ticket(4), now_us=0)
    assert refused is not None
    assert refused.reason == "queue"


def test_who_can_no_longer_be_in_time_is_dropped_when_the_turn_comes() -> None:
    queue = line(per_batch_us=10_000)
    queue.offer(ticket(0), now_us=0)
    queue.form(now_us=0)
    for number in range(1, 5):
        assert queue.offer(ticket(number, deadline=24_000 if number == 2 else FAR), now_us=0) is None
    queue.finish(1, took_us=20_000)
    batch = queue.form(now_us=20_000)
    assert (loads(batch), [one.load for one in batch.dropped]) == ([1, 3, 4], [2])


def test_while_more_than_a_batch_waits_the_batch_stays_full_and_who_is_too_tight_for_it_goes() -> None:
    queue: Line[int] = Line()
    for rows in (1, 2, 4, 8, 16, 32):
        queue.pace.note(rows, rows * 1000)
    queue.offer(ticket(0), now_us=0)
    queue.form(now_us=0)
    for number in range(1, 41):
        queue.offer(ticket(number, deadline=30_000 if number == 1 else FAR), now_us=0)
    queue.finish(1, took_us=1000)
    batch = queue.form(now_us=5_000)
    assert (loads(batch), [one.load for one in batch.dropped]) == (list(range(2, 34)), [1])


def test_while_little_waits_a_batch_is_as_small_as_its_tightest_deadline_needs() -> None:
    queue: Line[int] = Line()
    for rows in (1, 2, 4, 8, 16, 32):
        queue.pace.note(rows, rows * 1000)
    queue.offer(ticket(0), now_us=0)
    queue.form(now_us=0)
    for number in range(1, 9):
        queue.offer(ticket(number, deadline=12_000 if number == 1 else FAR), now_us=0)
    queue.finish(1, took_us=1000)
    batch = queue.form(now_us=5_000)
    assert (loads(batch), batch.dropped) == ([1, 2, 3, 4], ())


def test_a_pace_is_known_by_size_and_guessed_from_its_neighbours() -> None:
    pace = Pace()
    assert pace.predict_us(4) == 0.0
    pace.note(4, 1000)
    assert pace.predict_us(3) == pace.predict_us(4) == pace.predict_us(1) == 1000
    assert pace.predict_us(32) == 8000
    pace.note(4, 2000)
    assert pace.predict_us(4) == pytest.approx(1200)


def test_letting_all_go_empties_the_line() -> None:
    queue = line()
    for number in range(3):
        queue.offer(ticket(number, rows=2), now_us=0)
    assert [one.load for one in queue.clear()] == [0, 1, 2]
    assert queue.waiting_rows == 0
    assert queue.clear() == ()


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50_000), st.sampled_from("ab"), st.booleans()), max_size=60),
    st.integers(1, 20_000),
)
def test_everybody_is_answered_dropped_or_refused_exactly_once_and_in_order(
    story: list[tuple[int, int, str, bool]], per_batch_us: int
) -> None:
    queue = line(per_batch_us=per_batch_us)
    now, numbers = 0, count()
    answered: list[int] = []
    gone: list[int] = []
    running: Batch[int] | None = None

    def step() -> Iterator[int]:
        nonlocal running, now
        if running is not None:
            now += per_batch_us
            queue.finish(running.rows, took_us=per_batch_us)
            yield from loads(running)
        batch = queue.form(now_us=now)
        gone.extend(one.load for one in batch.dropped)
        assert batch.rows <= 32 or len(batch.tickets) == 1
        running = batch if batch.tickets else None

    for rows, patience, shape, pause in story:
        one = ticket(next(numbers), rows=rows, arrived=now, deadline=now + patience, shape=shape)
        if queue.offer(one, now_us=now) is not None:
            gone.append(one.load)
        if pause:
            answered.extend(step())
    while running is not None or queue.waiting_rows:
        answered.extend(step())
    assert answered == sorted(answered)
    assert sorted(answered + gone) == list(range(len(story)))


@pytest.mark.parametrize("times", [2, 4])
def test_overload_leaves_the_capacity_to_those_in_time(times: int) -> None:
    """Open loop in virtual time: a batch of 32 takes 10 ms, everybody has 50 ms."""
    service, patience = 10_000, 50_000
    queue = line(per_batch_us=service)
    gap = service / 32 / times
    busy_until, running, good, late, now = 0.0, None, 0, 0, 0.0
    for number in range(20_000):
        arrival = number * gap
        while running is not None and busy_until <= arrival:
            now = busy_until
            queue.finish(running.rows, took_us=service)
            good += sum(now <= one.deadline_us for one in running.tickets)
            late += sum(now > one.deadline_us for one in running.tickets)
            running = queue.form(now_us=int(now))
            running = running if running.tickets else None
            busy_until = now + service
        now = arrival
        queue.offer(ticket(number, arrived=int(now), deadline=int(now) + patience), now_us=int(now))
        if running is None:
            running = queue.form(now_us=int(now))
            running = running if running.tickets else None
            busy_until = now + service
    capacity = 20_000 * gap / service * 32
    assert good >= 0.9 * capacity
    assert late <= 0.01 * good
