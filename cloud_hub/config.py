"""The hub's configuration: typed, read once. The one place that reads the environment.

Each value comes from the last of: default, `<data>/hub.toml`, environment (`OUTRIDER_HUB_LISTEN__PORT=8443`, `__` for
nesting, lists separated by commas), flags. Unknown keys are errors that name the nearest known one; all problems are
told at once. No key holds a secret: those are files in the data directory.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints
from urllib.parse import urlsplit

import msgspec

from cloud_hub.ground.ca import HUB_NAME, check_hub_name
from cloud_hub.ground.folder import DataFolder
from shared.errors import ConfigError

PREFIX: Final = "OUTRIDER_HUB_"
DEFAULT_DATA: Final = "/var/lib/outrider-hub"
DAY_S: Final = 24 * 3600
SHORTEST_LIFE_S: Final = 4
"""Of a device's certificate: its dates are whole seconds, and a renewal takes one."""
_HOST: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_LOCAL: Final = ("localhost", "127.0.0.1")
_ANYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """Where the HTTPS port is."""

    host: str = "127.0.0.1"
    port: int = 8443


class Public(msgspec.Struct, frozen=True, kw_only=True):
    """How the hub is reached from outside.

    Attributes:
        names: host names and addresses; they go into its certificates.
        url: what devices and operators are told; empty makes it from the first name and the port.
    """

    names: tuple[str, ...] = ()
    url: str = ""


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The MQTT broker.

    Attributes:
        mode: `managed` starts mosquitto as a child; `external` connects to one that runs by itself.
        host, port: where it listens, or where it is.
        public_host: what devices are told; empty takes the first public name (managed) or `host` (external).
        binary: the program, by name or path.
        hub_name: as whom the hub comes in there; `hub.` and a word where another hub comes in too.
    """

    mode: Literal["managed", "external"] = "managed"
    host: str = "127.0.0.1"
    port: int = 8883
    public_host: str = ""
    binary: str = "mosquitto"
    hub_name: str = HUB_NAME


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything but files is kept.

    Attributes:
        url: empty for SQLite in the data directory; `postgresql+psycopg://USER@HOST/NAME` for PostgreSQL, whose
            password lies where its client library looks for it (`~/.pgpass`).
    """

    url: str = ""


class Certificates(msgspec.Struct, frozen=True, kw_only=True):
    """How long certificates live.

    Attributes:
        device_days: of devices, which renew at two thirds; parts of a day are allowed.
        server_days: of the hub's own ports.
        renew_expired_days: how long after its end a device's certificate may still be renewed; 0 for not at all.
    """

    device_days: float = 30
    server_days: int = 90
    renew_expired_days: float = 365


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """How long tokens live unless the one who makes them says otherwise."""

    join_ttl_s: int = DAY_S
    api_ttl_s: int = 90 * DAY_S


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Whether `/metrics` needs no token (`open = true`), or a viewer's."""

    open: bool = False


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """How much is logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class HubConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be configured; `data_dir` comes from a flag or the environment only."""

    data_dir: str = DEFAULT_DATA
    listen: Listen = Listen()
    public: Public = Public()
    broker: BrokerConfig = BrokerConfig()
    database: DatabaseConfig = DatabaseConfig()
    certificates: Certificates = Certificates()
    tokens: Tokens = Tokens()
    metrics: MetricsConfig = MetricsConfig()
    log: Log = Log()

    @property
    def folder(self) -> DataFolder:
        """The data directory."""
        return DataFolder(Path(self.data_dir))

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL of the database."""
        return self.database.url or self.folder.database_url

    def require(self) -> None:
        """Raise ConfigError unless a hub was made here."""
        self.folder.require(has_database=not self.database.url)

    @property
    def hub_url(self) -> str:
        """How the hub is reached, `https://host:port`."""
        return self.public.url.rstrip("/") or f"https://{_in_url(self._told(self.listen.host))}:{self.listen.port}"

    @property
    def broker_host(self) -> str:
        """The broker's host as devices are told."""
        if self.broker.public_host:
            return self.broker.public_host
        return self._told(self.broker.host) if self.broker.mode == "managed" else self.broker.host

    @property
    def server_names(self) -> tuple[str, ...]:
        """Names in the certificate of the HTTPS port."""
        return _names(*self.public.names, _url_host(self.public.url), own=self.listen.host)

    @property
    def broker_names(self) -> tuple[str, ...]:
        """Names in the managed broker's certificate."""
        return _names(*self.public.names, self.broker.public_host, own=self.broker.host)

    def _told(self, own: str) -> str:
        """The name under which others reach what listens on `own`: a public one, else its own address if it has one."""
        if self.public.names:
            return self.public.names[0]
        return "localhost" if own in _ANYWHERE or own in _LOCAL else own


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and for each key where its value came from."""

    config: HubConfig
    origins: Mapping[str, str]


def environment() -> Mapping[str, str]:
    """The process's environment."""
    return os.environ


def notify_socket(variables: Mapping[str, str]) -> str | None:
    """Where the service manager wants to hear that we are ready (systemd, sd_notify(3))."""
    return variables.get("NOTIFY_SOCKET") or None


