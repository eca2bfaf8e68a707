"""The documents are true: links resolve, commands exist with the flags shown, pages agree with the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.checks import bench, limits_page

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "firmware_profiles").glob("*.md")])
PROGRAMS = {
    "outrider-agent": "edge_agent.__main__",
    "outrider-hub": "cloud_hub.__main__",
    "outrider": "cloud_hub.cli.__main__",
}
SUFFIXES = {".py", ".md", ".toml", ".sh", ".txt", ".lock", ".json", ""}
FORBIDDEN = re.compile(r"/(work|root|home/\w+)/|\b(TODO|FIXME)\b")

HELP = """
import contextlib, importlib, io, json, sys
answers = {}
for words in json.loads(sys.argv[2]):
    out = io.StringIO()
    sys.argv[:] = [sys.argv[0], *words, "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = importlib.import_module(MODULE).main()
    except SystemExit as end:
        code = end.code
    answers[" ".join(words)] = [code or 0, out.getvalue()]
print(json.dumps(answers))
"""


def blocks(text: str) -> list[str]:
    """The lines of a document's code blocks that are commands, without prompts and comments."""
    lines = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in {"sh", "console", "bash"}:
            lines += [line.removeprefix("$ ").split("  #")[0].strip() for line in body.splitlines()]
    return [line for line in lines if line]


def shown_commands() -> list[tuple[str, tuple[str, ...], str]]:
    """Program, subcommand words and the whole line of every command of ours that a document shows."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        inline = re.findall(r"`((?:outrider|outrider-agent|outrider-hub) [^`]+)`", text)
        for line in [*blocks(text), *inline]:
            program, *words = line.split()
            if program in PROGRAMS:
                taken = []
                for word in words:
                    if not re.fullmatch(r"[a-z][a-z-]*", word):
                        break
                    taken.append(word)
                found.append((program, tuple(taken), line))
    return found


def helps(program: str, commands: list[tuple[str, ...]]) -> dict[str, tuple[int, str]]:
    """Exit code and text of `--help` for each command, from one process."""
    source = HELP.replace("MODULE", repr(PROGRAMS[program]))
    done = subprocess.run(
        [sys.executable, "-c", source, program, json.dumps(commands)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {words: (code, text) for words, (code, text) in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_that_a_document_shows_exists_with_its_flags(program: str) -> None:
    shown = [(words, line) for name, words, line in shown_commands() if name == program]
    assert shown, f"no document shows {program}"
    wanted = sorted({words[:n] for words, _ in shown for n in range(1, len(words) + 1)})
    answers = helps(program, [*wanted])
    for words, line in shown:
        code, text = answers[" ".join(words)] if words else (0, "")
        assert code == 0, f"`{line}`: {text}"
        for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", line):
            assert re.search(rf"{flag}\b", text), f"`{line}`: {flag} is not among the options of {words}"


def test_a_command_that_does_not_exist_is_noticed() -> None:
    code, _ = helps("outrider", [("surprise",)])["surprise"]
    assert code != 0


def test_every_script_that_a_document_names_is_executable() -> None:
    named = {name for path in DOCUMENTS for name in re.findall(r"\bscripts/([a-z]+)(?=[\s`,;)])", path.read_text())}
    assert {"demo", "test", "check", "bench", "lock"} <= named
    for name in named - {"checks"}:
        assert shutil.which(str(ROOT / "scripts" / name)), f"scripts/{name} is not executable or not there"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{target} does not exist"


def test_every_path_that_the_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`((?:shared|edge_agent|cloud_hub|scripts|tests|firmware_profiles|docs)/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), f"{name} does not exist"


def tracked() -> list[Path]:
    """The project's own files: what git tracks, or everything outside the ignored folders where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        ignored = {".venv", ".cache", ".git", "__pycache__", ".mypy_cache", ".ruff_cache"}
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if not ignored & set(path.relative_to(ROOT).parts)]
    return [ROOT / name for name in names if name.suffix in SUFFIXES and (ROOT / name).is_file()]


def test_no_file_holds_a_path_of_somebodys_machine_or_unfinished_business() -> None:
    itself = Path(__file__).resolve()
    rules = ROOT / "scripts" / "checks" / "rules.py"
    for path in tracked():
        if path in (itself, rules, ROOT / "tests" / "house" / "test_rules.py"):
            continue
        found = FORBIDDEN.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)} holds {found.group()!r}"


def test_a_path_of_a_machine_is_noticed() -> None:
    assert FORBIDDEN.search("see /wo" + "rk/main/README.md")


def test_the_page_of_limits_is_what_the_code_says() -> None:
    assert limits_page.PAGE.read_text() == limits_page.render(), "run: python -m scripts.checks.limits_page"


def test_the_index_of_decisions_lists_every_record() -> None:
    records = sorted(path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert re.findall(r"\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs" / "adr" / "README.md").read_text()) == records


def test_the_change_log_starts_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version


def test_the_architecture_fits_on_two_pages() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 110


def test_the_bench_runner_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == bench.names()
    assert bench.main(["no-such-benchmark"]) == 2
    assert set(bench.machine()) == {"cpu", "cores", "python", "kernel"}
