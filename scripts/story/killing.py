"""The steps `kill-agent` and `kill-hub`: kill -9 in the middle of work, and all is as before."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

from . import books
from .cast import House
from .stage import is_gone, wait_gone
from .telling import Figure, Teller, expect, require, until
from .work import Burst

BURST: Final = 60
BURST_S: Final = 20.0
HUB_BURST: Final = 150
BACK_S: Final = 20.0


def kill_agent(house: House, tell: Teller) -> Mapping[str, Figure]:
    """kill -9 one agent with a queue on disk and a question on its way, while the hub says nothing."""
    device = house.devices[0]
    before = device.status()
    serving = device.model()
    hosts = device.host_pids()
    require(hosts, f"{device.name} has a model host")
    with hub_asleep(house):
        with Burst(device, house.held_back, title="killed") as burst:
            until(f"{device.name} is in mid-work", partial(_has_asked, burst, BURST), seconds=BURST_S)
            device.stage.kill(device.name)
            until("the application notices", lambda: burst.cut_off, seconds=BURST_S)
        for pid in hosts:
            wait_gone(f"the model host of {device.name}", pid)
        confirmed = sum(1 for request in device.confirmed if request.startswith("killed-"))
        device.start()
        until(f"{device.name} serves again", partial(device.serves, serving.version), seconds=BACK_S)
        after = device.status()
        waiting = device.waiting()
        require(waiting >= confirmed, f"the queue holds what was confirmed: {waiting} of {confirmed}")
    expect("boot counter", wanted=before.boot + 1, found=after.boot)
    expect("the file that serves", wanted=serving.digest, found=device.model().digest)
    books.wait_settled(house)
    counted = books.compare(house, device)
    tell.say(
        f"{device.name} was killed with kill -9 while it answered; {burst.asked} questions into a burst, with "
        f"{confirmed} confirmed truths in its queue and the hub silent. Its model host died with it. Started again, it "
        f"serves {serving.version} as before (boot {after.boot}); {waiting} records were still in the queue, and each "
        "arrived once."
    )
    return {
        "asked_before_kill": burst.asked,
        "confirmed_before_kill": confirmed,
        "queue_after_restart": waiting,
        "boot_before": before.boot,
        "boot_after": after.boot,
        "answers_not_recorded": counted.unrecorded,
        "orphan_hosts": sum(not is_gone(pid) for pid in hosts),
        "missing": counted.missing,
        "twice": counted.twice,
    }


def kill_hub(house: House, tell: Teller) -> Mapping[str, Figure]:
    """kill -9 the hub while all devices send; the broker goes with it, and afterwards everything is counted once."""
    broker = house.cloud.broker_pid
    with contextlib.ExitStack() as stack:
        bursts = [stack.enter_context(Burst(device, house.held_back, title="hubless")) for device in house.devices]
        for burst in bursts:
            until("the devices send", partial(_has_asked, burst, HUB_BURST // 3), seconds=BURST_S)
        house.cloud.kill_hub_only()
        for burst in bursts:
            until("the devices answer on", partial(_has_asked, burst, HUB_BURST), seconds=BURST_S)
    require(not any(burst.cut_off for burst in bursts), "no question went unanswered while the hub was gone")
    waiting = sum(device.waiting() for device in house.devices)
    house.cloud.start()
    for device in house.devices:
        device.wait_online()
        # These agents were not killed after their answers: every record of this burst must be there.
        device.unsure -= {request for request in device.unsure if request.startswith("hubless-")}
    books.wait_settled(house)
    counted = [books.compare(house, device) for device in house.devices]
    asked = sum(burst.asked for burst in bursts)
    tell.table(books.TITLES, [count.row() for count in counted])
    tell.say(
        f"The hub was killed with kill -9 while three devices sent; its broker went with it. {asked} questions were "
        f"answered without a break, {waiting} records waited. Started again, the hub has each record exactly once; "
        f"{sum(count.resent for count in counted)} came twice over the whole story and were recognised."
    )
    return {
        "asked": asked,
        "waiting": waiting,
        "orphan_brokers": int(not is_gone(broker)),
        "missing": sum(count.missing for count in counted),
        "twice": sum(count.twice for count in counted),
        "gaps": sum(count.gaps for count in counted),
    }


@contextlib.contextmanager
def hub_asleep(house: House) -> Iterator[None]:
    """Stop the hub's process for a while: the broker takes messages, and nobody acknowledges them."""
    os.kill(house.cloud.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(house.cloud.pid, signal.SIGCONT)


def _has_asked(burst: Burst, count: int) -> bool:
    return burst.asked >= count
