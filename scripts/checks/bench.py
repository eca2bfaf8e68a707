"""The benchmark runner: `tests/bench/<name>.py` offers `run() -> dict[str, float]`; this prints and writes figures."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def names() -> list[str]:
    """The benchmarks that exist, sorted: every module of tests/bench whose name has no underscore in front."""
    return sorted(path.stem for path in (ROOT / "tests" / "bench").glob("[!_]*.py"))


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                cpu = value.strip()
                break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; 1 when one fails, 2 for a name that does not exist."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Ratios against raw limits and peers.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write one JSON line per benchmark")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    options = parser.parse_args(arguments)
    known = names()
    if options.list:
        print("\n".join(known))
        return 0
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"bench: no benchmark {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed, lines = [], []
    for name in options.names or known:
        try:
            figures: dict[str, float] = importlib.import_module(f"tests.bench.{name}").run()
        except Exception as error:  # one benchmark that cannot run must not hide the figures of the others
            print(f"{name}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        print(f"{name}")
        for key, value in figures.items():
            print(f"  {key:32} {value:>14,.4g}")
        lines.append(json.dumps({"bench": name, "figures": figures, "machine": machine()}))
    if options.json is not None:
        options.json.write_text("".join(line + "\n" for line in lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
