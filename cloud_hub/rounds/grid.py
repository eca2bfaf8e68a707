"""Flower's `Grid` over the hub: what a strategy sends goes to the hub as one Ask, and answers come as they arrive.

Rules:
1. Nothing polls: a strategy that waits, waits for the next frame.
2. Replies are handed over sorted by node, because the order of a floating-point sum decides its last bits.
3. Each answer was checked before (replies.py); a device that sends nonsense is an error reply and no more.
4. Message names follow from round, phase, attempt and node, so that the same round asked again is the same question.

`open_grid` makes the class when Flower is there: it is a part of an extra.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cloud_hub.rounds import frames, rules
from cloud_hub.rounds.replies import level, read_reply
from shared.errors import ProtocolViolation

if TYPE_CHECKING:
    from pathlib import Path

    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run

    from shared.tensors import Array


class Channel:
    """The worker's end of the socket pair; blocks."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("rb")

    def send(self, frame: frames.ToHub) -> None:
        """Hand a frame to the hub."""
        self._socket.sendall(frames.encode(frame))

    def receive(self) -> frames.ToWorker:
        """The next frame; raises EOFError when the hub is gone, which ends the worker."""
        return frames.for_worker(self._exactly(frames.length_of(self._exactly(frames.LENGTH.size))))

    def close(self) -> None:
        """End the conversation."""
        self._file.close()
        self._socket.close()

    def _exactly(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise EOFError
        return data


class HubTransport:
    """The methods of a Grid.

    Args:
        channel: to the hub.
        run: the run's name.
        template: the arrays that a trained answer must have.
        folder: where the hub may have put large answers.

    Attributes:
        answered: how many answers the last question brought.
        refused: message to reason, for those of them that were errors or not usable.
    """

    def __init__(self, channel: Channel, *, run: str, template: Mapping[str, Array], folder: Path) -> None:
        self._channel = channel
        self._name = run
        self._template = template
        self._folder = folder
        self._run: Run | None = None
        self._nodes: tuple[int, ...] = ()
        self._round, self._attempt = 0, 1
        self._phase: rules.Phase = "train"
        self.answered = 0
        self.refused: dict[str, str] = {}

    def gather(self, number: int, *, phase: rules.Phase, attempt: int) -> None:
        """Wait until the hub says who takes part; what is sent from now on belongs to this attempt."""
        self._round, self._phase, self._attempt = number, phase, attempt
        self._channel.send(frames.Gather(round=number, phase=phase, attempt=attempt))
        answer = self._channel.receive()
        if not isinstance(answer, frames.Cohort):
            raise ProtocolViolation(f"expected a cohort, got {type(answer).__name__}", code="protocol.frame")
        self._nodes = answer.nodes

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        assert self._run is not None
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        from flwr.app import Message

        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of this round, in ascending order."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the hub; returns their names."""
        return [request.metadata.message_id for request in self._push(messages).values()]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Nothing: answers come to `send_and_receive`, which is the only way that strategies ask here."""
        del message_ids
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, wait until the hub closes the question, and return the checked replies by node.

        The time limit is the hub's: it knows when devices were asked, across restarts of this process.
        """
        del timeout
        self.answered, self.refused = 0, {}
        requests = self._push(messages)
        if not requests:
            return []
        replies: dict[str, Message] = {}
        while not isinstance(frame := self._channel.receive(), frames.Closed):
            if not isinstance(frame, frames.Reply):
                raise ProtocolViolation(f"expected a reply, got {type(frame).__name__}", code="protocol.frame")
            request = requests.get(frame.message)
            if request is None or frame.message in replies:
                continue
            data = (self._folder / frame.file).read_bytes() if frame.file else frame.content
            template = self._template if self._phase == "train" else None
            replies[frame.message] = read_reply(data, request=request, template=template)
        self.answered = len(replies)
        self.refused = {name: str(reply.error.reason) for name, reply in sorted(replies.items()) if reply.has_error()}
        ordered = sorted(replies.values(), key=lambda reply: int(reply.metadata.src_node_id))
        level(ordered)
        return ordered

    def _push(self, messages: Iterable[Message]) -> dict[str, Message]:
        """Name and send; contents that several nodes share are serialized and sent once."""
        requests: dict[str, Message] = {}
        contents: list[bytes] = []
        places: dict[int, int] = {}
        tasks: list[frames.Task] = []
        for request in messages:
            node = int(request.metadata.dst_node_id)
            name = rules.message_of(self._name, number=self._round, phase=self._phase, attempt=self._attempt, node=node)
            place = places.get(id(request.content))
            if place is None:
                place = places[id(request.content)] = len(contents)
                contents.append(_shared_bytes(request, group=self._group))
            request.metadata.__dict__["_message_id"] = name
            requests[name] = request
            tasks.append(frames.Task(message=name, node=node, content=place))
        if tasks:
            self._channel.send(
                frames.Ask(
                    round=self._round,
                    phase=self._phase,
                    attempt=self._attempt,
                    tasks=tuple(tasks),
                    contents=tuple(contents),
                )
            )
        return requests

    @property
    def _group(self) -> str:
        return rules.group_of(self._round, phase=self._phase, attempt=self._attempt)


def open_grid(transport: HubTransport) -> Grid:
    """The transport as Flower's Grid."""
    from flwr.serverapp import Grid

    class HubGrid(HubTransport, Grid):
        """What strategies are given."""

        def __init__(self) -> None:
            self.__dict__ = transport.__dict__  # one state under both names

    return HubGrid()


def _shared_bytes(request: Message, *, group: str) -> bytes:
    """The message as all nodes get it: who it is for stands in the task around it, so one text serves everybody."""
    from flwr.common.serde import message_to_proto

    proto: Any = message_to_proto(request)
    proto.metadata.message_id = group
    proto.metadata.group_id = group
    proto.metadata.dst_node_id = 0
    data: bytes = proto.SerializeToString()
    return data
