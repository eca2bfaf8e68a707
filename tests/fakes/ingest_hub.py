"""A hub that does nothing but take telemetry, as a process: the real courier, switchboard, desk and database.

python -m tests.fakes.ingest_hub FOLDER NAME PORT DATABASE_URL
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from cloud_hub.ground import migrate
from cloud_hub.ground.courier import HubCourier, Inbound, Link
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.post import Post
from cloud_hub.ground.switchboard import Rooms, Switchboard
from cloud_hub.ground.system import SystemClock, take_turns_sooner
from cloud_hub.telemetry.desk import Desk
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import Ack, Message
from tests.fakes.ingest_place import link_settings


async def serve(folder: Path, name: str, port: int, url: str) -> None:
    """Take telemetry until a signal."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    clock, metrics, database = SystemClock(), Metrics(), Database(url)
    migrate.upgrade(database)
    inbox: list[Switchboard] = []

    def deliver(messages: Sequence[Inbound]) -> None:
        inbox[0].put(messages)

    settings = link_settings(folder, name, port)
    courier = HubCourier(settings, on_messages=deliver, metrics=metrics, link=Link(clock))
    post = Post(publish=courier.publish, clock=clock)

    is_new = True

    async def send_ack(device: DeviceId, ack: Ack) -> None:
        nonlocal is_new
        if is_new:
            is_new = False
            print("took", flush=True)
        await post.send(device, ack, leaf="ack", qos=0)

    async def ignore(_device: DeviceId, _envelope: Envelope, _message: Message) -> None:
        return

    desk = Desk(database=database, clock=clock, metrics=metrics, send_ack=send_ack)
    rooms = Rooms(birth=ignore, death=ignore, reported=ignore, batches=desk.take, round_reply=ignore)
    inbox.append(Switchboard(rooms=rooms, metrics=metrics))
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(inbox[0].run()), group.create_task(courier.run(ready=ready))]
        await ready.wait()
        print("ready", flush=True)
        await stop.wait()
        for task in tasks:
            task.cancel()
    database.close()


def main(arguments: list[str]) -> None:
    """Run."""
    folder, name, port, url = arguments
    take_turns_sooner()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(folder), name, int(port), url))


if __name__ == "__main__":
    main(sys.argv[1:])
