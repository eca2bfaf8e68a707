"""Who this device is: the files that enrolment left in `<state>/identity/`.

    device.key      P-256 private key, PKCS #8 PEM, 0600; never leaves the device
    device.pem      the client certificate that the hub signed for it
    ca.pem          the hub's CA, the only one that is trusted
    identity.json   names and addresses; written last, so that without it nothing counts as enrolled

Not here: how the files are made (`enrolment.py`), and looking into the certificate (`commands/doctor.py`, which may
load `cryptography`; the daemon must not).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from shared.errors import ConfigError, InvalidValue
from shared.ids import DeviceId, parse_device_id

IDENTITY_DIR: Final = "identity"
TRUST_DIR: Final = "trust"


class IdentityFile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `identity.json`.

    Attributes:
        profile: the profile that the device was enrolled with.
        enrolled_ms: the device's wall clock then.
        issued_ms: when its certificate begins to be valid, by the hub's clock; 0 where that was not noted.
    """

    device: str
    hub_url: str
    broker_host: str
    broker_port: int
    profile: str
    enrolled_ms: int
    issued_ms: int = 0


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is enrolled; the paths exist."""

    device: DeviceId
    hub_url: str
    broker_host: str
    broker_port: int
    profile: str
    key_path: Path
    certificate_path: Path
    ca_path: Path
    issued_ms: int = 0


def load_identity(state_dir: Path) -> Identity:
    """The identity below the state directory; raises ConfigError (`config.not_enrolled`, `config.identity`)."""
    folder = state_dir / IDENTITY_DIR
    try:
        data = (folder / "identity.json").read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"this device is not enrolled: {folder / 'identity.json'} is not there",
            code="config.not_enrolled",
            hint="ask for a join token (`outrider-hub token create --kind join`) and run `outrider-agent enroll TOKEN`",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {folder / 'identity.json'}: {error.strerror}",
            code="config.identity",
            hint="run the command as the user that runs the agent",
        ) from error
    paths = {name: folder / name for name in ("device.key", "device.pem", "ca.pem")}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    try:
        file = msgspec.json.decode(data, type=IdentityFile)
        device = parse_device_id(file.device)
        check_hub_url(file.hub_url)
    except (msgspec.MsgspecError, InvalidValue) as error:
        raise _unusable(folder, str(error)) from error
    if missing:
        raise _unusable(folder, f"missing: {', '.join(missing)}")
    return Identity(
        device=device,
        hub_url=file.hub_url,
        broker_host=file.broker_host,
        broker_port=file.broker_port,
        profile=file.profile,
        key_path=paths["device.key"],
        certificate_path=paths["device.pem"],
        ca_path=paths["ca.pem"],
        issued_ms=file.issued_ms,
    )


def check_hub_url(url: str) -> tuple[str, int]:
    """Host and port of the hub's HTTPS address; raises InvalidValue for anything but `https://host[:port]`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidValue(f"{masked_url(url)!r} is not a URL: {error}", code="invalid.hub_url") from error
    if parts.scheme != "https" or not host or parts.username or parts.path not in ("", "/") or parts.query:
        raise InvalidValue(
            f"{masked_url(url)!r} is not the address of a hub",
            code="invalid.hub_url",
            hint="use https://HOST:PORT, for example https://hub.example:8443",
        )
    return host, port or 443


def masked_url(url: str) -> str:
    """The URL as it may be shown: shortened, and without a user name or password."""
    scheme, separator, rest = url[:200].partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if separator and "@" in rest else url[:200]


def _unusable(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"the identity in {folder} cannot be used: {reason}",
        code="config.identity",
        hint="restore the folder from a backup, or enrol again with `outrider-agent enroll --force TOKEN`",
    )
