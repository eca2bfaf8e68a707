"""What happens when modules are imported: nothing. And what the daemon carries: nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.checks.sources import read_sources

ROOT = Path(__file__).resolve().parents[2]

HEAVY = (
    "numpy", "onnx", "onnxruntime", "ai_edge_litert", "fastapi", "starlette", "sqlalchemy", "alembic", "pydantic",
    "flwr", "cryptography", "tuf", "securesystemslib", "uvicorn", "shared.trust", "shared.tensors", "shared.patch",
    "cloud_hub",
)  # fmt: skip
DAEMON = ("edge_agent.__main__", "edge_agent.main", "edge_agent.driver", "edge_agent.config")
MAX_IMPORTED_RSS_KIB = 35 * 1024

WATCH = """
import importlib, json, sys, threading
acts = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.fork", "os.posix_spawn", "sqlite3.connect"):
        acts.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        acts.append(f"{event} {arguments[0]!r}")
sys.dont_write_bytecode = True
sys.addaudithook(watch)
failed = {}
for name in sys.argv[1].split():
    before, count = list(acts), threading.active_count()
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
    if acts != before or threading.active_count() != count:
        failed[name] = f"did {acts[len(before):]}, threads {count} -> {threading.active_count()}"
rss = next((int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")), 0)
print(json.dumps({"failed": failed, "modules": sorted(sys.modules), "rss_kib": rss}))
"""


def import_in_child(names: list[str], cwd: Path) -> dict[str, Any]:
    """What importing these modules in a fresh process did."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", WATCH, " ".join(names)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_importing_any_module_does_nothing(tmp_path: Path) -> None:
    names = [source.name for source in read_sources(ROOT)]
    importable = [name for name in names if ".migrations" not in name and name.isidentifier() | ("." in name)]
    assert import_in_child(importable, tmp_path)["failed"] == {}


def test_the_daemon_loads_nothing_heavy(tmp_path: Path) -> None:
    present = {source.name for source in read_sources(ROOT, ("edge_agent",))}
    report = import_in_child([name for name in DAEMON if name in present], tmp_path)
    assert report["failed"] == {}
    assert [name for name in HEAVY if name in report["modules"]] == []
    assert report["rss_kib"] < MAX_IMPORTED_RSS_KIB


def test_the_watch_sees_heavy_libraries_and_acts(tmp_path: Path) -> None:
    report = import_in_child(["numpy"], tmp_path)
    assert "numpy" in report["modules"]
    assert import_in_child(["antigravity_that_is_not_there"], tmp_path)["failed"] != {}
