"""The peers of the offload benchmark: MLServer and LitServe, each in an environment of its own under `.cache/peers`.

Both are given what they do best: the model in one thread, batches of 32, five milliseconds to collect one (they have a
timer), no extra workers between the door and the model, tensors as base64 rather than as JSON numbers.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PEERS: Final = ROOT / ".cache" / "peers"
INSTALL_S: Final = 300


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to start.

    Attributes:
        name: of its environment.
        needs: exact requirements, onnxruntime in our own version beside them.
        path: where a request goes.
        ready: a path that answers 200 once it serves.
    """

    name: str
    needs: tuple[str, ...]
    path: str
    ready: str

    def python(self) -> Path:
        """The environment's interpreter, installed if it is not yet; raises CalledProcessError when it cannot be."""
        home = PEERS / self.name
        wanted = "\n".join((*self.needs, f"onnxruntime=={version('onnxruntime')}", f"numpy=={version('numpy')}"))
        mark = home / "outrider-requirements.txt"
        if not mark.exists() or mark.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True)
            pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *wanted.split("\n")], check=True, capture_output=True, timeout=INSTALL_S)
            mark.write_text(wanted)
        return home / "bin" / "python"

    def command(self, folder: Path, *, model: Path, ports: Sequence[int], width: int) -> list[str]:
        """Write its files into the folder and say how to start it."""
        python = str(self.python())
        if self.name == "litserve":
            (folder / "serve.py").write_text(_LITSERVE.format(model=str(model), port=ports[0]))
            return [python, str(folder / "serve.py")]
        (folder / "mlp.py").write_text(_MLSERVER.format(model=str(model), width=width))
        settings = {
            "host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_endpoint": None,
            "parallel_workers": 0, "debug": False,
        }  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings))
        described = {"name": "mlp", "implementation": "mlp.Mlp", "max_batch_size": 32, "max_batch_time": 0.005}
        (folder / "model-settings.json").write_text(json.dumps(described))
        return [python, "-m", "mlserver.cli.main", "start", str(folder)]

    def body(self, row: bytes) -> bytes:
        """A request for one row of float32."""
        text = base64.b64encode(row).decode()
        if self.name == "litserve":
            return json.dumps({"x": text}).encode()
        tensor = {
            "name": "x", "datatype": "BYTES", "shape": [1, 1], "data": [text], "parameters": {"content_type": "base64"}
        }  # fmt: skip
        return json.dumps({"inputs": [tensor]}).encode()


MLSERVER: Final = Peer(
    name="mlserver",
    needs=("mlserver==1.7.1", "uvloop==0.21.0"),
    path="/v2/models/mlp/infer",
    ready="/v2/models/mlp/ready",
)
LITSERVE: Final = Peer(name="litserve", needs=("litserve==0.2.19",), path="/predict", ready="/health")

_MLSERVER: Final = """
import asyncio
import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceResponse


class Mlp(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession("{model}", options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        rows = b"".join(Base64Codec.decode_input(payload.inputs[0]))
        x = np.frombuffer(rows, np.float32).reshape(-1, {width})
        scores = (await asyncio.to_thread(self._session.run, None, {{"x": x}}))[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])
"""

_LITSERVE: Final = """
import base64
import litserve
import numpy as np
import onnxruntime


class Mlp(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession("{model}", options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["x"]), np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self._session.run(None, {{"x": x}})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {{"scores": output.tolist()}}


if __name__ == "__main__":
    api = Mlp(max_batch_size=32, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port={port}, generate_client_file=False, log_level="error")
"""
