"""The demo itself: its whole story holds, and however it ends, nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.story.folder import FolderBusy, claim
from tests.conftest import ROOT

pytestmark = pytest.mark.live

STEPS = [
    "enrol",
    "first-release",
    "local-answers",
    "cloud-gone",
    "cloud-back",
    "altered-release",
    "kill-agent",
    "kill-hub",
    "good-rollout",
    "worse-release",
    "slower-release",
    "federated-run",
    "hard-digits",
    "cloud-stalls",
]
UP_S = 60.0
GONE_S = 15.0


@contextmanager
def story(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo without its set-up, which is there already when tests run."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'outrider[demo]'")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "scripts.story", "--folder", str(folder), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def processes_of(folder: Path) -> list[str]:
    """Command lines of running processes that work in this folder or name it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            place = str((entry / "cwd").readlink())
        except (OSError, IndexError):
            continue
        if state not in "ZX" and int(entry.name) != os.getpid() and (str(folder) in command or str(folder) in place):
            found.append(f"{entry.name}: {command}")
    return found


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + GONE_S
    while left := processes_of(folder):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def wait_until_working(process: subprocess.Popen[str], folder: Path) -> None:
    """Until a hub, its broker and all three agents run."""
    deadline = time.monotonic() + UP_S
    while True:
        running = processes_of(folder)
        wanted = ("outrider-hub serve", "mosquitto.conf", "devices/pi4", "devices/pi5", "devices/x86-gateway")
        if all(any(part in command for command in running) for part in wanted):
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


@pytest.mark.timeout(480)
@pytest.mark.usefixtures("mosquitto_path")
def test_every_step_of_the_story_is_true(short_tmp: Path) -> None:
    figures = short_tmp / "figures.json"
    folder = short_tmp / "demo"
    with story(folder, "--check", "--json", str(figures)) as process:
        said, _ = process.communicate(timeout=450)
    assert process.returncode == 0, said
    steps = json.loads(figures.read_text())["steps"]
    assert [step["name"] for step in steps] == STEPS
    assert all(step["ok"] for step in steps)
    by_name = {step["name"]: step["figures"] for step in steps}
    assert by_name["cloud-back"]["missing"] == by_name["cloud-back"]["twice"] == 0
    assert by_name["altered-release"]["refusals"] == 9
    assert by_name["kill-agent"]["orphan_hosts"] == by_name["kill-hub"]["orphan_brokers"] == 0
    assert by_name["good-rollout"]["on_it"] == 3
    assert by_name["worse-release"]["touched"] == by_name["slower-release"]["touched"] == 1
    assert by_name["federated-run"]["points_ahead"] >= 20
    assert by_name["hard-digits"]["accuracy_with_hub"] > by_name["hard-digits"]["accuracy_alone"]
    assert by_name["cloud-stalls"]["in_time"] == by_name["cloud-stalls"]["asked"]
    wait_until_gone(folder)


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("mosquitto_path")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_nothing_stays_behind(short_tmp: Path, number: signal.Signals) -> None:
    folder = short_tmp / "demo"
    with story(folder, "--check") as process:
        wait_until_working(process, folder)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number is signal.SIGKILL else 130)
    wait_until_gone(folder)


@pytest.mark.usefixtures("mosquitto_path")
def test_a_second_demo_leaves_the_first_one_alone(short_tmp: Path) -> None:
    folder = short_tmp / "demo"
    with story(folder, "--check") as first:
        deadline = time.monotonic() + UP_S
        while not (folder / "logs").is_dir():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with story(folder, "--check") as second:
            said, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert str(first.pid) in said
        assert first.poll() is None
    wait_until_gone(folder)


def test_a_folder_that_is_not_a_demos_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FolderBusy):
        claim(tmp_path)
    (tmp_path / "lock").write_text("somebody else's")
    with pytest.raises(FolderBusy):
        claim(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    os.close(claim(tmp_path / "new").lock)
    os.close(claim(tmp_path / "new").lock)
