"""The rules of the house that only the syntax tree shows; each returns its violations as `path:line: what`.

The rules about who may import whom across rooms are import-linter contracts in pyproject.toml; those about one
expression are ruff's. tests/house plants a violation of each rule, so that none can stop working unnoticed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from scripts.checks.sources import Source, imports_of

SINGLE_IMPORTERS: Final[Mapping[str, tuple[str, ...]]] = {
    "paho": (
        "edge_agent.adapters.courier",
        "cloud_hub.ground.courier",
        "cloud_hub.ground.access",  # comes in as a revoked device, for a moment, which the courier never does
    ),
    "sqlite3": ("edge_agent.adapters.database", "cloud_hub.ground.database"),
    "onnxruntime": (
        "edge_agent.runtimes.onnx",
        "cloud_hub.onnx_library",
        "cloud_hub.releases.builder",  # its quantizer, after the library was told to be silent
    ),
    "ai_edge_litert": ("edge_agent.runtimes.litert",),
    "tflite_runtime": ("edge_agent.runtimes.litert",),
    "onnx": ("cloud_hub.releases.*", "cloud_hub.rounds.head"),
    "fastapi": ("cloud_hub.*",),
    "starlette": ("cloud_hub.*",),
    "uvicorn": ("cloud_hub.*",),
    "sqlalchemy": ("cloud_hub.*",),
    "alembic": ("cloud_hub.ground.*",),
    "psycopg": (),  # SQLAlchemy's, where it is installed
    "prometheus_client": ("cloud_hub.ground.metrics",),
    "cryptography": (
        "shared.trust.*",
        "cloud_hub.ground.*",
        "cloud_hub.cli.*",
        "edge_agent.certificates",  # for enrolment and renewal, a command and a child
        "edge_agent.commands.checks",
    ),
    "tuf": ("shared.trust.*",),
    "securesystemslib": ("shared.trust.*",),
    "flwr": (
        "cloud_hub.rounds.grid",
        "cloud_hub.rounds.replies",
        "cloud_hub.rounds.strategies",
        "cloud_hub.rounds.worker",
    ),
    "ray": (),
}
"""Who may import a heavy library; `x.*` is x and everything below it."""

OPTIONAL: Final = frozenset(
    {"onnxruntime", "ai_edge_litert", "tflite_runtime", "onnx", "psycopg", "flwr", "ray", "sklearn"}
)
"""Libraries of extras that may be missing: imported inside the function that needs them."""

MAX_FILE_LINES: Final = 500
MAX_FUNCTION_LINES: Final = 60
MAX_CLASS_METHODS: Final = 20
SIZE_EXCEPTIONS: Final[Mapping[str, str]] = {}
"""`path` or `path::Class.function` to the reason why it may be larger. May only shrink."""

CONSTANT_MAKERS: Final = frozenset(
    {
        "re.compile", "struct.Struct", "Struct", "frozenset", "tuple", "NewType", "TypeVar", "ParamSpec",
        "MappingProxyType", "sa.MetaData", "sa.Table",
        "msgspec.msgpack.Encoder", "msgspec.msgpack.Decoder", "msgspec.json.Encoder", "msgspec.json.Decoder",
        "logging.getLogger", "getLogger", "ContextVar", "int", "bytes", "str", "float", "timedelta", "datetime",
    }
)  # fmt: skip
"""Calls whose result is a constant or a compiled codec. Anything else called at import is declared `Final`."""

MUTABLE_MAKERS: Final = frozenset(
    {"dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "Queue", "Lock", "Event"}
)
FORBIDDEN_NAMES: Final = re.compile(r"(Manager|Helper|Helpers|Utils|Util|Base|Impl|Handler)$")
FORBIDDEN_STEMS: Final = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"})
TASK_OWNERS: Final = re.compile(r"(group|tasks)$")
ROOMS_SHARED_FACE: Final = ("desk",)


def single_importers(sources: Iterable[Source]) -> Iterator[str]:
    """A heavy library is imported by the modules named for it and by no other."""
    for source in sources:
        for found in imports_of(source):
            allowed = SINGLE_IMPORTERS.get(found.target.split(".")[0])
            if allowed is not None and not found.typing_only and not any(_covers(p, source.name) for p in allowed):
                yield f"{source.path}:{found.line}: {found.target} may only be imported by {allowed or 'nobody yet'}"


def optional_inside_functions(sources: Iterable[Source]) -> Iterator[str]:
    """A library that may be missing is imported where it is used, never when a module loads."""
    for source in sources:
        for found in imports_of(source):
            if found.target.split(".")[0] in OPTIONAL and not found.in_function and not found.typing_only:
                yield f"{source.path}:{found.line}: import {found.target} inside the function that needs it"


def no_work_at_import(sources: Iterable[Source]) -> Iterator[str]:
    """A module's top level declares; it does not call, loop or try."""
    for source in sources:
        if source.path.name == "__main__.py" or "migrations" in source.path.parts:
            continue
        for node in source.tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.If) and re.search(r"TYPE_CHECKING|__name__|sys\.platform", ast.unparse(node.test)):
                continue
            if isinstance(node, ast.Expr | ast.For | ast.While | ast.With | ast.Try | ast.If):
                yield f"{source.path}:{node.lineno}: work at import: {ast.unparse(node).splitlines()[0][:60]}"


