"""`outrider-hub init`: make a hub.

Everything is made in drafts beside the two directories and moved into place at the end, so that a crash leaves no half
a hub: what is unfinished is thrown away by the next try, what was complete is only moved. The operator's first token
is made last; if that is lost, `token create` makes another.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.commands import settings
from cloud_hub.commands.keys import read_draft, require_complete
from cloud_hub.commands.tokens import actor
from cloud_hub.config import HubConfig, check_host
from cloud_hub.files import sync
from cloud_hub.ground import audit, broker, ca, migrate, transport
from cloud_hub.ground import folder as files
from cloud_hub.ground.auth import IssuedToken, Role, issue_api_token
from cloud_hub.ground.database import Database
from cloud_hub.ground.folder import DataFolder
from cloud_hub.ground.system import SystemClock
from cloud_hub.keyring import OFFLINE, ONLINE, TRUSTED_ROOT, Keyring, root_keys
from cloud_hub.releases.desk import found
from shared.errors import Conflict, InvalidValue, StorageError
from shared.trust import repository
from shared.trust.authority import role_keys
from shared.trust.drafts import Draft, check_draft, encode_draft
from shared.trust.roles import ROOT, TARGETS

_COMPLETE: Final = ".complete"
TOKEN_DAYS: Final = 90


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What `init` made."""

    data: str
    offline: str | None
    hub_url: str
    broker: str
    ca_fingerprint: str
    token: str
    token_file: str | None


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the hub's trust comes from: offline keys that are made now, or a root that its holders have signed.

    Attributes:
        offline: the new directory for offline keys; None with a draft.
        draft: the signed first root and targets; None with an offline directory.
        online: with a draft, where the hub's own keys were made.
    """

    offline: Path | None = None
    draft: Draft | None = None
    online: Path | None = None

    @property
    def marker(self) -> str:
        """What an unfinished draft of a hub must have been made from to be finished with this."""
        if self.draft is not None:
            return hashlib.sha256(encode_draft(self.draft)).hexdigest()
        return str(self.offline)


def run(arguments: argparse.Namespace) -> int:
    """Make a hub, and tell what was made and what comes next."""
    config = settings.load(arguments).config
    config = _with_names(config, arguments.names)
    data, source = config.folder.root, _source(arguments)
    token_file = Path(arguments.token_file).absolute() if arguments.token_file else None
    _check_places(data, source, token_file)
    now_ms = SystemClock().wall_ms()
    try:
        _make(config, source, now_ms=now_ms)
    except OSError as error:
        raise StorageError(
            f"the hub could not be made: {error}", hint="check rights and space, then run the same command again"
        ) from error
    token = _first_token(config, now_ms=now_ms)
    if token_file is not None:
        files.write(token_file, f"{token.text}\n".encode())
    made = Made(
        data=str(data),
        offline=None if source.offline is None else str(source.offline),
        hub_url=config.hub_url,
        broker=f"mqtts://{config.broker_host}:{config.broker.port}",
        ca_fingerprint=transport.load_authority(config.folder).fingerprint,
        token=token.text,
        token_file=None if token_file is None else str(token_file),
    )
    if arguments.json:
        screen.show_json(made)
    else:
        _tell(made, source)
    return 0


def _with_names(config: HubConfig, names: list[str]) -> HubConfig:
    for name in names:
        if not check_host(name):
            raise InvalidValue(
                f"{name[:80]!r} is not a host name or address", code="invalid.host", hint="give it as devices reach it"
            )
    if not names:
        return config
    public = msgspec.structs.replace(config.public, names=tuple(dict.fromkeys(names)))
    return msgspec.structs.replace(config, public=public)


def _source(arguments: argparse.Namespace) -> Source:
    if (arguments.root is None) != (arguments.online is None):
        raise InvalidValue(
            "--root and --online go together",
            code="invalid.usage",
            hint="--root names the signed draft, --online the directory that `keys init --online` made",
        )
    if arguments.root is None:
        return Source(offline=Path(arguments.offline).absolute())
    path = Path(arguments.root)
    draft = read_draft(path)
    require_complete(draft, path)
    if draft.basis:
        raise InvalidValue(
            f"{path} changes a hub that there is; it does not begin one",
            code="invalid.draft",
            hint=f"outrider-hub keys publish {path}",
        )
    check_draft(draft, now_ms=SystemClock().wall_ms(), is_signed=True)
    return Source(draft=draft, online=Path(arguments.online).absolute())


def _check_places(data: Path, source: Source, token_file: Path | None) -> None:
    offline = source.offline
    if offline is not None and (data == offline or data in offline.parents or offline in data.parents):
        raise InvalidValue(
            "--data and --offline must be apart: the offline keys leave this machine",
            code="invalid.offline",
            hint="give two directories, neither of them inside the other",
        )
    for place in (data, *(() if offline is None else (offline,))):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            # After a crash between the two moves, the offline directory is there and its hub waits as a draft.
            if place == offline and not data.exists() and _is_complete(_draft(data), source):
                continue
            raise Conflict(
                f"{place} exists and is not empty; nothing was changed",
                code="conflict.exists",
                hint="use `outrider-hub serve` or `token create` with an existing hub, or choose another directory",
            )
    if token_file is not None and token_file.exists():
        raise Conflict(
            f"{token_file} exists; nothing was changed", code="conflict.exists", hint="name a new file for the token"
        )
    if token_file is not None and not os.access(token_file.parent, os.W_OK | os.X_OK):
        # Looked at first: the token is shown once, and a hub that is made cannot be made again to see it.
        raise InvalidValue(
            f"{token_file.parent} is no directory that can be written to; nothing was changed",
            code="invalid.token_file",
            hint="make the directory, or name a file elsewhere",
        )


def _make(config: HubConfig, source: Source, *, now_ms: int) -> None:
    data = config.folder.root
    draft = _draft(data)
    keys = None if source.offline is None else _draft(source.offline)
    if not _is_complete(draft, source):
        for place in (draft, keys):
            if place is not None and place.exists():
                shutil.rmtree(place)
        _furnish(config, DataFolder(draft), source, keys, now_ms=now_ms)
        files.write(draft / _COMPLETE, source.marker.encode())
    if keys is not None and source.offline is not None and keys.exists():
        keys.rename(source.offline)
        sync(source.offline.parent)
    # The marker goes last: without it, a crash here would leave offline keys in place and a draft nobody can tell.
    draft.rename(data)
    (data / _COMPLETE).unlink()
    sync(data.parent)
    # Its paths are absolute, so it is written in place. A managed start writes it again, an external broker takes it.
    broker.write_files(
        broker.BrokerSettings(
            folder=config.folder.broker,
            host=config.broker.host,
            port=config.broker.port,
            binary=config.broker.binary,
            hub_name=config.broker.hub_name,
        )
    )


def _furnish(config: HubConfig, folder: DataFolder, source: Source, keys: Path | None, *, now_ms: int) -> None:
    folder.make()
    made = ca.make_ca(now_ms=now_ms, label=config.public.names[0] if config.public.names else os.uname().nodename)
    files.write(folder.ca_key, made.key_pem)
    files.write(folder.ca_certificate, made.certificate_pem)
    transport.ensure(
        folder,
        transport.load_authority(folder),
        names=config.server_names,
        broker_names=config.broker_names,
        hub_name=config.broker.hub_name,
        now_ms=now_ms,
        days=config.certificates.server_days,
    )
    files.write(folder.config, _toml(config).encode())
    online = Keyring(folder.keys)
    if keys is None:
        root, targets = _take_over(source, online)
    else:
        root, targets = _make_keys(keys, online, now_ms=now_ms)
    with closing(Database(config.database.url or folder.database_url)) as database:
        if database.read_now(migrate.current) is not None:
            raise Conflict(
                "the database holds a hub already; nothing was changed in it",
                code="conflict.exists",
                hint="name an empty one in database.url; an init that was cut short leaves one that is not",
            )
        migrate.upgrade(database)
        database.write_now(
            lambda conn: audit.record(conn, at_ms=now_ms, actor=actor(), action="hub.created", subject="hub")
        )
        found(
            database,
            root=root,
            targets=targets,
            snapshot=online.signer("snapshot"),
            timestamp=online.signer("timestamp"),
            now_ms=now_ms,
            actor=actor(),
        )
        if database.is_sqlite:
            folder.database.chmod(0o600)


def _make_keys(folder: Path, online: Keyring, *, now_ms: int) -> tuple[bytes, bytes]:
    """All keys, one for each role, and the first root and targets."""
    offline = Keyring(folder)
    offline.create(*OFFLINE)
    online.create(*ONLINE)
    root = repository.sign(repository.new_root(root_keys(offline, online), now_ms=now_ms), offline.signer("root"))
    files.write(folder / TRUSTED_ROOT, root)
    return root, repository.sign(repository.new_targets(now_ms=now_ms), offline.signer("targets"))


def _take_over(source: Source, online: Keyring) -> tuple[bytes, bytes]:
    """The hub's own keys from where they were made, and the root and targets that their holders have signed."""
    assert source.draft is not None
    assert source.online is not None
    root = source.draft.parts[ROOT].encode()
    trusted = repository.read_root(root).signed
    for role in ONLINE:
        held = role_keys(trusted, role)
        online.take_over(role, [] if held is None else [key.keyid for key in held.keys], Keyring(source.online))
    return root, source.draft.parts[TARGETS].encode()


