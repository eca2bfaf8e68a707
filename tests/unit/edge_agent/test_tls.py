"""TLS by trusted time: real handshakes with certificates that are good, old, young, foreign or for another host."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.adapters.cloud import HubCloud
from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import WrongDates, check_dates, dated_context, undated_context
from shared.errors import OutriderError, TransferRefused
from shared.inference import TensorHead
from tests.fakes.https import HttpsServer, answer
from tests.fakes.pki import Pair, TestCa

DAY_MS = 86_400_000
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def after(days: float) -> Callable[[], int]:
    """A clock that is so many days ahead of the true one."""
    return lambda: SystemClock().wall_ms() + int(days * DAY_MS)


@pytest.fixture
def ca(tmp_path: Path) -> TestCa:
    return TestCa(tmp_path)


def fetch(ca: TestCa, context: ssl.SSLContext, *, pair: Pair) -> tuple[str, int]:
    """How a request ends (its code, or `ok`), and how many requests the server has seen."""
    with HttpsServer(ca, lambda _, handler: answer(handler, 200, b"{}"), pair=pair) as server:
        fetcher = HubFetcher(hub_url=server.url, context=context, clock=SystemClock(), stall_ms=5_000)
        try:
            asyncio.run(fetcher.metadata("timestamp.json", max_bytes=10))
            ended = "ok"
        except TransferRefused as error:
            assert error.hint
            ended = error.code
        return ended, len(server.requests)


def at_version(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    context.maximum_version = version
    return context


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("since", "days", "clock_days", "ended"),
    [
        (-20, 5, 0, "ok"),
        (-20, 5, 6, "transfer.certificate_dates"),  # expired by the trusted time, whatever the system clock says
        (-20, 5, -21, "transfer.certificate_dates"),
        (-20, -1, 0, "transfer.certificate_dates"),
        (-20, -1, -2, "ok"),  # the system clock is ahead: 2099 to OpenSSL, and the certificate is good
        (2, 5, 0, "transfer.certificate_dates"),
        (2, 5, 3, "ok"),  # the system clock is behind: 1970 to OpenSSL
    ],
)
def test_the_trusted_time_decides_and_not_the_system_clock(
    ca: TestCa, version: ssl.TLSVersion, since: int, days: int, clock_days: int, ended: str
) -> None:
    pair = ca.server(since=since, days=days)
    context = at_version(dated_context(ca.path, now_ms=after(clock_days)), version)
    assert fetch(ca, context, pair=pair) == (ended, 1 if ended == "ok" else 0)


@pytest.mark.parametrize("make", ["dated", "undated"])
def test_a_foreign_ca_and_another_host_are_refused_with_and_without_dates(
    ca: TestCa, tmp_path: Path, make: str
) -> None:
    folder = tmp_path / "rogue"
    folder.mkdir()
    rogue = TestCa(folder)

    def context() -> ssl.SSLContext:
        return undated_context(ca.path) if make == "undated" else dated_context(ca.path, now_ms=after(0))

    for pair in (rogue.server(), ca.server("other", host="other.example"), ca.client("dev-1")):
        assert fetch(ca, context(), pair=pair) == ("transfer.hub_certificate", 0)
    assert fetch(ca, context(), pair=ca.server()) == ("ok", 1)


@pytest.mark.parametrize(("since", "days"), [(-20, -1), (2, 5)])
def test_only_the_question_for_the_time_goes_without_dates(ca: TestCa, since: int, days: int) -> None:
    pair = ca.server(since=since, days=days)
    assert fetch(ca, undated_context(ca.path), pair=pair) == ("ok", 1)
    assert fetch(ca, dated_context(ca.path, now_ms=after(0)), pair=pair) == ("transfer.certificate_dates", 0)


def test_the_question_for_the_time_shows_no_certificate(ca: TestCa) -> None:
    with HttpsServer(ca, lambda _, handler: answer(handler, 200, b"{}")) as server:
        fetcher = HubFetcher(hub_url=server.url, context=undated_context(ca.path), clock=SystemClock())
        assert asyncio.run(fetcher.ask("/v1/time", b'{"x":1}', max_bytes=10)) == b"{}"
        (request,) = server.requests
    assert (request.method, request.path, request.body, request.peer) == ("POST", "/v1/time", b'{"x":1}', "")


def test_questions_to_the_hubs_models_go_by_trusted_time_too(ca: TestCa) -> None:
    pair = ca.server(days=-1)
    with HttpsServer(ca, lambda _, handler: answer(handler, 500), pair=pair) as server:
        cloud = HubCloud(hub_url=server.url, context=dated_context(ca.path, now_ms=after(0)), clock=SystemClock())
        head = TensorHead(name="x", dtype="fp32", shape=(1, 1))
        with pytest.raises(OutriderError) as caught:
            asyncio.run(cloud.ask("digits", (head,), bytes(4), deadline_ms=5_000, within_ms=5_000))
        cloud.close()
        assert caught.value.code == "transfer.certificate_dates"
        assert server.requests == []


@pytest.mark.parametrize(
    "certificate", [{}, {"notBefore": "x", "notAfter": "y"}, {"notBefore": "Jan  1 00:00:00 2020 GMT"}]
)
def test_dates_that_cannot_be_read_are_wrong_dates(certificate: dict[str, str]) -> None:
    with pytest.raises(WrongDates):
        check_dates(certificate, now_ms=1_600_000_000_000)


def test_a_context_without_a_time_connects_nowhere(ca: TestCa) -> None:
    """Whoever forgets to say what time it is gets no connection rather than one without dates."""
    context = dated_context(ca.path, now_ms=after(0))
    del context.now_ms  # type: ignore[attr-defined]
    with HttpsServer(ca, lambda _, handler: answer(handler, 200)) as server:
        fetcher = HubFetcher(hub_url=server.url, context=context, clock=SystemClock())
        with pytest.raises(AttributeError):
            asyncio.run(fetcher.metadata("timestamp.json", max_bytes=10))
        assert server.requests == []
