"""A wall clock that jumps: what the hub tells and issues meanwhile, and what ends it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cloud_hub.ground import audit, problems
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.walltime import MAX_JUMP_MS, WallTime, begin, doubt
from shared.errors import ConfigError
from shared.ids import DeviceId
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import DAY_MS, NOW_MS, hub_database, make_authority, new_csr


@pytest.mark.parametrize(
    ("off_ms", "behind_ms", "words"),
    [
        (0, None, ""),
        (MAX_JUMP_MS, MAX_JUMP_MS, ""),
        (-MAX_JUMP_MS, -DAY_MS, ""),
        (MAX_JUMP_MS + 1, None, "set forward by 3600 s since the hub started"),
        (-MAX_JUMP_MS - 1, None, "set back by 3600 s since the hub started"),
        (0, MAX_JUMP_MS + 1, "3600 s behind the newest audit row"),
    ],
)
def test_an_hour_is_forgiven_and_no_more(off_ms: int, behind_ms: int | None, words: str) -> None:
    newest_ms = None if behind_ms is None else NOW_MS + behind_ms
    found = doubt(now_ms=NOW_MS, expected_ms=NOW_MS - off_ms, newest_ms=newest_ms)
    assert words in found
    assert bool(found) == bool(words)


def test_a_clock_that_is_ahead_for_seconds_signs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock, metrics = FakeClock(wall_ms=NOW_MS), Metrics()
    time = WallTime(clock, newest_ms=NOW_MS, metrics=metrics)
    authorities = Authorities(make_authority(), require_time=time.require)

    def issue() -> None:
        authorities.issue_device(new_csr(), device=DeviceId("a"), now_ms=clock.wall_ms(), days=30)

    def doubted() -> float | None:
        time.look()
        return metrics.registry.get_sample_value("outrider_hub_clock_doubted")

    with caplog.at_level(logging.INFO, logger="cloud_hub.ground.walltime"):
        clock.advance(400 * DAY_MS)
        clock.suspend(5 * DAY_MS)
        issue()
        assert doubted() == 0
        clock.wall += 60 * DAY_MS
        assert doubted() == doubted() == 1
        for act in (issue, time.sure_ms):
            with pytest.raises(ConfigError) as caught:
                act()
            assert caught.value.code == "config.clock"
        clock.wall -= 60 * DAY_MS
        assert doubted() == 0
    issue()
    assert time.sure_ms() == clock.wall_ms()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert problems.status_of("config.clock") == 503  # devices try again


def rows(database: Database) -> list[str]:
    return [row.action for row in database.read_now(lambda conn: audit.entries(conn, after=0, limit=9))]


def test_a_clock_that_lies_before_what_is_written_is_taken_by_the_next_start(tmp_path: Path) -> None:
    clock = FakeClock(wall_ms=NOW_MS)
    with hub_database(tmp_path) as database:
        assert begin(database, clock, metrics=Metrics()).sure_ms() == NOW_MS
        database.write_now(lambda conn: audit.record(conn, at_ms=NOW_MS, actor="a", action="x", subject="s"))
        clock.wall -= 40 * DAY_MS
        doubted = begin(database, clock, metrics=Metrics())
        with pytest.raises(ConfigError, match="behind the newest audit row"):
            doubted.sure_ms()
        # Set right while the hub runs it has jumped, which is doubted as well, but says what is so.
        assert rows(database) == ["x", "clock.doubted"]
        assert begin(database, clock, metrics=Metrics()).sure_ms() == clock.wall_ms()
        assert rows(database) == ["x", "clock.doubted"]