def _first_token(config: HubConfig, *, now_ms: int) -> IssuedToken:
    with closing(Database(config.database_url)) as database:
        return database.write_now(
            lambda conn: issue_api_token(
                conn,
                name="first-admin",
                role=Role.ADMIN,
                at_ms=now_ms,
                ttl_ms=config.tokens.api_ttl_s * 1000,
                actor=actor(),
            )
        )


def _draft(place: Path) -> Path:
    return place.with_name(f".{place.name}.outrider-init")


def _is_complete(draft: Path, source: Source) -> bool:
    marker = draft / _COMPLETE
    return marker.is_file() and marker.read_text() == source.marker


def _toml(config: HubConfig) -> str:
    names = ", ".join(f'"{name}"' for name in config.public.names)
    return (
        "# Written by `outrider-hub init`. `outrider-hub serve --print-config` lists every key.\n"
        f'[listen]\nhost = "{config.listen.host}"\nport = {config.listen.port}\n\n'
        f"[public]\nnames = [{names}]\n\n"
        f'[broker]\nhost = "{config.listen.host}"\nport = {config.broker.port}\n'
        + (f'\n[database]\nurl = "{config.database.url}"\n' if config.database.url else "")
    )


def _tell(made: Made, source: Source) -> None:
    if made.offline is not None:
        keys = f"  offline keys     {made.offline}  (root, targets, release)"
        advice = f"Move {made.offline} to the machine where releases are signed; the hub must not have it."
    else:
        keys = f"  online keys      {made.data}/keys  (copied from {source.online})"
        advice = f"Remove {source.online}: the hub has its own copy of the keys that were in it."
    print(
        "\n".join(
            [
                f"made a hub in {made.data}",
                f"  CA fingerprint   {made.ca_fingerprint}",
                keys,
                f"  admin token      {made.token}",
                "",
                f"Keep the token: it is shown this once{f' and is in {made.token_file}' if made.token_file else ''}.",
                advice,
                "",
                "next:",
                f"  outrider-hub serve --data {made.data}",
                f"  outrider login {made.hub_url} --fingerprint {made.ca_fingerprint} --token-file FILE",
                f"  outrider-hub token create --data {made.data} --kind join",
            ]
        )
    )
