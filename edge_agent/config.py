"""The agent's configuration: typed, read once, complete before anything starts.

Later sources win: defaults < TOML file (`<state>/agent.toml`) < environment (`OUTRIDER_AGENT_…`, `__` for nesting)
< flags. All problems are reported at once; an unknown key is one, with the nearest known key. No key holds a secret:
those live in files below `identity/`; what looks like one in a value is masked when it is shown.

This is the only module of the agent that reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.identity import check_hub_url, masked_url
from edge_agent.settings import AgentConfig
from shared.errors import ConfigError, InvalidValue

CONFIG_NAME: Final = "agent.toml"
ENV_PREFIX: Final = "OUTRIDER_AGENT_"
MAX_SOCKET_PATH_BYTES: Final = 107
"""What `sockaddr_un` holds on Linux, without the final zero."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key with its value and where that came from (`default`, the file, the variable, the flag)."""

    key: str
    value: object
    origin: str

    def shown(self) -> str:
        """The value for people: TOML, with credentials in a URL masked."""
        if isinstance(self.value, str):
            return f'"{masked_url(self.value)}"'
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The configuration and where each value came from, in the order of the keys."""

    config: AgentConfig
    settings: tuple[Setting, ...]


def default_state_dir() -> Path:
    """`/var/lib/outrider-agent` for root, below the home directory otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/outrider-agent")
    return Path.home() / ".local" / "state" / "outrider-agent"


def daemon_environment() -> dict[str, str]:
    """What the daemon sees of the environment: everything but our own settings, which it was given already.

    One heap for all threads (mallopt(3), M_ARENA_MAX): the daemon's threads wait for disk and network, and a heap for
    each would keep a megabyte that nobody uses.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return {**kept, "MALLOC_ARENA_MAX": "1"}


def load_config(
    *,
    state_dir: str | None = None,
    file: str | None = None,
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read all sources and check everything.

    Args:
        state_dir: from `--state`.
        file: from `--config`; must exist when given. Otherwise `<state>/agent.toml` is read where it exists.
        flags: other flags by key (`log.level`), as text.
        environ: the environment; the process's own when None.

    Raises:
        ConfigError: with every problem, one per line.
    """
    variables = os.environ if environ is None else environ
    known = _known_keys()
    problems: list[str] = []
    from_env = _from_environment(variables, known, problems)
    state = _state_setting(state_dir, from_env)
    from_file = _from_file(Path(file) if file else Path(str(state.value)) / CONFIG_NAME, bool(file), known, problems)
    settings = {"state_dir": state}
    for key, kind in known.items():
        if key == "state_dir":
            continue
        settings[key] = Setting(key=key, value=kind.default, origin="default")
        flag = (flags or {}).get(key)
        as_flag = Setting(key=key, value=flag, origin=f"flag --{key.replace('.', '-').replace('_', '-')}")
        candidates = ((from_file.get(key), True), (from_env.get(key), False), (as_flag if flag else None, False))
        for candidate, is_strict in candidates:
            if candidate is not None:
                typed = _typed(candidate, kind.type, is_strict=is_strict, problems=problems)
                settings[key] = typed or settings[key]
    config = _assemble(settings)
    _check_together(config, problems)
    if problems:
        raise ConfigError(
            "\n".join(problems) if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems]),
            hint="see `outrider-agent --print-config` for all keys",
        )
    return LoadedConfig(config=config, settings=tuple(settings.values()))


@dataclass(frozen=True, slots=True)
class _Key:
    type: Any
    default: object


def _known_keys() -> dict[str, _Key]:
    keys: dict[str, _Key] = {}
    for section in msgspec.structs.fields(AgentConfig):
        if isinstance(section.type, type) and issubclass(section.type, msgspec.Struct):
            for field in msgspec.structs.fields(section.type):
                keys[f"{section.name}.{field.name}"] = _Key(type=field.type, default=field.default)
        else:
            keys[section.name] = _Key(type=section.type, default=section.default)
    return keys


