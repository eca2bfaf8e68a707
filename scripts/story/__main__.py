"""Entry of the demo: play the story, then either end or stay up until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from . import models
from .beginning import enrol, first_release, local_answers
from .breaking import altered_release
from .cast import FAMILY, House, gather
from .doubts import cloud_stalls, hard_digits
from .folder import ROOT, FolderBusy, claim
from .killing import kill_agent, kill_hub
from .learning import federated_run
from .offline import cloud_back, cloud_gone
from .staged import good_rollout, slower_release, worse_release
from .telling import Figure, Teller

Act = Callable[[House, Teller], Mapping[str, Figure]]

STORY: Final[tuple[tuple[str, str, Act], ...]] = (
    ("enrol", "a hub is made and three devices join it", enrol),
    ("first-release", "a model is trained, quantized, signed and brought to the devices", first_release),
    ("local-answers", "the devices answer by themselves", local_answers),
    ("cloud-gone", "the hub and the broker are killed", cloud_gone),
    ("cloud-back", "the hub returns", cloud_back),
    ("altered-release", "somebody breaks into the hub", altered_release),
    ("kill-agent", "an agent is killed in mid-work", kill_agent),
    ("kill-hub", "the hub is killed in mid-work", kill_hub),
    ("good-rollout", "a better model goes out in stages, and the hub is killed on the way", good_rollout),
    ("worse-release", "a model that answers worse is stopped by its answers", worse_release),
    ("slower-release", "a model that answers late is stopped by its times", slower_release),
    ("federated-run", "the devices learn together, and keep their digits to themselves", federated_run),
    ("hard-digits", "devices in doubt ask the hub's larger model", hard_digits),
    ("cloud-stalls", "the hub takes questions and answers none", cloud_stalls),
)


class Interrupted(BaseException):
    """Somebody wants the demo to end; not an Exception, so that no library on the way can take it for an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Play; returns 0 when everything was true, 1 when not, 130 after Ctrl-C, 2 while another demo runs."""
    parser = argparse.ArgumentParser(
        prog="demo",
        description="One hub, a real broker and three real agents on loopback, from enrolment to a hub that stalls.",
    )
    parser.add_argument("--check", action="store_true", help="end after the story: 0 when all of it was true, else 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the steps and their figures here")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".demo", metavar="DIR", help="where everything goes; cleared first"
    )
    options = parser.parse_args(arguments)
    # SIGINT too: a shell's background jobs inherit it as ignored, and Ctrl-C shall end the demo all the same.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        folder = claim(options.folder.resolve())
        figures = options.json.resolve() if options.json is not None else None
        os.chdir(folder.path)
    except FolderBusy as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    house = gather(folder)
    tell = Teller([name for name, _, _ in STORY], logs=folder.logs)
    try:
        ok = _play(house, tell)
        if figures is not None:
            tell.write_json(figures)
        if not options.check and ok:
            _stay(house)
        return 0 if ok else 1
    except (KeyboardInterrupt, Interrupted):
        print("\nstopping", file=sys.stderr)
        return 130
    finally:
        _quietly(house.stage.stop_all)


def _play(house: House, tell: Teller) -> bool:
    began = time.monotonic()
    models.begin(house)
    for name, title, act in STORY:
        if not tell.play(name, title, lambda act=act: act(house, tell)):  # type: ignore[misc]
            print(f"\nThe demo failed at {name}; everything is left in {house.folder.path}.", file=sys.stderr)
            return False
    print(f"\nAll {len(STORY)} steps were true, in {time.monotonic() - began:.0f} s.", flush=True)
    return True


def _stay(house: House) -> None:
    folder = house.folder
    outrider = ROOT / ".venv" / "bin" / "outrider"
    agent = ROOT / ".venv" / "bin" / "outrider-agent"
    device = house.devices[0]
    place = "" if device.door.is_absolute() else f"cd {folder.path} && "
    print(
        f"""
The hub stays up at {house.cloud.url}; its token is in {folder.operator / "admin.token"}.
Try, in another terminal:

  export OUTRIDER_CONFIG={folder.operator / "contexts.json"}
  {outrider} ls devices
  {outrider} get device {device.name}
  {outrider} model show {FAMILY}/{house.served}
  {outrider} release ls
  {outrider} audit
  {place}{agent} status --state {device.state}

Ctrl-C ends everything; {folder.path} keeps the logs.""",
        flush=True,
    )
    while True:
        for name in ("hub", *house.names):
            if not house.stage.alive(name):
                print(f"{name} has ended; see {folder.logs / name}.log", file=sys.stderr)
                return
        time.sleep(1)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted


def _quietly(act: Callable[[], None]) -> None:
    """Stop everything, whatever further signals say."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    act()


if __name__ == "__main__":
    sys.exit(main())
