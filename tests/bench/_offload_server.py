"""The offload room as the hub serves it, with models from a folder instead of a database, over plain HTTP.

`python -m tests.bench._offload_server PORT FOLDER`: FOLDER holds `<family>.onnx`. The desk, the application, the bounds
around it and uvicorn's protocol are the hub's own; identity is left open, as it is at the peers.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import onnx
import uvicorn
import uvloop

from cloud_hub.ground.bounds import Bounds
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.system import SystemClock, take_turns_sooner
from cloud_hub.ground.tlsport import CertifiedProtocol
from cloud_hub.offload.asgi import STREAMED_PREFIX, Beside
from cloud_hub.offload.desk import Desk, OffloadSettings
from tests.fakes.offload_room import Shelf, app_around
from tests.fakes.releases import Build, build


def read_build(path: Path) -> Build:
    """A release around an ONNX file with one input and class scores."""
    model = onnx.load(str(path))
    axes = model.graph.input[0].type.tensor_type.shape.dim
    shape = tuple(axis.dim_value for axis in axes[1:])
    sample = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    return build(
        model.graph,
        golden={model.graph.input[0].name: sample},
        answers=(0,) * 4,
        labels=tuple("0123456789"),
        model=path.read_bytes(),
    )


async def serve(port: int, folder: Path) -> None:
    """Until killed."""
    take_turns_sooner()
    shelf = Shelf(**{path.stem: read_build(path) for path in folder.glob("*.onnx")})
    metrics = Metrics()
    desk = Desk(releases=shelf, metrics=metrics, now_us=SystemClock().mono_us, settings=OffloadSettings())
    app = Bounds(
        Beside(_nothing, app_around(desk, burst=10**9)),
        metrics=metrics,
        clock=SystemClock(),
        streamed=(STREAMED_PREFIX,),
    )
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, http=CertifiedProtocol, ws="none", lifespan="off", log_level="error",
        access_log=False, server_header=False, proxy_headers=False,
    )  # fmt: skip
    async with asyncio.TaskGroup() as group:
        group.create_task(desk.run())
        group.create_task(uvicorn.Server(config).serve())


async def _nothing(*_: object) -> None:
    raise AssertionError("only the protocol is served here")


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), Path(sys.argv[2])))
