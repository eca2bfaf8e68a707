"""`outrider-hub token create`: tokens made on the hub's own machine, also while the hub runs."""

from __future__ import annotations

import argparse
import os
from contextlib import closing

from cloud_hub.cli import screen
from cloud_hub.commands import settings
from cloud_hub.devices.desk import make_join_token
from cloud_hub.ground import migrate, rotation
from cloud_hub.ground.auth import issue_api_token, parse_role
from cloud_hub.ground.database import Database
from cloud_hub.ground.folder import local_user
from cloud_hub.ground.system import SystemClock
from shared.errors import InvalidValue


def actor() -> str:
    """Who works on this machine, for audit rows."""
    return f"local:{local_user() or os.geteuid()}"


def create(arguments: argparse.Namespace) -> int:
    """Make a token and print its text, which is nowhere stored."""
    config = settings.load(arguments).config
    config.require()
    _check(arguments)
    now_ms = SystemClock().wall_ms()
    with closing(Database(config.database_url)) as database:
        migrate.require_current(database)
        if arguments.kind == "join":
            authority = rotation.load(config.folder, now_ms=now_ms).issuing
            ttl_ms = (arguments.ttl or config.tokens.join_ttl_s) * 1000
            text = database.write_now(
                lambda conn: make_join_token(
                    conn,
                    hub_url=config.hub_url,
                    ca_fingerprint=authority.fingerprint,
                    name=arguments.name,
                    device=arguments.device,
                    profile=arguments.profile,
                    uses=1 if arguments.uses is None else arguments.uses,
                    ttl_ms=ttl_ms,
                    at_ms=now_ms,
                    actor=actor(),
                )
            )
        else:
            role = parse_role(arguments.role or "viewer")
            ttl_ms = (arguments.ttl or config.tokens.api_ttl_s) * 1000
            text = database.write_now(
                lambda conn: issue_api_token(
                    conn, name=arguments.name or role.value, role=role, at_ms=now_ms, ttl_ms=ttl_ms, actor=actor()
                )
            ).text
    if arguments.json:
        screen.show_json({"kind": arguments.kind, "name": arguments.name, "token": text, "expires_ms": now_ms + ttl_ms})
    else:
        print(text)
        screen.note(_explain(arguments.kind, ttl_s=ttl_ms // 1000))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.kind == "join" and arguments.role is not None:
        raise InvalidValue("--role is for API tokens", code="invalid.usage", hint="use --kind api")
    if arguments.kind == "api" and (arguments.device or arguments.profile or arguments.uses is not None):
        raise InvalidValue(
            "--device, --profile and --uses are for join tokens", code="invalid.usage", hint="use --kind join"
        )


def _explain(kind: str, *, ttl_s: int) -> str:
    life = f"valid for {ttl_s // 3600} h" if ttl_s >= 3600 else f"valid for {ttl_s // 60} min"
    if kind == "join":
        return f"{life}; on the device: outrider-agent enroll TOKEN"
    return f"{life}; shown this once: outrider login URL --token TOKEN"
