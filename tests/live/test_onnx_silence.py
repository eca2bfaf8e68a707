"""ONNX Runtime sends nothing home and leaves nothing below the home directory, whoever of us imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "code",
    [
        "from edge_agent.runtimes.onnx import require; require()",
        "from cloud_hub.onnx_library import onnxruntime; onnxruntime()",
    ],
)
def test_importing_the_runtime_writes_nothing_below_home(tmp_path: Path, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == []
