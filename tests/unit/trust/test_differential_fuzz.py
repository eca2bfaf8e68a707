"""Our client against python-tuf's own: the same repository, one node of one file changed, and both are asked.

    python -m tests.unit.trust.test_differential_fuzz --cases 20000 --seed 7

Three properties. Nothing else than our own refusals comes out. Nothing is accepted, and nothing kept, that the oracle
refuses, outside of LENIENT. What we refuse and the oracle accepts is refused for a reason that STRICTER names.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import msgspec
import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from shared.errors import OutriderError, TransferError, TrustError
from shared.trust.client import Client, Steps
from shared.trust.library import TargetFile
from shared.wire.verification import Keep, Need
from tests.fakes.mutations import mutate
from tests.fakes.tuf_repository import NOW, PATHS, TufRepository

R = TypeVar("R")

BASE: Final = "https://hub/metadata/"
CASES: Final = 250
"""For each seed of a run of the test suite."""
NOW_MS: Final = int(NOW.timestamp() * 1000)

LENIENT: Final[dict[str, str]] = {
    "BadVersionNumberError": "5.3.11: new keys of timestamp or snapshot delete both files, so that no version in them "
    "binds the new ones; python-tuf drops only the one whose signature no longer holds. Our floors, which the fuzz "
    "leaves out, bind in both cases",
    "New snapshot is missing info": "the same: the old snapshot is no base for comparison any more",
    "snapshot was signed by": "the same: python-tuf keeps a stored timestamp of an equal version, and wants the "
    "snapshot of the old keys that it names; we go by the one that is served, signed with the new keys",
}
"""What we accept and python-tuf refuses, by a part of its words, with the reason; only after such a change of keys."""

STRICTER: Final[dict[str, str]] = {
    "does not parse": "the strict parser and the types of all fields come before tuf.api, which converts some lazily",
    "is not the file that the newer metadata names": "python-tuf takes a stored snapshot of the promised version "
    "without looking at its digest; we ask for the promised file, and refuse another one",
    "is promised": "after a change of keys (5.3.11) no stored snapshot is left to take, and the one that is served has "
    "another version; python-tuf still takes the stored one",
    "roles would have to be asked": "python-tuf says 'not found' where it gives up a search; so do we, as a refusal",
}
"""What we refuse and python-tuf accepts, by a part of our words, with the reason."""


class Outcome(msgspec.Struct, frozen=True):
    """What a client said of each target it was asked for (`ok:<digest>`, `none`, `no`), why, and what it has kept.

    `dropped`: ours removed what replaced keys had signed. `roots`: every root that the oracle has kept.
    """

    answers: tuple[str, ...]
    why: str
    kept: dict[str, bytes]
    dropped: bool = False
    crash: str = ""
    roots: frozenset[bytes] = frozenset()


class Memory(FetcherInterface):
    """Serves these files to the oracle."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self.files.get(unquote(url.removeprefix(BASE)), self.files.get(url.removeprefix(BASE)))
        if data is None:
            raise DownloadHTTPError("missing", 404)
        yield data


class Case(msgspec.Struct, frozen=True):
    """One question to both: where they start, what is served first (honestly) and now, and what is looked for."""

    name: str
    first_root: bytes
    before: dict[str, bytes] | None
    now: dict[str, bytes]
    paths: tuple[str, ...]


def make_case(rng: random.Random) -> Case:
    """A repository with a past, and one odd node in what it serves now."""
    repository = TufRepository(rng)
    for _ in range(rng.randrange(3)):
        repository.step()
    role, file = rng.choice(repository.current())
    document: dict[str, Any] = json.loads(repository.files[file])
    for _ in range(rng.choice([1, 1, 1, 2])):
        document = mutate(document, rng, part="signatures" if rng.random() < 0.1 else "signed")
    if rng.random() < 0.8 and isinstance(document.get("signed"), dict):
        data = repository.resign(role, document)
    else:
        data = json.dumps(document).encode()
    before = rng.choice(repository.history[:-1]) if len(repository.history) > 1 and rng.random() < 0.7 else None
    return Case(
        name=f"{repository.shape}: {file}",
        first_root=repository.first_root,
        before=before,
        now={**repository.history[-1], file: data},
        paths=tuple(rng.sample(PATHS, 3)),
    )


def ask_ours(case: Case) -> Outcome:
    """Our client, its cache filled by an honest refresh before if the case has one."""
    run = OurRun(case.first_root, {})
    if case.before is not None:
        run.ask(case.before, case.paths)
        run = OurRun(run.root, run.cache)
    try:
        answers, why = run.ask(case.now, case.paths)
    except Exception as error:  # a crash is what this looks for
        return Outcome((), "", {}, crash=f"{type(error).__name__}: {error}")
    return Outcome(answers, why, run.kept, dropped=run.dropped)