def no_module_singletons(sources: Iterable[Source]) -> Iterator[str]:
    """Nothing mutable lives at the top of a module; a constant container or object says so with `Final`."""
    for source in sources:
        if "migrations" in source.path.parts:
            continue
        for node in source.tree.body:
            if isinstance(node, ast.AnnAssign) and "Final" in ast.unparse(node.annotation):
                if isinstance(node.value, ast.Call) and _last(node.value.func) in MUTABLE_MAKERS:
                    yield f"{source.path}:{node.lineno}: {ast.unparse(node.target)} is mutable state of the module"
                continue
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                if target not in {"__all__", "__slots__"} and _is_state(node.value):
                    yield f"{source.path}:{node.lineno}: {target} is an object of the module; declare a constant Final"
        for inner in ast.walk(source.tree):
            if isinstance(inner, ast.Global):
                yield f"{source.path}:{inner.lineno}: global {', '.join(inner.names)}"


def sizes(sources: Iterable[Source], exceptions: Mapping[str, str] = SIZE_EXCEPTIONS) -> Iterator[str]:
    """Files, functions and classes stay within the budget; an exception that is no longer needed is one too."""
    over: dict[str, str] = {}
    for source in sources:
        if "migrations" in source.path.parts:  # written once, in one piece, and never changed
            continue
        if len(source.lines) > MAX_FILE_LINES:
            over[str(source.path)] = f"{len(source.lines)} lines, at most {MAX_FILE_LINES}"
        for name, node in _definitions(source.tree, ()):
            place = f"{source.path}::{name}"
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)
                if methods > MAX_CLASS_METHODS:
                    over[place] = f"{methods} methods, at most {MAX_CLASS_METHODS}"
            else:
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    over[place] = f"{length} lines, at most {MAX_FUNCTION_LINES}"
    yield from (f"{place}: {what}" for place, what in over.items() if place not in exceptions)
    yield from (f"{place}: listed as an exception and no longer one" for place in exceptions if place not in over)


def tasks_have_owners(sources: Iterable[Source]) -> Iterator[str]:
    """`create_task` is called on a task group only, so that every task is awaited and its failure is heard."""
    for source in sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            if _last(node.func) == "ensure_future":
                yield f"{source.path}:{node.lineno}: a task needs an owner: use the task group"
            if _last(node.func) == "create_task":
                receiver = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
                if not TASK_OWNERS.search(receiver):
                    yield f"{source.path}:{node.lineno}: a task needs an owner: {ast.unparse(node.func)}"


