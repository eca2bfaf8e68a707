"""The change of the CA in files: its phases, its order, and the power cut at every step."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from cloud_hub import files, main
from cloud_hub.config import HubConfig
from cloud_hub.ground import rotation, transport
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.ca import CA_DAYS, make_ca, subject_hash
from cloud_hub.ground.folder import DataFolder
from cloud_hub.ground.revocation import AccessLists, RevokedCertificate, read_state
from cloud_hub.main import load_authorities, renew_certificates
from shared.errors import ConfigError, Conflict
from shared.ids import DeviceId
from shared.trust.ca_links import vouched
from tests.fakes.agent_world import until
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import DAY_MS, NOW_MS, der, new_csr

Step = Callable[[DataFolder], None]


def begin(folder: DataFolder) -> None:
    rotation.begin(folder, now_ms=NOW_MS, label="next")


STEPS: tuple[tuple[str, Step], ...] = (
    ("begun", begin),
    ("switched", rotation.switch),
    ("steady", rotation.finish),
)


def new_folder(root: Path) -> DataFolder:
    folder = DataFolder(root)
    folder.make()
    made = make_ca(now_ms=NOW_MS, label="first")
    folder.ca_key.write_bytes(made.key_pem)
    folder.ca_certificate.write_bytes(made.certificate_pem)
    return folder


def authorities(folder: DataFolder) -> Authorities:
    pair = rotation.load(folder, now_ms=NOW_MS)
    found = Authorities(pair.issuing)
    found.adopt(pair)
    return found


def test_a_change_of_the_ca_step_by_step(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    steady = authorities(folder)
    by_old = steady.issue_device(new_csr(), device=DeviceId("a"), now_ms=NOW_MS, days=1)
    begin(folder)
    begun = authorities(folder)
    assert begun.fingerprint == steady.fingerprint
    assert begun.fingerprints[0] == steady.fingerprint
    assert vouched(begun.published, pins=frozenset({steady.fingerprint})) == steady.pem
    rotation.switch(folder)
    switched = authorities(folder)
    assert switched.fingerprints == begun.fingerprints[::-1]
    assert vouched(switched.published, pins=frozenset({steady.fingerprint})) == switched.pem
    by_new = switched.issue_device(new_csr(), device=DeviceId("a"), now_ms=NOW_MS, days=1)
    for certificate in (by_old, by_new):
        assert switched.check_client(der(certificate.pem), now_ms=NOW_MS) is not None
    rotation.finish(folder)
    finished = authorities(folder)
    assert finished.fingerprints == switched.fingerprints[:1]
    assert finished.published == finished.pem
    assert finished.check_client(der(by_old.pem), now_ms=NOW_MS) is None
    assert finished.examine(der(by_old.pem)) is None
    assert finished.check_client(der(by_new.pem), now_ms=NOW_MS) is not None
    assert sorted(path.name for path in folder.ca_key.parent.iterdir()) == ["ca.key", "ca.pem"]


def test_steps_are_taken_in_their_order_only(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    for done in range(3):
        for number, (_, step) in enumerate(STEPS):
            if number != done:
                with pytest.raises(Conflict) as caught:
                    step(folder)
                assert caught.value.code == "conflict.ca_phase"
        STEPS[done][1](folder)
        assert rotation.phase_of(folder) == STEPS[done][0]


class PowerCut(BaseException):
    """The power is gone."""


@pytest.mark.parametrize("number", range(3), ids=[name for name, _ in STEPS])
def test_power_cut_at_every_step_leaves_authorities_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    cuts, limit = 0, 0
    while True:
        folder = new_folder(tmp_path / str(limit))
        for _, step in STEPS[:number]:
            step(folder)
        before = rotation.load(folder, now_ms=NOW_MS)
        calls = 0
        real_replace, real_unlink = files.replace, Path.unlink

        def counted() -> None:
            nonlocal calls
            if calls == limit:  # noqa: B023 - used within the round only
                raise PowerCut
            calls += 1

        def replace(path: Path, data: bytes) -> None:
            counted()
            real_replace(path, data)  # noqa: B023

        def unlink(path: Path, missing_ok: bool = False) -> None:
            counted()
            real_unlink(path, missing_ok)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(files, "replace", replace)
            patch.setattr(Path, "unlink", unlink)
            try:
                STEPS[number][1](folder)
                is_done = True
            except PowerCut:
                cuts, is_done = cuts + 1, False
        # Whoever only reads has what was or what will be; the next step completes it.
        after = rotation.load(folder, now_ms=NOW_MS)
        assert after.phase in (before.phase, STEPS[number][0])
        with rotation.alone(folder):
            completed = rotation.load(folder, now_ms=NOW_MS)
        assert (completed.phase, completed.issuing.pem) == (after.phase, after.issuing.pem)
        if after.phase != STEPS[number][0]:
            STEPS[number][1](folder)
        if is_done:
            break
        limit += 1
    assert cuts >= 2


def test_two_commands_do_not_change_it_at_once(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    with rotation.alone(folder), pytest.raises(Conflict) as caught, rotation.alone(folder):
        pass
    assert caught.value.code == "conflict.ca"


def test_server_certificates_follow_the_one_that_issues(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)

    def ensure() -> tuple[str, ...]:
        pair = rotation.load(folder, now_ms=NOW_MS)
        names = ("localhost",)
        return transport.ensure(
            folder, pair.issuing, other=pair.other, names=names, broker_names=names, hub_name="hub",
            now_ms=NOW_MS, days=90,
        )  # fmt: skip

    assert len(ensure()) == 3
    begin(folder)
    assert ensure() == ()
    assert (folder.broker / "ca.pem").read_text().count("BEGIN") == 2
    assert len(list((folder.broker / "cas").iterdir())) == 2
    rotation.switch(folder)
    assert len(ensure()) == 3
    rotation.finish(folder)
    assert ensure() == ()
    assert len(list((folder.broker / "cas").iterdir())) == 1


def test_authorities_are_found_as_openssl_looks_for_them(tmp_path: Path) -> None:
    for label in ("hub.example", "Zwei   Worte  https://Hub:8443 ab12", "x" * 60):
        path = tmp_path / "ca.pem"
        path.write_bytes(make_ca(now_ms=NOW_MS, label=label).certificate_pem)
        try:
            done = subprocess.run(
                ["openssl", "x509", "-noout", "-hash", "-in", str(path)], capture_output=True, text=True, check=True
            )
        except FileNotFoundError:
            pytest.skip("openssl is not installed")
        assert subject_hash(path.read_text()) == done.stdout.strip()


def test_a_hub_whose_ca_has_expired_does_not_start(tmp_path: Path) -> None:
    new_folder(tmp_path)
    config = HubConfig(data_dir=str(tmp_path))
    clock = FakeClock(wall_ms=NOW_MS + CA_DAYS * DAY_MS + DAY_MS)
    with pytest.raises(ConfigError) as caught:
        renew_certificates(config, load_authorities(config, clock=clock), clock=clock)
    assert caught.value.code == "config.ca_expired"


def listed(folder: DataFolder) -> list[tuple[x509.Name, set[int]]]:
    """Of whom there are lists, and what is on them."""
    ends = b"-----END X509 CRL-----\n"
    found = [x509.load_pem_x509_crl(part + ends) for part in (folder.broker / "crl.pem").read_bytes().split(ends)[:-1]]
    return [(one.issuer, {line.serial_number for line in one}) for one in found]


def names_of(folder: DataFolder) -> list[x509.Name]:
    pair = rotation.load(folder, now_ms=NOW_MS)
    return [x509.load_pem_x509_certificate(one.pem.encode()).subject for one in pair.all]


def test_each_ca_that_is_trusted_has_a_revocation_list_in_every_phase(tmp_path: Path) -> None:
    """A broker that trusts a CA without a list of it keeps all devices of that CA out."""
    folder, clock = new_folder(tmp_path), FakeClock(wall_ms=NOW_MS)
    config = HubConfig(data_dir=str(tmp_path))
    first = authorities(folder).fingerprint
    revoked = [RevokedCertificate(authority=first, serial=7, revoked_ms=NOW_MS)]

    def write() -> None:
        lists = AccessLists(folder.broker, authorities=load_authorities(config, clock=clock), hub_name="h", clock=clock)
        lists.write(revoked=revoked, denied=())
        assert not lists.is_due()

    renew_certificates(config, load_authorities(config, clock=clock), clock=clock)
    write()
    for phase, step in STEPS:
        step(folder)
        assert rotation.phase_of(folder) == phase
        # Before the database was asked: who starts the broker now finds a list of each, and what was listed still is.
        renew_certificates(config, load_authorities(config, clock=clock), clock=clock)
        assert {name for name, _ in listed(folder)} >= set(names_of(folder))
        assert any(7 in serials for _, serials in listed(folder))
        write()
        assert [name for name, _ in listed(folder)] == names_of(folder)
    assert [serials for _, serials in listed(folder)] == [set()], "the first CA is trusted no longer"


def test_a_list_that_lacks_a_ca_is_due(tmp_path: Path) -> None:
    folder, clock = new_folder(tmp_path), FakeClock(wall_ms=NOW_MS)
    trusted = authorities(folder)
    lists = AccessLists(folder.broker, authorities=trusted, hub_name="h", clock=clock)
    lists.write(revoked=(), denied=())
    assert not lists.is_due()
    begin(folder)
    trusted.adopt(rotation.load(folder, now_ms=NOW_MS))
    assert lists.is_due()


def test_the_running_hub_lists_a_ca_before_the_broker_trusts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, clock = new_folder(tmp_path), FakeClock(wall_ms=NOW_MS)
    config = HubConfig(data_dir=str(tmp_path))
    trusted = load_authorities(config, clock=clock)
    renew_certificates(config, trusted, clock=clock)
    foundation: Any = SimpleNamespace(config=config, clock=clock, authorities=trusted)
    lists = AccessLists(folder.broker, authorities=trusted, hub_name="h", clock=clock)
    events: list[str] = []
    failures = ["the disk is full"]

    def cas() -> int:
        return len(list((folder.broker / "cas").iterdir()))

    async def list_all() -> bool:
        events.append(f"list while {cas()} trusted")
        if failures:
            failures.pop()
            return False
        lists.write(revoked=(), denied=())
        return True

    def reload() -> None:
        state = read_state(folder.broker / "crl.pem")
        assert state is not None
        events.append(f"reload with {cas()} trusted and {len(state.authorities)} listed")

    def has_reloaded(times: int) -> bool:
        return sum(event.startswith("reload") for event in events) == times

    monkeypatch.setattr(main, "CA_LOOK_S", 0.005)

    async def go() -> None:
        follow = main._follow_authorities(
            foundation, turn=asyncio.Lock(), list_all=list_all, reload=reload, forget=lambda: events.append("forget")
        )
        task = asyncio.create_task(follow)
        for wanted, (_, step) in zip((1, 2, 3), STEPS, strict=True):
            await asyncio.sleep(0)
            step(folder)
            await until(partial(has_reloaded, wanted), "the step is followed")
        await until(lambda: "forget" in events, "the old CA is forgotten")
        task.cancel()

    asyncio.run(go())
    assert events == [
        "list while 1 trusted",
        "list while 1 trusted",
        "reload with 2 trusted and 2 listed",
        "list while 2 trusted",
        "reload with 2 trusted and 2 listed",
        "list while 2 trusted",
        "reload with 1 trusted and 1 listed",
        "forget",
    ]


def test_a_step_that_is_taken_while_the_hub_starts_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reading of the CAs and the first look at them a broker starts, which may take long."""
    folder, clock = new_folder(tmp_path), FakeClock(wall_ms=NOW_MS)
    config = HubConfig(data_dir=str(tmp_path))
    begin(folder)
    rotation.switch(folder)
    trusted = load_authorities(config, clock=clock)
    renew_certificates(config, trusted, clock=clock)
    rotation.finish(folder)
    foundation: Any = SimpleNamespace(config=config, clock=clock, authorities=trusted)
    events: list[str] = []
    monkeypatch.setattr(main, "CA_LOOK_S", 0.005)

    async def list_all() -> bool:
        return True

    async def go() -> None:
        follow = main._follow_authorities(
            foundation,
            turn=asyncio.Lock(),
            list_all=list_all,
            reload=lambda: events.append("reload"),
            forget=lambda: events.append("forget"),
        )
        task = asyncio.create_task(follow)
        await until(lambda: "forget" in events, "the old CA is forgotten")
        task.cancel()

    asyncio.run(go())
    assert events == ["reload", "forget"]
    assert trusted.now.phase == "steady"
    assert len(trusted.fingerprints) == 1
