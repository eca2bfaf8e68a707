"""The command line: runs seeds, and says which one failed, how, and how to see it again.

python -m tests.sim --seeds 0..2000                     the usual profile, in which the seed chooses
python -m tests.sim --seeds 0..500 --profile power
python -m tests.sim --seeds 17 --profile power --trace  one seed, with what happened
python -m tests.sim --seeds 0..2000 --fault no_sync     whether a planted fault is caught, and how soon
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.sim.faults import FAULTS
from tests.sim.parts import Parts
from tests.sim.profiles import PROFILES
from tests.sim.run import HONEST, Outcome, run
from tests.sim.truth import Aftermath


def main(arguments: list[str]) -> int:
    """Run; 0 when every property held in every seed, 1 otherwise, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    honest = replace(HONEST, truth=Aftermath) if options.aftermath else HONEST
    if not options.fault:
        return _run(options, honest)
    with FAULTS[options.fault].planted(honest) as parts:
        return _run(options, parts)


def _run(options: argparse.Namespace, parts: Parts) -> int:
    began, failed, total = time.process_time(), [], Counter[str]()
    seeds: range = options.seeds
    ran = 0
    for seed in seeds:
        outcome = run(options.profile, seed, parts=parts, traced=options.trace)
        ran += 1
        total.update(outcome.figures)
        if options.trace:
            print("\n".join(outcome.trace))
        if outcome.violation is not None:
            failed.append(outcome)
            print(f"seed {seed} of {outcome.profile} ({outcome.world_profile}): {outcome.violation}")
            print(f"  see it again: {command_for(outcome, fault=options.fault)}", flush=True)
            if len(failed) >= options.most:
                break
    took_s = max(time.process_time() - began, 1e-9)
    print(f"{ran} seeds of {options.profile}, {len(failed)} failed, {ran / took_s:.0f} a second of processor time")
    if options.json is not None:
        options.json.write_text(json.dumps(report(options, ran, took_s, failed, total), indent=1) + "\n")
    return 1 if failed else 0


def command_for(outcome: Outcome, *, fault: str = "") -> str:
    """The command that replays this seed with its trace."""
    planted = f" --fault {fault}" if fault else ""
    return f"python -m tests.sim --seeds {outcome.seed} --profile {outcome.profile}{planted} --trace"


def report(
    options: argparse.Namespace, seeds: int, took_s: float, failed: list[Outcome], total: Counter[str]
) -> dict[str, object]:
    """The document that `--json` writes."""
    return {
        "profile": options.profile,
        "seeds": seeds,
        "seeds_per_second": round(seeds / took_s, 1),
        "failed": [
            {
                "seed": outcome.seed,
                "profile": outcome.profile,
                "property": outcome.name,
                "violation": outcome.violation,
                "replay": command_for(outcome, fault=options.fault),
            }
            for outcome in failed
        ],
        "figures": dict(sorted(total.items())),
    }


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    try:
        seeds = range(int(first), int(last) if dots else int(first) + 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor FROM..TO") from error
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} holds no seed")
    return seeds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description="The whole house in one process, by seeds."
    )
    parser.add_argument("--seeds", type=_seeds, required=True, metavar="FROM..TO", help="TO is not run; or one seed")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="mixed", help="what may go wrong")
    parser.add_argument("--fault", choices=sorted(FAULTS), default="", help="plant this fault")
    parser.add_argument("--aftermath", action="store_true", help="look only at what is at the hub in the end")
    parser.add_argument("--trace", action="store_true", help="say what happens")
    parser.add_argument("--most", type=int, default=1, metavar="N", help="stop after so many seeds have failed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
