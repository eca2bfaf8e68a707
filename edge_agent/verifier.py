"""The verifier: a short-lived child that reads what others sent, so that the core does not have to.

    python -I -m edge_agent.verifier PARENT_PID        with one end of a socket pair as standard input

It is sent a Job or a TimeJob, asks for files with Need, hands back metadata worth keeping with Keep, and ends with
Accepted, Attested or Refused; or it is sent a StoredJob and answers Judged (shared/wire/verification.py, one message in
each frame's payload). It opens no file and no connection of its own: before it reads the job it gives up the network,
every capability, and all but a bounded share of processor time and memory, and it dies with its parent. The only
process of the agent that loads tuf and cryptography for this.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
from collections.abc import Callable, Generator
from typing import Final, TypeVar

from edge_agent.framing import FrameReader, build_frame
from edge_agent.host import confine
from shared.errors import OutriderError, ProtocolViolation, TransferError, TrustError
from shared.limits import MIB
from shared.wire.verification import (
    Accepted,
    Attested,
    Fed,
    FromVerifier,
    Job,
    Keep,
    KeepManifest,
    Need,
    Refused,
    StoredJob,
    TimeJob,
    ToVerifier,
    decode_to_verifier,
    encode,
)

R = TypeVar("R")

NICENESS: Final = 10
CPU_LIMIT_S: Final = 60
WALL_LIMIT_S: Final = 600
"""Longer than any deadline of the parent, which kills earlier; this one holds if the parent is stopped."""

MEMORY_LIMIT_BYTES: Final = 1024 * MIB
"""Address space; a verification of the largest metadata needs a third of it."""


class Pipe:
    """The verifier's end of the socket pair, blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()

    def send(self, message: FromVerifier) -> None:
        """Send one message."""
        for part in build_frame(b"", [encode(message)]):
            self._connection.sendall(part)

    def receive(self) -> ToVerifier:
        """Wait for one message; raises EOFError when the parent has closed its end."""
        while (frame := self._reader.next_frame()) is None:
            count = self._connection.recv_into(self._reader.buffer())
            if count == 0:
                raise EOFError
            self._reader.received(count)
        return decode_to_verifier(frame[1])


def converse(pipe: Pipe) -> None:
    """Verify one job, or judge what is stored, and say how it ended."""
    from shared.trust import refresh, stored

    match pipe.receive():
        case StoredJob() as job:
            pipe.send(stored.judge(job))
        case Job() as job:
            _play(pipe, refresh.verify(job), lambda verified: Accepted(verified=verified))
        case TimeJob() as question:
            _play(pipe, refresh.attest(question), lambda time_ms: Attested(time_ms=time_ms))
        case Fed():
            raise ProtocolViolation("the first message is not a job")


def _play(
    pipe: Pipe, run: Generator[Need | Keep | KeepManifest, bytes | None, R], told: Callable[[R], FromVerifier]
) -> None:
    answer: bytes | None = None
    try:
        while True:
            pipe.send(run.send(answer))
            fed = pipe.receive()
            if not isinstance(fed, Fed):
                raise ProtocolViolation("a second job came before the first was done")
            answer = fed.data
    except StopIteration as end:
        pipe.send(told(end.value))
    except (TrustError, TransferError) as error:
        pipe.send(Refused(code=error.code, message=error.message, hint=error.hint))


def limit(*, parent: int) -> None:
    """Give up what a verification does not need."""
    confine.give_up_rights(parent=parent, niceness=NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.alarm(WALL_LIMIT_S)


def main() -> int:
    """Run as a child of the core; returns the exit status."""
    parent = int(sys.argv[1])
    confine.bind_to_parent(parent)
    # Loaded before the limits, because loading reads files and maps a good deal of memory once.
    import shared.trust.refresh
    import shared.trust.stored  # noqa: F401

    limit(parent=parent)
    with socket.socket(fileno=0) as connection:
        try:
            converse(Pipe(connection))
        except (EOFError, ConnectionError):
            return 1
        except OutriderError as error:
            print(f"verifier: {error.code}: {error.message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
