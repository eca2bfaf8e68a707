"""Runs the build child, one at a time: gives it a folder and a job, watches it, and brings back its report.

Whatever becomes of the child (refusal, crash, deadline, too much memory, killed by somebody) ends in a report; only the
hub's own stopping does not, and then the build is done again after the next start. The folder lives as long as the
`async with` block, so that the caller can take the variants' files out of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub.releases.job import MAX_REPORT_BYTES, MODULE, REPORT_FILE, Job, Step
from cloud_hub.releases.rules import BuildReport, Push
from shared.clock import Clock
from shared.errors import StorageError

WATCH_S: Final = 0.25
TAIL_BYTES: Final = 4096
MIB: Final = 1024 * 1024
RETRY_HINT: Final = "push the same version again to try once more"


@dataclass(frozen=True, slots=True)
class Materials:
    """The files of a build; without calibration the golden set serves for it."""

    model: Path
    golden: Path
    calibration: Path | None


@dataclass(frozen=True, slots=True)
class Built:
    """How it ended, how long it took once it was its turn, and the folder with the files that the report names."""

    report: BuildReport
    folder: Path
    took_ms: int


class Workbench:
    """Where builds are done.

    Args:
        root: a folder for their folders; emptied by `open`.
        clock: to say how long a build took.
        deadline_ms: how long a build may take.
        max_rss_bytes: how much memory it may hold.
    """

    def __init__(self, root: Path, *, clock: Clock, deadline_ms: int, max_rss_bytes: int) -> None:
        self._clock = clock
        self._root = root
        self._deadline_ms = deadline_ms
        self._max_rss_bytes = max_rss_bytes
        self._one = asyncio.Lock()

    def open(self) -> None:
        """Make the folder and remove what interrupted builds left; call once, before the first build."""
        with _translated():
            self._root.mkdir(parents=True, exist_ok=True)
            for stray in self._root.iterdir():
                shutil.rmtree(stray, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def build(
        self, push: Push, materials: Materials, *, on_step: Callable[[str], Awaitable[None]]
    ) -> AsyncIterator[Built]:
        """Build when it is this one's turn; `on_step` hears how far it is."""
        async with self._one:
            with _translated():
                folder = Path(tempfile.mkdtemp(dir=self._root))
            try:
                began_ms = self._clock.mono_ms()
                report = await self._attend(push, materials, folder, on_step)
                yield Built(report, folder, self._clock.mono_ms() - began_ms)
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _attend(
        self, push: Push, materials: Materials, folder: Path, on_step: Callable[[str], Awaitable[None]]
    ) -> BuildReport:
        job = Job(
            parent=os.getpid(),
            model=str(materials.model),
            golden=str(materials.golden),
            calibration=str(materials.calibration or ""),
            push=push,
            cpu_s=self._deadline_ms // 1000 + 1,
        )
        # Started from the loop's own thread: the parent-death signal is bound to the thread that starts the child.
        with _translated():
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-m", MODULE, "build",
                cwd=folder,
                env={"LANG": "C.UTF-8", "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        verdict = _Verdict()
        tail = bytearray()
        try:
            async with asyncio.timeout(self._deadline_ms / 1000), asyncio.TaskGroup() as group:
                group.create_task(_tell(child, msgspec.json.encode(job)))
                group.create_task(_listen(child, on_step))
                group.create_task(_keep_tail(child, tail))
                watch = group.create_task(self._watch(child, verdict))
                await child.wait()
                watch.cancel()
        except TimeoutError:
            verdict.code, verdict.reason = "model.build_deadline", f"the build took longer than {self._deadline_ms} ms"
        finally:
            # Also its own children, which share its process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
        if verdict.code:
            return BuildReport(code=verdict.code, reason=verdict.reason, hint=RETRY_HINT)
        return _read_report(folder, returncode=child.returncode or 0, tail=tail)

    async def _watch(self, child: asyncio.subprocess.Process, verdict: _Verdict) -> None:
        while True:
            rss_bytes = _rss_bytes(child.pid)
            if rss_bytes > self._max_rss_bytes:
                verdict.code = "model.build_memory"
                verdict.reason = f"the build held {rss_bytes // MIB} MiB, {self._max_rss_bytes // MIB} are allowed"
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                return
            await asyncio.sleep(WATCH_S)


@dataclass(slots=True)
class _Verdict:
    """Why we ended the child, if we did."""

    code: str = ""
    reason: str = ""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The system's refusals (no room, no more processes) as ours; the build is then tried again later."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"a build cannot be begun: {error}", code="storage.build") from error


async def _tell(child: asyncio.subprocess.Process, job: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended; its exit status says why
        child.stdin.write(job)
        await child.stdin.drain()
        child.stdin.close()


async def _listen(child: asyncio.subprocess.Process, on_step: Callable[[str], Awaitable[None]]) -> None:
    assert child.stdout is not None
    with contextlib.suppress(ValueError):  # a line without an end: not ours, and not worth keeping
        while line := await child.stdout.readline():
            with contextlib.suppress(msgspec.MsgspecError):  # a library that prints to standard output
                await on_step(msgspec.json.decode(line, type=Step).step)
    while await child.stdout.read(TAIL_BYTES):
        pass


async def _keep_tail(child: asyncio.subprocess.Process, tail: bytearray) -> None:
    assert child.stderr is not None
    while chunk := await child.stderr.read(TAIL_BYTES):
        tail += chunk
        del tail[:-TAIL_BYTES]


def _read_report(folder: Path, *, returncode: int, tail: bytearray) -> BuildReport:
    path = folder / REPORT_FILE
    if returncode == 0:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            if path.stat().st_size <= MAX_REPORT_BYTES:
                return msgspec.json.decode(path.read_bytes(), type=BuildReport)
    how = f"was ended by signal {-returncode}" if returncode < 0 else f"ended with exit status {returncode}"
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    return BuildReport(
        code="model.build_crashed",
        reason=f"the build process {how}{said}",
        hint=f"the model may crash the runtime on devices as well; {RETRY_HINT}",
    )


def _rss_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