def broad_handlers_say_why(sources: Iterable[Source]) -> Iterator[str]:
    """`except Exception` (or wider) raises again, or has a comment with the reason: on its line, above or below."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                broad = node.type is None or re.search(r"\b(Base)?Exception\b(?!Group)", caught)
                around = (source.line(node.lineno + step).lstrip() for step in (-1, 1))
                beside = source.line(node.lineno) + "".join(line for line in around if line.startswith("#"))
                comment = re.sub(r"#\s*(noqa|type:|pragma)\S*(\s*[A-Z]+\d+,?)*", "", beside).partition("#")[2]
                raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if broad and not raises_again and len(comment.strip()) < 10:
                    yield f"{source.path}:{node.lineno}: except {caught or '(bare)'} without the reason beside it"


def environment_in_config_only(sources: Iterable[Source]) -> Iterator[str]:
    """The environment is read in `config.py`; elsewhere only `__main__` hands it over. Setting is not reading."""
    for source in sources:
        if source.path.name in {"config.py", "__main__.py"}:
            continue
        set_here = {
            id(node.value)
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(source.tree):
            if (
                id(node) not in set_here
                and isinstance(node, ast.Attribute)
                and ast.unparse(node) in {"os.environ", "os.getenv", "os.environb"}
            ):
                yield f"{source.path}:{node.lineno}: {ast.unparse(node)} outside config.py"


def clocks_in_system_only(sources: Iterable[Source]) -> Iterator[str]:
    """The clock is read by the two `system` modules; everyone else is given one."""
    pattern = re.compile(r"time\.(time|monotonic)(_ns)?|datetime\.(datetime\.)?(now|utcnow|today)")
    for source in sources:
        if source.name.rpartition(".")[2] == "system":
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and pattern.fullmatch(ast.unparse(node)):
                yield f"{source.path}:{node.lineno}: {ast.unparse(node)}: take a Clock"


def rooms_meet_at_desks(sources: Iterable[Source]) -> Iterator[str]:
    """A room of the hub reaches another through its desk; the ground knows no room; the command line knows none."""
    rooms = {s.name.split(".")[1] for s in sources if re.fullmatch(r"cloud_hub\.\w+\.desk", s.name)}
    for source in sources:
        parts = source.name.split(".")
        if parts[0] != "cloud_hub" or len(parts) < 3:
            continue
        here = parts[1]
        for found in imports_of(source):
            there = found.target.split(".")
            if there[0] != "cloud_hub" or len(there) < 2 or there[1] == here or "migrations" in parts:
                continue
            if here == "cli" and there[1] in {*rooms, "composition", "ground", "main"}:
                yield f"{source.path}:{found.line}: the command line speaks REST only, it imported {found.target}"
            elif there[1] in rooms and here in rooms and (len(there) < 3 or there[2] not in ROOMS_SHARED_FACE):
                yield f"{source.path}:{found.line}: {here} reads {found.target}; rooms meet desk to desk"
            elif there[1] in rooms and here == "ground" and source.name != "cloud_hub.ground.switchboard":
                yield f"{source.path}:{found.line}: the ground knows no room, it imported {found.target}"


def names_are_nouns(sources: Iterable[Source]) -> Iterator[str]:
    """No Manager, Helper, Utils, Base, Impl, Handler: a thing is called what it is."""
    for source in sources:
        if source.path.stem in FORBIDDEN_STEMS:
            yield f"{source.path}:1: a module is named for its subject"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and FORBIDDEN_NAMES.search(node.name):
                yield f"{source.path}:{node.lineno}: class {node.name}: call it what it is"


def modules_say_what_they_are(sources: Iterable[Source]) -> Iterator[str]:
    """Every module and every public class and function has a docstring."""
    for source in sources:
        if not ast.get_docstring(source.tree):
            yield f"{source.path}:1: a module's docstring says what it is, its rules, and what is not here"
        for node in source.tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{source.path}:{node.lineno}: {node.name} has no docstring"


def no_stand_ins(sources: Iterable[Source]) -> Iterator[str]:
    """The product holds nothing unfinished: no TODO, no mock, no method that only says it is missing."""
    for source in sources:
        for number, line in enumerate(source.lines, start=1):
            if re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b|unittest\.mock", line):
                yield f"{source.path}:{number}: unfinished: {line.strip()[:60]}"


def modules_have_tests(sources: Iterable[Source], tests: Path) -> Iterator[str]:
    """Every module of `shared` and of the agent's core is imported by a test (a `test_*.py` below tests)."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py"))
    for source in sources:
        guarded = source.name.startswith(("shared.", "edge_agent.core."))
        if not guarded or source.path.name == "__init__.py":
            continue
        package, _, stem = source.name.rpartition(".")
        direct = rf"(from|import) {re.escape(source.name)}\b"
        member = rf"from {re.escape(package)} import [^\n]*\b{stem}\b"
        if not re.search(rf"{direct}|{member}", text):
            yield f"{source.path}:1: no test imports {source.name}"


RULES: Final[tuple[Callable[[list[Source]], Iterator[str]], ...]] = (
    single_importers,
    optional_inside_functions,
    no_work_at_import,
    no_module_singletons,
    sizes,
    tasks_have_owners,
    broad_handlers_say_why,
    environment_in_config_only,
    clocks_in_system_only,
    rooms_meet_at_desks,
    names_are_nouns,
    modules_say_what_they_are,
    no_stand_ins,
)


def _covers(pattern: str, name: str) -> bool:
    if pattern.endswith(".*"):
        return name == pattern[:-2] or name.startswith(pattern[:-1])
    return name == pattern


def _last(node: ast.expr) -> str:
    return ast.unparse(node).split("[")[0].rpartition(".")[2] if isinstance(node, ast.Name | ast.Attribute) else ""


def _is_state(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if not isinstance(value, ast.Call):
        return False
    made_by = re.sub(r"\[.*\]$", "", ast.unparse(value.func), flags=re.DOTALL)
    return made_by not in CONSTANT_MAKERS


def _definitions(
    tree: ast.AST, outer: tuple[str, ...]
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ".".join((*outer, node.name)), node
            yield from _definitions(node, (*outer, node.name))
        else:
            yield from _definitions(node, outer)
