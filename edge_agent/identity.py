"""Who this device is: the files that enrolment left in `<state>/identity/`.

    device.key      P-256 private key, PKCS #8 PEM, 0600; never leaves the device
    device.pem      the client certificate that the hub signed for it
    ca.pem          the hub's CA, the only one that is trusted; two while the hub changes it
    identity.json   names, addresses and dates; written last, so that without it nothing counts as enrolled
    refusal.json    why the hub does not renew the certificate, if it does not; a note for people

A renewal writes `device-N.key`, `device-N.pem` and `ca-N.pem` beside these and then replaces `identity.json`, which
names N: that one rename is the whole switch, so that no power cut can leave a key without its certificate. What is not
named is garbage, and swept.

Not here: how the files are made (`enrolment.py`, `renewal.py`), and looking into the certificate (`certificates.py`,
which may load `cryptography`; the daemon must not).
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
        generation: how often the certificate was renewed since; names the files.
        not_before_ms, not_after_ms: the certificate's dates; 0 where nobody has looked into it yet.
    """

    device: str
    hub_url: str
    broker_host: str
    broker_port: int
    profile: str
    enrolled_ms: int
    generation: int = 0
    not_before_ms: int = 0
    not_after_ms: int = 0


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `refusal.json`: the hub's word, and the device's wall clock then."""

    code: str
    message: str
    hint: str
    at_ms: int


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
    not_before_ms: int = 0
    not_after_ms: int = 0


def file_names(generation: int) -> tuple[str, str, str]:
    """Names of key, certificate and CA of this generation."""
    if generation == 0:
        return "device.key", "device.pem", "ca.pem"
    return f"device-{generation}.key", f"device-{generation}.pem", f"ca-{generation}.pem"


def load_identity(state_dir: Path) -> Identity:
    """The identity below the state directory; raises ConfigError (`config.not_enrolled`, `config.identity`)."""
    folder = state_dir / IDENTITY_DIR
    file = load_file(state_dir)
    paths = tuple(folder / name for name in file_names(file.generation))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise _unusable(folder, f"missing: {', '.join(missing)}")
    return Identity(
        device=parse_device_id(file.device),
        hub_url=file.hub_url,
        broker_host=file.broker_host,
        broker_port=file.broker_port,
        profile=file.profile,
        key_path=paths[0],
        certificate_path=paths[1],
        ca_path=paths[2],
        not_before_ms=file.not_before_ms,
        not_after_ms=file.not_after_ms,
    )


def load_refusal(state_dir: Path) -> Refusal | None:
    """Why the hub does not renew this device's certificate; None when it does, or nobody has asked."""
    try:
        return msgspec.json.decode((state_dir / IDENTITY_DIR / "refusal.json").read_bytes(), type=Refusal)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def sweep(folder: Path, *, generation: int) -> None:
    """Remove what renewals left that `identity.json` does not name: former pairs, and ones that were never named."""
    named = set(file_names(generation))
    for pattern in ("device-*.key", "device-*.pem", "ca-*.pem"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink(missing_ok=True)
    if generation:
        for name in file_names(0):
            (folder / name).unlink(missing_ok=True)


def load_file(state_dir: Path) -> IdentityFile:
    """What `identity.json` says; raises ConfigError as `load_identity` does."""
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
    try:
        file = msgspec.json.decode(data, type=IdentityFile)
        parse_device_id(file.device)
        check_hub_url(file.hub_url)
        if file.generation < 0:
            raise InvalidValue(f"generation {file.generation}")
    except (msgspec.MsgspecError, InvalidValue) as error:
        raise _unusable(folder, str(error)) from error
    return file


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
