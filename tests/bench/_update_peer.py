"""The peers of the updates benchmark, bsdiff4 and zstd, in an environment of their own under `.cache/peers`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path(__file__).resolve().parents[2]
NEEDS: Final = ("bsdiff4==1.3.2", "zstandard==0.25.0")
INSTALL_S: Final = 300

_PROGRAM: Final = """
import json, sys, time
import bsdiff4, zstandard
old, new = (open(path, "rb").read() for path in sys.argv[1:3])
began = time.perf_counter()
patch = bsdiff4.diff(old, new)
took = time.perf_counter() - began
print(json.dumps({"patch": len(patch), "took_s": took, "zstd": len(zstandard.compress(new, 19))}))
"""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """What the peers made of a pair: bytes of bsdiff4's patch and its time, and of the new file with zstd -19."""

    patch: int
    took_s: float
    zstd: int


def measure(old: Path, new: Path) -> Peer:
    """Have the peers work on a pair; raises CalledProcessError when they cannot be installed."""
    done = subprocess.run(
        [str(_python()), "-I", "-c", _PROGRAM, str(old), str(new)], check=True, capture_output=True, timeout=INSTALL_S
    )
    return msgspec.convert(json.loads(done.stdout), Peer)


def _python() -> Path:
    home = ROOT / ".cache" / "peers" / "bsdiff4"
    mark = home / "outrider-requirements.txt"
    if not mark.exists() or mark.read_text() != "\n".join(NEEDS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True)
        pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *NEEDS], check=True, capture_output=True, timeout=INSTALL_S)
        mark.write_text("\n".join(NEEDS))
    return home / "bin" / "python"
