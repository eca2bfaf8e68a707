"""The worker: holds one run with a stock Flower strategy, in a process of its own, and ends with it.

    python -I -m cloud_hub.rounds.worker run FD       a run; the hub is at the other end of socket FD
    python -I -m cloud_hub.rounds.worker inspect FD   only says which head a run on this base would learn

Rules: it knows no device and no network, only the hub; it may be killed at any moment, because what it needs to go on
is in the checkpoint and in the answers that the hub keeps; draws of chance are seeded anew for each attempt at a round,
so that a resumed run draws as the undisturbed one did. Rounds go as in Flower's own `Strategy.start`, with a checkpoint
after each; that method itself can begin at its first round only.

Only this process imports flwr, onnx and onnxruntime for rounds.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloud_hub.rounds import checkpoint, evaluation, frames, head, rules
from cloud_hub.rounds.grid import Channel, HubTransport, open_grid
from cloud_hub.rounds.replies import restored
from shared.errors import OutriderError, ProtocolViolation

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy

    from shared.tensors import Array

CHECKPOINT: Final = "round-{}.checkpoint"
RESULT: Final = "result.onnx"
SERVER_NODE: Final = 1
NICENESS: Final = 5


def main(arguments: Sequence[str]) -> int:
    """Entry of the process: `run FD` or `inspect FD`."""
    kind, number = arguments
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    channel = Channel(socket.socket(fileno=int(number)))
    try:
        begin = channel.receive()
        if not isinstance(begin, frames.Begin):
            raise ProtocolViolation(f"expected the run, got {type(begin).__name__}", code="protocol.frame")
        if kind == "inspect":
            channel.send(frames.Inspected(head=_inspect(begin)))
        else:
            hold(channel, begin)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 1  # the hub is gone, or has ended the run
    except OutriderError as error:
        channel.send(frames.Failed(code=error.code, reason=error.message, hint=error.hint))
    finally:
        channel.close()
    return 0


def hold(channel: Channel, begin: frames.Begin) -> None:
    """Hold the run from its checkpoint to its end; raises OutriderError when it cannot go on."""
    Session(channel, begin).run()


class Session:
    """One run, from where its checkpoint left it."""

    def __init__(self, channel: Channel, begin: frames.Begin) -> None:
        import numpy as np

        self._channel = channel
        self._begin = begin
        self._spec = begin.spec
        self._folder = Path(begin.folder)
        shape = (begin.head.width, begin.head.classes)
        # A fresh head of zeros: softmax regression is convex, so there is no symmetry that noise would have to break.
        self._template: dict[str, Array] = {
            rules.WEIGHT: np.zeros(shape, np.float32),
            rules.BIAS: np.zeros(shape[1], np.float32),
        }
        self._done = 0
        self._arrays = dict(self._template)
        if self._spec.learned:
            # What may be released without a person must stay near the base: it starts from there.
            weight, bias = head.numbers(Path(begin.model), scores=begin.signature.outputs[0].name)
            self._arrays = {rules.WEIGHT: weight, rules.BIAS: bias}
        memory: dict[str, dict[str, Array]] = {}
        if begin.checkpoint:
            data = checkpoint.read(self._folder / begin.checkpoint, digest=begin.digest)
            self._done, self._arrays, memory = checkpoint.unpack(data)
        self._yardstick = evaluation.yardstick(
            Path(begin.model),
            Path(begin.golden),
            signature=begin.signature,
            preparations=begin.preparations,
            head=begin.head,
        )
        self._transport = HubTransport(channel, run=begin.run, template=self._template, folder=self._folder)
        self._strategy, self._grid = _flower(begin, self._transport, memory)

    def run(self) -> None:
        """The rounds that are left, then the result."""
        for number in range(self._done + 1, self._spec.rounds + 1):
            self._round(number)
        put = head.renumber if self._spec.learned else head.replace
        result = put(
            Path(self._begin.model),
            scores=self._begin.signature.outputs[0].name,
            weight=self._arrays[rules.WEIGHT],
            bias=self._arrays[rules.BIAS],
        )
        checkpoint.write(self._folder / RESULT, result)
        self._channel.send(frames.Trained(model=RESULT))

    def _round(self, number: int) -> None:
        for attempt in range(1, rules.MAX_ATTEMPTS + 1):
            replies = self._ask(number, "train", attempt)
            accepted = sum(reply.has_content() for reply in replies)
            if accepted >= self._spec.needed:
                self._finish(number, attempt, replies, accepted)
                return
        refused = next(iter(self._transport.refused.values()), "")
        raise OutriderError(
            f"round {number}: {accepted} good answers of {self._spec.needed} needed, {attempt} times over"
            + (f"; the first refusal: {refused}" if refused else ""),
            code="rounds.quorum",
            hint="see that the devices are online and hold samples, or give them a longer --round-timeout",
        )

    def _ask(self, number: int, phase: rules.Phase, attempt: int) -> list[Any]:
        self._transport.gather(number, phase=phase, attempt=attempt)
        random.seed(f"{self._spec.seed}/{number}/{phase}/{attempt}")
        configure = self._strategy.configure_train if phase == "train" else self._strategy.configure_evaluate
        messages = configure(number, _record(self._arrays), self._config(number), self._grid)
        return list(self._grid.send_and_receive(messages))

    def _finish(self, number: int, attempt: int, replies: list[Any], accepted: int) -> None:
        """Aggregate, measure, keep: the round counts when the hub has said that it is stored."""
        answered, refused = self._transport.answered, dict(self._transport.refused)
        try:
            arrays, trained = self._strategy.aggregate_train(number, replies)
        # Blanket on purpose: strategies raise what they like when they cannot aggregate, and it ends the run.
        except Exception as error:
            raise OutriderError(
                f"round {number}: {self._spec.strategy} could not aggregate: {type(error).__name__}: {error}"[:500],
                code="rounds.aggregation",
            ) from error
        if arrays is not None:
            self._arrays = restored(arrays, self._template)
        metrics = self._yardstick.measure(self._arrays[rules.WEIGHT], self._arrays[rules.BIAS])
        metrics |= _named("train", trained)
        if self._spec.evaluate:
            metrics |= _named("evaluate", self._strategy.aggregate_evaluate(number, self._ask(number, "evaluate", 1)))
        from cloud_hub.rounds import strategies

        data = checkpoint.pack(number, self._arrays, strategies.memory_of(self._strategy))
        name = CHECKPOINT.format(number)
        digest = checkpoint.write(self._folder / name, data)
        self._channel.send(
            frames.RoundDone(
                round=number,
                attempt=attempt,
                answered=answered,
                accepted=accepted,
                metrics=metrics,
                refused=dict(list(refused.items())[: rules.MAX_REASONS]),
                checkpoint=name,
                digest=digest,
            )
        )
        answer = self._channel.receive()
        if not isinstance(answer, frames.Stored):
            raise ProtocolViolation(f"expected `stored`, got {type(answer).__name__}", code="protocol.frame")

    def _config(self, number: int) -> Any:
        from flwr.app import ConfigRecord

        spec = self._spec
        return ConfigRecord(
            {
                "family": spec.family,
                "version": spec.base,
                "features": self._begin.head.features,
                "labels": msgspec.json.encode(self._begin.labels).decode(),
                "learning_rate": spec.learning_rate,
                "epochs": spec.epochs,
                "batch_size": spec.batch_size,
                "seed": (spec.seed + number) % 2**31,
            }
        )


def _inspect(begin: frames.Begin) -> rules.Head:
    return head.inspect(Path(begin.model), begin.signature, features=begin.spec.features)


def _flower(begin: frames.Begin, transport: HubTransport, memory: dict[str, dict[str, Array]]) -> tuple[Strategy, Grid]:
    """The strategy and its grid; Flower keeps who it is in process-wide state, so a process holds one run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from flwr.supercore.run import Run
            from flwr.supercore.task_identity import TaskIdentity
        except ImportError as error:
            raise OutriderError(
                f"Flower cannot be loaded: {error}",
                code="rounds.flower_missing",
                hint="install the extra `fl` on the hub: pip install 'outrider[fl]'",
            ) from error

        from cloud_hub.rounds import strategies
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = begin.number
    TaskIdentity.node_id = SERVER_NODE
    strategy = strategies.make(begin.spec)
    strategies.remind(strategy, memory)
    transport.set_run(Run.create_empty(begin.number))
    return strategy, open_grid(transport)


def _record(arrays: dict[str, Array]) -> ArrayRecord:
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord

    return ArrayRecord({name: FlowerArray(array) for name, array in arrays.items()})


def _named(phase: str, metrics: MetricRecord | None) -> dict[str, float]:
    """The devices' own measures under the phase's name."""
    if metrics is None:
        return {}
    return {f"{phase}.{name}": float(value) for name, value in metrics.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