class OurRun:
    """One run of our client over a dict; `kept` is what it handed out, `cache` what lies there after that."""

    def __init__(self, root: bytes, cache: dict[str, bytes]) -> None:
        self.root, self.cache = root, dict(cache)
        self.kept: dict[str, bytes] = {}
        self.dropped = False
        self._client = Client(root=root, cache=self.cache, floors={})

    def ask(self, files: dict[str, bytes], paths: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
        """Refresh and look for all the paths; returns the answers and the last refusal."""
        why = ""
        try:
            self._drive(self._client.follow_roots(), files)
            self._drive(self._client.refresh(now_ms=NOW_MS), files)
            self._drive(self._client.load_targets(), files)
        except (TrustError, TransferError) as error:
            return ("no",) * len(paths), f"{error.code}: {error.message}"
        answers = []
        for path in paths:
            try:
                found = self._drive(self._client.find(path), files)
                answers.append(said(None if found is None else found.target))
            except (TrustError, TransferError) as error:
                answers.append("no")
                why = f"{error.code}: {error.message}"
        assert all(value > 0 for value in self._client.floors().values())
        return tuple(answers), why

    def _drive(self, steps: Steps[R], files: dict[str, bytes]) -> R:
        answer: bytes | None = None
        try:
            while True:
                step = steps.send(answer)
                answer = None
                match step:
                    case Need():
                        found = files.get(step.name)
                        answer = None if found is None else found[: step.max_bytes + 1]
                    case Keep():
                        self._keep(step)
        except StopIteration as end:
            result: R = end.value
            return result

    def _keep(self, step: Keep) -> None:
        self.dropped = self.dropped or bool(step.drops)
        for role in step.drops:
            self.cache.pop(role, None)
        self.kept[step.role] = step.data
        if step.role == "root":
            self.root = step.data
        else:
            self.cache[step.role] = step.data


def ask_oracle(case: Case) -> Outcome:
    """python-tuf's client, at the same moment, from the same past."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        directory = Path(name)
        if case.before is not None:
            run_oracle(directory, case.before, case.first_root, case.paths)
        answers, why = run_oracle(directory, case.now, case.first_root, case.paths)
        kept = {unquote(path.name.removesuffix(".json")): path.read_bytes() for path in directory.glob("*.json")}
        roots = frozenset(path.read_bytes() for path in (directory / "root_history").iterdir())
        return Outcome(answers, why, kept, roots=roots)


def run_oracle(
    directory: Path, files: dict[str, bytes], root: bytes, paths: tuple[str, ...]
) -> tuple[tuple[str, ...], str]:
    """One run of it. Its crashes on odd input count as refusals; they are known and not ours to mend."""
    why = ""
    try:
        updater = Updater(str(directory), BASE, str(directory), BASE, fetcher=Memory(files), bootstrap=root)
        updater._trusted_set.reference_time = NOW
        updater.refresh()
    except (RepositoryError, DownloadError, TypeError, AttributeError, ValueError, KeyError) as error:
        return ("no",) * len(paths), f"{type(error).__name__}: {error}"
    answers = []
    for path in paths:
        try:
            answers.append(said(updater.get_targetinfo(path)))
        except (RepositoryError, DownloadError, TypeError, AttributeError, ValueError, KeyError) as error:
            answers.append("no")
            why = f"{type(error).__name__}: {error}"
    return tuple(answers), why


def said(target: TargetFile | None) -> str:
    """A found target as a word."""
    return "none" if target is None else f"ok:{target.length}:{sorted(target.hashes.items())}"


def disagreement(ours: Outcome, oracle: Outcome) -> str:
    """What is wrong about the two outcomes together; empty when nothing is."""
    if ours.crash:
        return f"crash: {ours.crash}"
    may_differ = ours.dropped and any(part in oracle.why for part in LENIENT)
    for mine, theirs in zip(ours.answers, oracle.answers, strict=True):
        if mine == theirs:
            continue
        if mine != "no" and not may_differ:
            return f"we say {mine}, the oracle {theirs}: {oracle.why}"
        if mine == "no" and theirs != "none" and not any(part in ours.why for part in STRICTER):
            return f"we refuse for no listed reason: {ours.why}"
    for role, data in ours.kept.items():
        is_kept = data in oracle.roots if role == "root" else oracle.kept.get(role) == data
        if not is_kept and not may_differ:
            return f"we keep {role}, which the oracle does not: {oracle.why}"
    return ""


def run(seed: int, cases: int) -> Counter[str]:
    """Ask both this often; raises AssertionError at the first disagreement, naming the case."""
    seen: Counter[str] = Counter()
    for number in range(cases):
        case = make_case(random.Random(f"{seed}/{number}"))
        ours, oracle = ask_ours(case), ask_oracle(case)
        wrong = disagreement(ours, oracle)
        assert not wrong, f"seed {seed}, case {number}, {case.name}: {wrong}"
        for mine, theirs in zip(ours.answers, oracle.answers, strict=True):
            seen[f"{mine.partition(':')[0]}/{theirs.partition(':')[0]}"] += 1
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_accepted_that_the_oracle_refuses(seed: int) -> None:
    seen = run(seed, CASES)
    for pair in ("ok/ok", "none/none", "no/no"):
        assert seen[pair] > CASES // 10, seen


def test_every_refusal_is_one_of_ours() -> None:
    """The oracle's words are no part of what an operator sees."""
    assert issubclass(TrustError, OutriderError)
    assert all(reason for reason in (*LENIENT.values(), *STRICTER.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(dict(run(given.seed, given.cases)))
    sys.exit(0)
