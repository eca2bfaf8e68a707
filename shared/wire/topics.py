"""The only place where MQTT topics are built or taken apart.

    outrider/1/{device}/up/{leaf}      device to hub
    outrider/1/{device}/down/{leaf}    hub to device
    outrider/1/{device}/up/death       the last will

The `1` is the wire's major version. A device may publish below its own `up/` and read below its own `down/`.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

from shared.errors import InvalidValue, ProtocolViolation
from shared.ids import DeviceId, parse_device_id

ROOT: Final = "outrider"
WIRE_MAJOR: Final = 1

UpLeaf = Literal["birth", "death", "telemetry", "outcome", "event", "reported", "job", "offload", "blob", "round"]
DownLeaf = Literal["ack", "assignment", "job", "offload", "blob", "round"]

UP_LEAVES: Final[frozenset[str]] = frozenset(get_args(UpLeaf))
DOWN_LEAVES: Final[frozenset[str]] = frozenset(get_args(DownLeaf))


class UpTopic(msgspec.Struct, frozen=True):
    """Where a message from a device came in; `device` is vouched for by the broker, which confines topics."""

    device: DeviceId
    leaf: str


def up(device: DeviceId, leaf: UpLeaf) -> str:
    """The topic on which the device sends."""
    return f"{ROOT}/{WIRE_MAJOR}/{device}/up/{leaf}"


def up_branch(device: DeviceId) -> str:
    """The beginning of every topic on which the device may send."""
    return f"{ROOT}/{WIRE_MAJOR}/{device}/up/"


def down(device: DeviceId, leaf: DownLeaf) -> str:
    """The topic on which the hub sends to the device."""
    return f"{ROOT}/{WIRE_MAJOR}/{device}/down/{leaf}"


def down_filter(device: DeviceId) -> str:
    """The one subscription of a device."""
    return f"{ROOT}/{WIRE_MAJOR}/{device}/down/+"


def up_filter() -> str:
    """Everything that devices send, whatever the leaf, so that unknown leaves are counted."""
    return f"{ROOT}/{WIRE_MAJOR}/+/up/#"


def shared_up_filter() -> str:
    """The same for hubs that share the work: each message reaches one of them (MQTT 5, section 4.8.2)."""
    return f"$share/hub/{up_filter()}"


def acl_patterns() -> tuple[str, str]:
    """What a device may write and read, in mosquitto's pattern syntax (`%u` is the certificate's common name)."""
    return f"{ROOT}/{WIRE_MAJOR}/%u/up/#", f"{ROOT}/{WIRE_MAJOR}/%u/down/#"


def parse_up(topic: str) -> UpTopic:
    """Take apart a topic that a device sent on; raises ProtocolViolation for anything else."""
    parts = topic.split("/")
    if len(parts) != 5 or parts[0] != ROOT or parts[1] != str(WIRE_MAJOR) or parts[3] != "up":
        raise ProtocolViolation(f"not a topic that devices send on: {topic[:120]!r}", code="protocol.topic")
    if parts[4] not in UP_LEAVES:
        raise ProtocolViolation(f"unknown leaf {parts[4][:40]!r}", code="protocol.topic")
    try:
        device = parse_device_id(parts[2])
    except InvalidValue as error:
        raise ProtocolViolation(f"topic of a device without a usable name: {error}", code="protocol.topic") from error
    return UpTopic(device=device, leaf=parts[4])


def parse_down(topic: str) -> str:
    """The leaf of a topic that the hub sent on; raises ProtocolViolation for anything else."""
    parts = topic.split("/")
    if len(parts) != 5 or parts[0] != ROOT or parts[1] != str(WIRE_MAJOR) or parts[3] != "down":
        raise ProtocolViolation(f"not a topic that the hub sends on: {topic[:120]!r}", code="protocol.topic")
    if parts[4] not in DOWN_LEAVES:
        raise ProtocolViolation(f"unknown leaf {parts[4][:40]!r}", code="protocol.topic")
    return parts[4]
