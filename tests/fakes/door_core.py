"""The smallest core that can serve: a real door in front of one real model host, without link, slots or outbox.

For tests and for the door's benchmark. As a process: `python -m tests.fakes.door_core STATE_DIR`, where STATE_DIR
holds `manifest.json`, `model` and `golden`; it writes a JSON line when it is ready and ends when its input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_agent.adapters.door import Door
from edge_agent.adapters.hosts import HostOptions, LiveHosts
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.waiting import Handle
from edge_agent.framing import Buffer
from edge_agent.ports import ModelHost
from shared.errors import ModelError
from shared.inference import Answer, Describe, Description, Done, Infer, ModelState, Reply, Request
from shared.model import Manifest, Variant, decode_manifest


def handle_for(host: ModelHost, manifest: Manifest, variant: Variant) -> Handle:
    """Answers `infer` for one model and `describe`; acknowledges everything else."""

    async def handle(request: Request, payload: bytearray, _arrived: float) -> tuple[Reply, Sequence[Buffer]]:
        match request:
            case Infer():
                if request.model != manifest.family:
                    raise ModelError(f"no model {request.model!r}", code="model.unknown")
                said = await host.infer(request.inputs, payload, deadline_ms=request.deadline_ms)
                answer = Answer(
                    id=request.id,
                    model=manifest.family,
                    version=manifest.version,
                    variant=variant.name,
                    digest=variant.file.digest,
                    rung="full",
                    labels=said.labels,
                    confidences=said.confidences,
                    outputs=said.outputs,
                    took_us=0,
                )
                return answer, (said.payload,)
            case Describe():
                state = ModelState(
                    family=manifest.family,
                    phase="committed",
                    version=manifest.version,
                    signature=manifest.signature,
                    labels=manifest.labels,
                )
                return Description(id=request.id, models=(state,)), ()
            case _:
                return Done(id=request.id), ()

    return handle


async def serve(directory: Path) -> None:
    """Load the model, open the door, say so, and serve until the input ends."""
    manifest = decode_manifest((directory / "manifest.json").read_bytes())
    variant = manifest.variants[0]
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    hosts = LiveHosts(directory=directory / "hosts", clock=SystemClock(), options=HostOptions())
    host, ready = await hosts.start(
        manifest=manifest,
        variant=variant,
        model_fd=os.open(directory / "model", os.O_RDONLY),
        golden_fd=os.open(directory / "golden", os.O_RDONLY),
        on_lost=lambda _: ended.set(),
    )
    loop.add_reader(sys.stdin.fileno(), ended.set)
    async with asyncio.TaskGroup() as tasks:
        door = Door(path=directory / "door.sock", handle=handle_for(host, manifest, variant), tasks=tasks)
        await door.open()
        line = {"pid": os.getpid(), "host_pid": host.pid, "load_ms": ready.load_ms, "rss_bytes": ready.rss_bytes}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        await ended.wait()
        loop.remove_reader(sys.stdin.fileno())
        await door.close()
    await host.stop()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
