"""`outrider-hub doctor`: check what the hub stands on, one line each, with what to do about what is wrong.

Changes nothing. Works beside a running hub: ports that the hub itself holds are told from ports that others hold by
asking `/v1/ca` there.
"""

from __future__ import annotations

import argparse
import http.client
import json
import secrets
import shutil
import socket
import ssl
import stat
from collections.abc import Callable
from contextlib import closing

import msgspec

from cloud_hub.cli import screen
from cloud_hub.commands import settings
from cloud_hub.composition.signing import online_keys
from cloud_hub.config import HubConfig
from cloud_hub.ground import audit, broker, migrate, revocation, rotation, transport, walltime
from cloud_hub.ground import folder as files
from cloud_hub.ground.ca import common_name, needs_renewal
from cloud_hub.ground.database import Database
from cloud_hub.ground.system import SystemClock
from cloud_hub.ground.tlsport import bind
from cloud_hub.keyring import LATER, ONLINE
from cloud_hub.releases.desk import newest_root
from shared.errors import ConfigError, OutriderError
from shared.limits import MIB
from shared.trust import ca_links

_LEAST_FREE_BYTES = 512 * MIB
_HOUR_MS = 3600 * 1000
_DAY_MS = 24 * _HOUR_MS
_OLD_HOURS = 72
_CA_LEAST_DAYS = 180
"""A change of the CA waits until devices have renewed, and some of them are asleep for long."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check: what was looked at, whether it is well, what was found, what to do."""

    check: str
    ok: bool
    detail: str
    hint: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Run every check; 0 when all are well, else 1."""
    config = settings.load(arguments).config
    checks: tuple[tuple[str, Callable[[HubConfig], str]], ...] = (
        ("data", _data),
        ("disk", _disk),
        ("database", _database),
        ("audit", _audit),
        ("clock", _clock),
        ("ca", _ca),
        ("certificates", _certificates),
        ("revocation", _revocation),
        ("keys", _keys),
        ("broker", _broker),
        ("https port", _https_port),
        ("mqtt port", _mqtt_port),
    )
    findings = [_check(name, look, config) for name, look in checks]
    healthy = all(finding.ok for finding in findings)
    if arguments.json:
        screen.show_json({"ok": healthy, "checks": findings})
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check:<13} {screen.clean(finding.detail)}")
            if finding.hint:
                print(f"      try: {screen.clean(finding.hint)}")
    return 0 if healthy else 1


def _check(name: str, look: Callable[[HubConfig], str], config: HubConfig) -> Finding:
    try:
        return Finding(check=name, ok=True, detail=look(config))
    except OutriderError as error:
        return Finding(check=name, ok=False, detail=error.message, hint=error.hint)
    except OSError as error:
        return Finding(check=name, ok=False, detail=str(error), hint="check the file's owner and rights")


def _data(config: HubConfig) -> str:
    config.require()
    mode = stat.S_IMODE(config.folder.root.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{config.folder.root} is open to other users (mode {mode:04o})",
            code="config.permissions",
            hint=f"run `chmod 700 {config.folder.root}`",
        )
    return str(config.folder.root)


def _disk(config: HubConfig) -> str:
    free = shutil.disk_usage(config.folder.root).free
    if free < _LEAST_FREE_BYTES:
        raise ConfigError(f"{free // MIB} MiB are free", code="config.disk", hint="free space for models and records")
    return f"{free // MIB} MiB free"


def _database(config: HubConfig) -> str:
    config.require()
    with closing(Database(config.database_url)) as database:
        migrate.require_current(database)
    return f"at revision {migrate.head()}"


def _audit(config: HubConfig) -> str:
    config.require()
    with closing(Database(config.database_url)) as database:
        verdict = database.read_now(audit.verify)
    if verdict.broken_at is not None:
        raise ConfigError(
            f"row {verdict.broken_at} does not follow from the one before: it or an earlier one was altered",
            code="config.audit",
            hint="compare with a backup; somebody has written into the database past the hub",
        )
    return f"{verdict.rows} rows, each bound to the one before"


def _clock(config: HubConfig) -> str:
    config.require()
    with closing(Database(config.database_url)) as database:
        newest_ms = database.read_now(audit.newest_ms)
    now_ms = SystemClock().wall_ms()
    found, hint = walltime.doubt(now_ms=now_ms, expected_ms=now_ms, newest_ms=newest_ms), walltime.HINT
    if not found:
        # What has happened since its start only the running hub knows.
        found, hint = _doubt_at(config)
    if found:
        raise ConfigError(found, code=walltime.CODE, hint=hint)
    return "not doubted"


def _doubt_at(config: HubConfig) -> tuple[str, str]:
    """Why the running hub tells nobody the time, and what to do; empty when it does, or does not run."""
    context = ssl.create_default_context(cafile=str(config.folder.broker / "ca.pem"))
    context.check_hostname = False
    host = broker.local_address(config.listen.host)
    connection = http.client.HTTPSConnection(host, config.listen.port, timeout=3, context=context)
    asked = json.dumps({"nonce": secrets.token_urlsafe(32), "device": "doctor", "root": 1})
    try:
        connection.request("POST", "/v1/time", asked, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read(65536))
        if answer.get("code") == walltime.CODE:
            return str(answer["detail"]), str(answer["hint"])
    except (OSError, http.client.HTTPException, ValueError, AttributeError, KeyError):
        pass
    finally:
        connection.close()
    return "", ""


def _ca(config: HubConfig) -> str:
    now_ms = SystemClock().wall_ms()
    pair = rotation.load(config.folder, now_ms=now_ms)
    days = (pair.issuing.expires_ms - now_ms) // _DAY_MS
    if days < 1:
        raise ConfigError("the CA has expired", code="config.ca_expired", hint="check the clock; else make a new hub")
    if days < _CA_LEAST_DAYS:
        step = {"steady": "begin", "begun": "switch", "switched": "finish"}[pair.phase]
        raise ConfigError(
            f"the CA ends in {days} days, and every certificate of it by then",
            code="config.ca_expires",
            hint=f"change it now: `outrider-hub ca rotate {step}` (docs/certificates.md)",
        )
    change = "" if pair.other is None else f"; a change is under way, phase {pair.phase}"
    return f"{pair.issuing.fingerprint}, {days} days left{change}"


def _certificates(config: HubConfig) -> str:
    now_ms = SystemClock().wall_ms()
    for path, names in (
        (config.folder.server_certificate, config.server_names),
        (config.folder.broker / "server.pem", config.broker_names),
        (config.folder.broker / "hub.pem", ()),
    ):
        if needs_renewal(files.read(path), names=names, now_ms=now_ms):
            raise ConfigError(
                f"{path} ends soon or lacks a configured name", code="config.certificate", hint="restart the hub"
            )
    found, wanted = common_name(files.read(config.folder.broker / "hub.pem")), config.broker.hub_name
    if found != wanted:
        raise ConfigError(
            f"broker/hub.pem is for {found!r}, not for {wanted!r}", code="config.certificate", hint="restart the hub"
        )
    return "in time, with the configured names"


def _revocation(config: HubConfig) -> str:
    state, now_ms = revocation.read_state(config.folder.broker / revocation.LIST_NAME), SystemClock().wall_ms()
    hint = "start the hub, which makes the list anew; if it runs, its log says why it cannot"
    if state is None:
        raise ConfigError("there is no revocation list", code="config.revocation", hint=hint)
    if not state.began_ms <= now_ms < state.expires_ms:
        raise ConfigError(
            "the revocation list does not hold now: the broker lets nobody in", code="config.revocation", hint=hint
        )
    hours = (now_ms - state.made_ms) // _HOUR_MS
    if hours > _OLD_HOURS:
        raise ConfigError(
            f"the revocation list is {hours} hours old, and is not made anew; when it ends, nobody gets in",
            code="config.revocation",
            hint=hint,
        )
    days = (state.expires_ms - now_ms) // _DAY_MS
    return f"{state.certificates} certificates, {hours} hours old, {days} days left"


def _keys(config: HubConfig) -> str:
    config.require()
    with closing(Database(config.database_url)) as database:
        keys = online_keys(config.folder.keys)(newest_root(database))
    missing = [name for name in LATER if getattr(keys, name) is None]
    found = [name for name in ONLINE if name not in missing]
    return ", ".join(found) + "".join(f"; none for {name}, as in hubs made earlier" for name in missing)


def _broker(config: HubConfig) -> str:
    if config.broker.mode == "external":
        return f"external, {config.broker.host}:{config.broker.port}"
    return broker.find_binary(config.broker.binary)


def _https_port(config: HubConfig) -> str:
    host, port = broker.local_address(config.listen.host), config.listen.port
    own = transport.load_authority(config.folder).fingerprint
    # During a change a hub tells two CAs and the link between them.
    if own in _cas_at(host, port):
        return f"{port}: this hub answers"
    bind(config.listen.host, port, key="listen.port").close()
    return f"{port}: free"


def _mqtt_port(config: HubConfig) -> str:
    host, port = broker.local_address(config.broker.host), config.broker.port
    try:
        # What the hub itself trusts: during a change its broker may still have a certificate of the other CA.
        context = ssl.create_default_context(cafile=str(config.folder.broker / "ca.pem"))
        context.load_cert_chain(config.folder.broker / "hub.pem", config.folder.broker / "hub.key")
        with socket.create_connection((host, port), timeout=3) as raw, context.wrap_socket(raw, server_hostname=host):
            return f"{port}: this hub's broker answers"
    except ssl.SSLError as error:
        raise ConfigError(
            f"{port}: something else than this hub's broker answers ({error.reason})",
            code="config.port_busy",
            hint="stop what listens there, or set broker.port to a free port",
        ) from error
    except OSError:
        if config.broker.mode == "external":
            raise
        bind(config.broker.host, port, key="broker.port").close()
        return f"{port}: free"


def _cas_at(host: str, port: int) -> tuple[str, ...]:
    """Fingerprints of what a hub at this address tells at `/v1/ca`; empty when no hub answers there."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, timeout=3, context=context)
    try:
        connection.request("GET", "/v1/ca")
        return ca_links.fingerprints(connection.getresponse().read(65536).decode())
    except (OSError, http.client.HTTPException, ValueError):
        return ()
    finally:
        connection.close()
