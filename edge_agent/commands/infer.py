"""`outrider-agent infer MODEL PATH`: ask a model about rows from files, through the running agent.

Results go to stdout, a row each; a progress bar and a summary go to stderr. A row that is refused ends the command;
what was printed before stands.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.adapters.system import SystemClock
from edge_agent.client import Client
from edge_agent.commands import screen
from edge_agent.commands.exits import Exit
from edge_agent.commands.rows import batches, files_below, read_rows
from edge_agent.config import LoadedConfig
from edge_agent.replies import Prediction, signature_of
from shared.errors import InvalidValue
from shared.model import Signature

if TYPE_CHECKING:
    from shared.clock import Clock

BAR_WIDTH: Final = 30
REDRAW_MS: Final = 100


class Progress:
    """A bar on stderr, drawn at most ten times a second and only where a person watches."""

    def __init__(self, total: int, *, clock: Clock, shown: bool) -> None:
        self._total = total
        self._clock = clock
        self._shown = shown and total > 1
        self._drawn_ms = -REDRAW_MS

    def at(self, done: int) -> None:
        """So many of the total are done."""
        now = self._clock.mono_ms()
        if self._shown and (now - self._drawn_ms >= REDRAW_MS or done == self._total):
            self._drawn_ms = now
            print(f"\r{bar(done, self._total)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def bar(done: int, total: int) -> str:
    """`[#####.....]  50 %  5 of 10`."""
    filled = BAR_WIDTH * done // total
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {100 * done // total:3d} %  {done} of {total}"


def run(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """Infer every row; raises what the client raises, InvalidValue and InputRefused for files."""
    clock = SystemClock()
    paths = files_below(Path(args.path))
    with Client(loaded.config.door_path) as agent:
        signature = signature_of(agent.describe(args.model), args.model)
        _check_batch(signature, args.batch)
        start_ms, rows = clock.mono_ms(), 0
        for path in paths:
            columns = read_rows(path, signature=signature, input_name=args.input)
            total = len(next(iter(columns.values())))
            progress = Progress(total, clock=clock, shown=sys.stderr.isatty() and not sys.stdout.isatty())
            for first, inputs in batches(columns, args.batch):
                answer = agent.infer(args.model, inputs, deadline_ms=args.deadline_ms)
                count = len(next(iter(inputs.values())))
                _show(answer, path=path, first=first, count=count, as_json=args.json)
                progress.at(first + count)
            progress.clear()
            rows += total
    took_ms = max(clock.mono_ms() - start_ms, 1)
    screen.note(f"{rows} rows of {len(paths)} files in {took_ms / 1000:.2f} s, {rows * 1000 / took_ms:.0f} rows/s")
    return Exit.DONE


def _check_batch(signature: Signature, batch: int) -> None:
    fixed = [spec for spec in signature.inputs if spec.shape and spec.shape[0] not in (-1, batch)]
    if fixed:
        raise InvalidValue(
            f"the model takes {fixed[0].shape[0]} rows at a time",
            code="invalid.batch",
            hint=f"use --batch {fixed[0].shape[0]}",
        )


def _show(answer: Prediction, *, path: Path, first: int, count: int, as_json: bool) -> None:
    for row in range(count):
        label = answer.labels[row] if row < len(answer.labels) else None
        confidence = answer.confidences[row] if row < len(answer.confidences) else None
        outputs = None if label is not None else {name: array[row].tolist() for name, array in answer.outputs.items()}
        if as_json:
            document = {
                "file": str(path),
                "row": first + row,
                "label": label,
                "confidence": confidence,
                "id": answer.id,
                "model": answer.model,
                "version": answer.version,
                "variant": answer.variant,
                "digest": answer.digest,
                "rung": answer.rung,
                "degraded": answer.degraded,
                "deadline_met": answer.deadline_met,
                "escalated": answer.escalated,
                "reason": answer.reason,
                "took_us": answer.took_us,
            }
            screen.show_json(document if outputs is None else {**document, "outputs": outputs}, is_row=True)
        else:
            said = f"{label}  {confidence:.3f}" if label is not None and confidence is not None else str(outputs)
            screen.show(f"{path.name}:{first + row}  {screen.clean(said)}  {answer.version} {answer.rung}")