def load(*, flags: Mapping[str, Any], variables: Mapping[str, str]) -> Loaded:
    """Read the configuration; raises ConfigError with everything that is wrong.

    Args:
        flags: values by key (`listen.port`) from the command line; None means not given.
        variables: the environment.
    """
    keys = _keys()
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins = dict.fromkeys(keys, "default")

    def take(key: str, value: Any, *, origin: str, lax: bool = False) -> None:
        if key not in keys:
            problems.append(f"{origin}: unknown key {key!r}{_nearest(key, keys)}")
            return
        if lax and keys[key] == tuple[str, ...]:
            value = [part.strip() for part in value.split(",") if part.strip()]
        try:
            values[key] = msgspec.convert(value, type=keys[key], strict=not lax)
            origins[key] = origin
        except msgspec.ValidationError as error:
            problems.append(f"{origin}: {key}: {error}")

    given = {key: value for key, value in flags.items() if value is not None}
    ours = {name: value for name, value in sorted(variables.items()) if name.startswith(PREFIX)}
    data_dir = given.get("data_dir") or ours.get(f"{PREFIX}DATA_DIR") or DEFAULT_DATA
    file = DataFolder(Path(data_dir)).config
    for key, value in _flatten(_read_toml(file, problems), keys).items():
        if key == "data_dir":
            problems.append(f"{file}: data_dir cannot be set in the file that lies in it; use --data")
        else:
            take(key, value, origin=str(file))
    for name, value in ours.items():
        take(name.removeprefix(PREFIX).lower().replace("__", "."), value, origin=name, lax=True)
    for key, value in given.items():
        take(key, value, origin="flag")
    config = _build(values)
    problems += _faults(config)
    if problems:
        raise ConfigError(
            "the configuration cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems),
            code="config.invalid",
            hint="`outrider-hub serve --print-config` shows every key, its value and where it came from",
        )
    return Loaded(config=config, origins=origins)


def describe(loaded: Loaded) -> str:
    """Every key with its value as TOML would write it, and where it came from."""
    lines = []
    for key in _keys():
        value: Any = loaded.config
        for part in key.split("."):
            value = getattr(value, part)
        lines.append(f"{key} = {msgspec.json.encode(value).decode()}  # {loaded.origins[key]}")
    return "\n".join(lines)


def check_host(text: str) -> bool:
    """Whether this is a host name or an IP address, without a zone: a zone may hold any text, line ends included."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None
    return "%" not in text


def _keys() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(HubConfig).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            found |= {f"{name}.{inner}": hint for inner, hint in get_type_hints(kind).items()}
        else:
            found[name] = kind
    return found


def _read_toml(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(f"{file}: {error}")
        return {}


def _flatten(document: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys and value:
            flat |= _flatten(value, keys, f"{key}.")
        elif value != {}:
            flat[key] = value
    return flat


def _build(values: Mapping[str, Any]) -> HubConfig:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            tree.setdefault(section, {})[name] = value
        else:
            tree[name] = value
    return msgspec.convert(tree, type=HubConfig)


def _faults(config: HubConfig) -> list[str]:
    faults = [
        f"{key}: {port} is not a port, 1 to 65535"
        for key, port in (("listen.port", config.listen.port), ("broker.port", config.broker.port))
        if not 1 <= port <= 65535
    ]
    faults += _certificate_faults(config.certificates)
    if config.broker.mode == "managed" and config.listen.port == config.broker.port:
        faults.append(f"listen.port and broker.port are both {config.listen.port}; they must differ")
    hosts = [("listen.host", config.listen.host), ("broker.host", config.broker.host)]
    hosts += [("public.names", name) for name in config.public.names]
    hosts += [("broker.public_host", config.broker.public_host)] if config.broker.public_host else []
    faults += [f"{key}: {host!r} is not a host name or address" for key, host in hosts if not check_host(host)]
    if config.public.url and not re.fullmatch(r"https://[^/?#@\s]+/?", config.public.url):
        faults.append(f"public.url: {config.public.url!r} is not https://HOST[:PORT]")
    if not check_hub_name(config.broker.hub_name):
        faults.append(f"broker.hub_name: {config.broker.hub_name!r} is neither 'hub' nor 'hub.' and a word")
    if config.database.url and not _is_database(config.database.url):
        # Not shown: it may hold a password.
        faults.append("database.url: it is not postgresql+psycopg://USER@HOST/NAME, without a password")
    for key, number, most in (
        ("certificates.server_days", config.certificates.server_days, 825),
        ("tokens.join_ttl_s", config.tokens.join_ttl_s, 366 * DAY_S),
        ("tokens.api_ttl_s", config.tokens.api_ttl_s, 3660 * DAY_S),
    ):
        if not 1 <= number <= most:
            faults.append(f"{key}: {number} is not between 1 and {most}")
    return faults


def _certificate_faults(certificates: Certificates) -> list[str]:
    """Comparisons that a number which is none does not pass."""
    faults = []
    if not SHORTEST_LIFE_S <= certificates.device_days * DAY_S <= 825 * DAY_S:
        faults.append(
            f"certificates.device_days: {certificates.device_days:g} is not between {SHORTEST_LIFE_S} s and 825 days"
        )
    if not 0 <= certificates.renew_expired_days <= 3660:
        faults.append(f"certificates.renew_expired_days: {certificates.renew_expired_days:g} is not between 0 and 3660")
    return faults


def _is_database(url: str) -> bool:
    """Whether this is the URL of a PostgreSQL database, without a secret in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    has_secret = parts.password is not None or "password" in parts.query
    return parts.scheme == "postgresql+psycopg" and len(parts.path) > 1 and not has_secret and '"' not in url


def _nearest(key: str, keys: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(keys)}"


def _names(*names: str, own: str) -> tuple[str, ...]:
    """Names for a certificate; `own` is the address that is listened on, by which the hub itself comes in."""
    local = (*_LOCAL, "::1") if own == "::" else _LOCAL if own in _ANYWHERE else (*_LOCAL, own)
    return tuple(dict.fromkeys(name for name in (*names, *local) if name))


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _url_host(url: str) -> str:
    match = re.fullmatch(r"https://(\[[^\]]+\]|[^:/?#@\s]+)(:\d+)?/?", url)
    return match.group(1).strip("[]") if match else ""
