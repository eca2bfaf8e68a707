"""Who is calling: an operator by API token, a device by client certificate, and what each may do.

Rules:
1. The certificate is the one that the TLS layer verified on this connection (`ground/tlsport.py` puts it into the
   scope); no header may stand in for it.
2. The token's text is `orh_<id>_<secret>`; the database holds SHA-256 of the secret, compared in constant time.
3. Roles contain one another: viewer < operator < release_manager < admin. `device` is beside them, below all.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from starlette.requests import Request

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.ground.problems import NotAllowed
from cloud_hub.ground.schema import metadata
from shared.clock import Clock
from shared.errors import InvalidValue, StorageError
from shared.ids import DeviceId

logger = logging.getLogger(__name__)

PEER_CERTIFICATE: Final = "outrider.peer_certificate"
"""Key in the ASGI scope's `extensions`; the value is the verified client certificate in DER, or None."""

MAX_TOKEN_TTL_MS: Final = 3660 * 24 * 3600 * 1000
_PREFIX: Final = "orh"
_LAST_USED_EVERY_MS: Final = 60_000
_MAX_TOKEN_CHARS: Final = 256

api_tokens = sa.Table(
    "api_tokens",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("role", sa.String(32), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=True),
    sa.Column("revoked_ms", sa.BigInteger, nullable=True),
    sa.Column("last_used_ms", sa.BigInteger, nullable=True),
)


class Role(StrEnum):
    """What a principal may do; each operator's role includes the ones before it."""

    DEVICE = "device"
    VIEWER = "viewer"
    OPERATOR = "operator"
    RELEASE_MANAGER = "release_manager"
    ADMIN = "admin"

    @property
    def rank(self) -> int:
        """Position in the order of power."""
        return list(Role).index(self)


def parse_role(text: str) -> Role:
    """An operator's role by its name; raises InvalidValue (devices' roles come from certificates only)."""
    names = [role.value for role in Role if role is not Role.DEVICE]
    if text not in names:
        raise InvalidValue(f"there is no role {text[:40]!r}", code="invalid.role", hint=f"one of {', '.join(names)}")
    return Role(text)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling.

    Attributes:
        name: the token's name, or the device's.
        role: what they may do.
        device: set exactly when the role is DEVICE.
    """

    name: str
    role: Role
    device: DeviceId | None = None

    @property
    def actor(self) -> str:
        """The name for audit rows: `token:ci` or `device:pi-3`."""
        return f"{'device' if self.device else 'token'}:{self.name}"


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new API token; `text` is shown once and is nowhere stored."""

    id: str
    name: str
    role: Role
    text: str
    expires_ms: int | None


def issue_api_token(
    conn: Connection, *, name: str, role: Role, at_ms: int, ttl_ms: int | None, actor: str
) -> IssuedToken:
    """Make an API token in the caller's write transaction, with its audit row."""
    if role is Role.DEVICE:
        raise InvalidValue("devices have certificates, not tokens", code="invalid.role")
    if not 0 < len(name) <= 128:
        raise InvalidValue("a token's name has 1 to 128 characters", code="invalid.token_name")
    if ttl_ms is not None and not 0 < ttl_ms <= MAX_TOKEN_TTL_MS:
        raise InvalidValue("a token lives longer than nothing and at most ten years", code="invalid.ttl")
    token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    expires_ms = None if ttl_ms is None else at_ms + ttl_ms
    conn.execute(
        api_tokens.insert().values(
            id=token_id,
            name=name,
            role=role.value,
            secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
            created_ms=at_ms,
            expires_ms=expires_ms,
        )
    )
    audit.record(
        conn,
        at_ms=at_ms,
        actor=actor,
        action="token.created",
        subject=f"token:{token_id}",
        detail={"name": name, "role": role.value, "expires_ms": expires_ms},
    )
    return IssuedToken(id=token_id, name=name, role=role, text=f"{_PREFIX}_{token_id}_{secret}", expires_ms=expires_ms)