def _unknown(name: str, known: Mapping[str, object], *, source: str, written: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"{source}: unknown key {written!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _from_environment(
    variables: Mapping[str, str], known: Mapping[str, _Key], problems: list[str]
) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for name in sorted(variables):
        if not name.startswith(ENV_PREFIX):
            continue
        key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
        if key in known:
            found[key] = Setting(key=key, value=variables[name], origin=f"environment {name}")
        else:
            spelled = {f"{ENV_PREFIX}{key.replace('.', '__').upper()}": key for key in known}
            near = difflib.get_close_matches(name, spelled, n=1, cutoff=0.5)
            problems.append(f"environment: unknown variable {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _from_file(path: Path, must_exist: bool, known: Mapping[str, _Key], problems: list[str]) -> dict[str, Setting]:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if must_exist:
            problems.append(f"{path} is not there")
        return {}
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path} is not TOML: {error}")
        return {}
    sections = {key.partition(".")[0] for key in known if "." in key}
    flat: dict[str, object] = {}
    for name, value in document.items():
        if isinstance(value, dict) and name in sections:
            flat.update({f"{name}.{inner}": item for inner, item in value.items()})
        else:
            flat[name] = value
    found: dict[str, Setting] = {}
    for key, value in flat.items():
        if key == "state_dir":
            problems.append(f"{path}: state_dir cannot be set in a file; use --state or {ENV_PREFIX}STATE_DIR")
        elif key in known:
            found[key] = Setting(key=key, value=value, origin=str(path))
        else:
            problems.append(_unknown(key, known, source=str(path), written=key))
    return found


def _state_setting(flag: str | None, from_env: Mapping[str, Setting]) -> Setting:
    if flag:
        return Setting(key="state_dir", value=str(Path(flag).absolute()), origin="flag --state")
    from_variable = from_env.get("state_dir")
    if from_variable is not None and from_variable.value:
        return Setting(
            key="state_dir", value=str(Path(str(from_variable.value)).absolute()), origin=from_variable.origin
        )
    return Setting(key="state_dir", value=str(default_state_dir()), origin="default")


def _typed(setting: Setting, kind: Any, *, is_strict: bool, problems: list[str]) -> Setting | None:
    """The setting with a value of the key's type; text from environment and flags is converted, TOML is not."""
    try:
        value = msgspec.convert(setting.value, type=kind, strict=is_strict)
    except msgspec.ValidationError as error:
        problems.append(f"{setting.origin}: {setting.key} = {setting.shown()}: {error}")
        return None
    return Setting(key=setting.key, value=value, origin=setting.origin)


def _assemble(settings: Mapping[str, Setting]) -> AgentConfig:
    document: dict[str, Any] = {}
    for key, setting in settings.items():
        section, dot, name = key.partition(".")
        if dot:
            document.setdefault(section, {})[name] = setting.value
        else:
            document[key] = setting.value
    document["state_dir"] = Path(document["state_dir"])
    sections = {field.name: field.type for field in msgspec.structs.fields(AgentConfig)}
    return AgentConfig(
        **{key: msgspec.convert(value, type=sections[key]) if isinstance(value, dict) else value
           for key, value in document.items()}
    )  # fmt: skip


def _check_together(config: AgentConfig, problems: list[str]) -> None:
    if config.hub.url:
        try:
            check_hub_url(config.hub.url)
        except InvalidValue as error:
            problems.append(f"hub.url: {error}; {error.hint}")
    if config.updates.mirror:
        try:
            check_hub_url(config.updates.mirror)
        except InvalidValue as error:
            problems.append(f"updates.mirror: {error}; {error.hint}")
    if (config.cascade.below or config.cascade.family) and not config.cascade.model:
        problems.append("cascade.below and cascade.family belong to cascade.model: name the hub's model, or leave both")
    if bool(config.broker.host) != bool(config.broker.port):
        problems.append("broker.host and broker.port belong together: set both, or neither to use the enrolled ones")
    if config.door.http and not _is_loopback(config.door.http):
        problems.append(
            f"door.http: {config.door.http!r} is no address on loopback with a port; write it as '127.0.0.1:8090', "
            "because nothing at this port asks who is there"
        )
    length = len(os.fsencode(config.door_path))
    if length > MAX_SOCKET_PATH_BYTES:
        problems.append(
            f"door.path: {config.door_path} has {length} bytes, a socket's path may have {MAX_SOCKET_PATH_BYTES}; "
            "set door.path to a shorter one"
        )


def _is_loopback(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65_536):
        return False
    try:
        is_bracketed = host.startswith("[") and host.endswith("]")
        number = ipaddress.IPv6Address(host[1:-1]) if is_bracketed else ipaddress.IPv4Address(host)
    except ValueError:
        return host == "localhost"
    return number.is_loopback
