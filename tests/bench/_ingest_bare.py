"""A bare consumer: the hub's MQTT client as its maker shows it, with the hub's subscription, storing nothing.

    python -m tests.bench._ingest_bare FOLDER NAME PORT

It says how many messages it has had, so that whoever sends keeps no more than a window on the way.
"""

from __future__ import annotations

import signal
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shared import limits
from shared.wire import topics
from tests.fakes.ingest_place import link_settings

PROGRESS = "outrider/progress"
EVERY = 20


def main(arguments: list[str]) -> None:
    """Run until a signal."""
    folder, name, port = Path(arguments[0]), arguments[1], int(arguments[2])
    stop, ready = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    had = 0

    def on_message(client: mqtt.Client, _data: Any, _message: mqtt.MQTTMessage) -> None:
        nonlocal had
        had += 1
        if had % EVERY == 0:
            client.publish(PROGRESS, str(had))

    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
    own = link_settings(folder, name, port)
    context = ssl.create_default_context(cafile=str(own.ca))
    context.load_cert_chain(own.certificate, own.key)
    client.tls_set_context(context)
    client.on_connect = lambda client, *_: client.subscribe(topics.shared_up_filter(), qos=1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = on_message
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.ReceiveMaximum = 1000
    properties.MaximumPacketSize = limits.MAX_MQTT_PACKET_BYTES
    client.connect("127.0.0.1", port, properties=properties)
    client.loop_start()
    ready.wait(30)
    print("ready", flush=True)
    stop.wait()
    client.disconnect()
    client.loop_stop()


if __name__ == "__main__":
    main(sys.argv[1:])