class Gate:
    """Tells principals apart; one per process, at `app.state.gate`.

    Args:
        database: where the tokens are.
        clock: for expiry.
        device_of: from the DER of a verified client certificate to the device that it stands for; raises NotAllowed
            when the certificate is not ours, expired, revoked or of a device that is gone (the devices room).
    """

    def __init__(self, *, database: Database, clock: Clock, device_of: Callable[[bytes], Awaitable[DeviceId]]) -> None:
        self._database = database
        self._clock = clock
        self._device_of = device_of
        self._last_used_ms: dict[str, int] = {}

    async def identify(self, request: Request) -> Principal:
        """The principal behind a request: its token if it shows one, else its certificate; raises NotAllowed."""
        header = request.headers.get("authorization")
        if header is not None:
            return await self._by_token(header)
        certificate = request.scope.get("extensions", {}).get(PEER_CERTIFICATE)
        if certificate:
            device = await self._device_of(certificate)
            return Principal(name=device, role=Role.DEVICE, device=device)
        raise NotAllowed(
            "this needs a token or a device certificate",
            code="auth.missing",
            hint="send `Authorization: Bearer orh_…`; `outrider-hub token create --kind api` makes one",
        )

    async def _by_token(self, header: str) -> Principal:
        unknown = NotAllowed(
            "the token is not known to this hub",
            code="auth.unknown_token",
            hint="check that it is complete and of this hub, or make one with `outrider-hub token create --kind api`",
        )
        scheme, _, text = header.partition(" ")
        parts = text.strip().split("_", 2)
        if scheme.lower() != "bearer" or len(text) > _MAX_TOKEN_CHARS or len(parts) != 3 or parts[0] != _PREFIX:
            raise unknown
        _, token_id, secret = parts
        row = await self._database.read(
            lambda conn: conn.execute(sa.select(api_tokens).where(api_tokens.c.id == token_id)).one_or_none()
        )
        given = hashlib.sha256(secret.encode()).hexdigest()
        if row is None or not hmac.compare_digest(given, row.secret_sha256) or row.revoked_ms is not None:
            raise unknown
        now_ms = self._clock.wall_ms()
        if row.expires_ms is not None and now_ms >= row.expires_ms:
            raise NotAllowed(
                "the token has expired",
                code="auth.expired_token",
                hint="make a new one with `outrider-hub token create --kind api`",
            )
        await self._note_use(token_id, now_ms=now_ms)
        return Principal(name=row.name, role=Role(row.role))

    async def _note_use(self, token_id: str, *, now_ms: int) -> None:
        # At most one write a minute and token: a read must not cost a disk sync each time.
        if now_ms - self._last_used_ms.get(token_id, -_LAST_USED_EVERY_MS) < _LAST_USED_EVERY_MS:
            return
        self._last_used_ms[token_id] = now_ms
        update = api_tokens.update().where(api_tokens.c.id == token_id).values(last_used_ms=now_ms)

        def work(conn: Connection) -> None:
            conn.execute(update)

        try:
            await self._database.write(work)
        except StorageError as error:
            # Only a note, and a full disk is when people have to look.
            logger.warning("use of a token was not noted: %s", error.code)


Dependency = Callable[[Request], Awaitable[Principal]]


def require(role: Role) -> Dependency:
    """A FastAPI dependency: an operator with at least this role. Use as `Depends(require(Role.OPERATOR))`."""

    async def dependency(request: Request) -> Principal:
        principal = await _gate(request).identify(request)
        if principal.role.rank < role.rank:
            raise NotAllowed(
                f"this needs the role {role.value}; {principal.name} has {principal.role.value}",
                code="auth.role",
                hint=f"use a token made with `--role {role.value}`",
            )
        return principal

    return dependency


def require_any() -> Dependency:
    """A FastAPI dependency: any operator, or a device with its certificate."""

    async def dependency(request: Request) -> Principal:
        return await _gate(request).identify(request)

    return dependency


def require_device() -> Dependency:
    """A FastAPI dependency: a device with its certificate; `principal.device` is set."""

    async def dependency(request: Request) -> Principal:
        principal = await _gate(request).identify(request)
        if principal.device is None:
            raise NotAllowed("only devices may do this", code="auth.device", hint="use the device's certificate")
        return principal

    return dependency


def _gate(request: Request) -> Gate:
    gate: Any = request.app.state.gate
    assert isinstance(gate, Gate)
    return gate
