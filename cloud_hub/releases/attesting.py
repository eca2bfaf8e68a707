"""Tells devices the time, signed: for those that have no clock, or one that nobody may trust.

Rules: whoever asks is answered, because a device without a clock may hold a certificate that has expired or is not
valid yet, and cannot show it; the answer is bound to the name and the nonce that were given, so it is of no use to
anybody else and at no other moment. The roots that are newer than the asker's come along, because the time key may
have changed since: they vouch for themselves.

Not here: how often one address may ask (routes.py), and what a device believes (shared/trust/time.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Database
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import tables
from cloud_hub.releases.online import KeySource
from shared.errors import StorageError
from shared.ids import DeviceId, parse_device_id
from shared.limits import MAX_ROOTS_WITH_TIME, MAX_TIME_ROOTS_BYTES
from shared.trust.roles import ROOT
from shared.trust.time import AttestedTime, check_nonce, sign_time

NO_TIME: Final = "not_found.time"


class Attesting:
    """Signs the time.

    Args:
        database: the hub's.
        sure_ms: the time, or ConfigError when the hub's clock is doubted.
        keys: the online keys, by root; where a root made earlier names no time key, no time is attested.
    """

    def __init__(self, *, database: Database, sure_ms: Callable[[], int], keys: KeySource) -> None:
        self._database = database
        self._sure_ms = sure_ms
        self._keys = keys

    async def attest(self, *, device: str, nonce: str, root_version: int) -> bytes:
        """The signed time, with the roots that come after this version.

        Raises:
            InvalidValue: the name or the nonce is unusable.
            NotFound: this hub attests no time.
            ConfigError: its clock is doubted.
        """
        name = parse_device_id(device)
        check_nonce(nonce)
        newest, roots = await self._database.read(lambda conn: (_newest(conn), _roots_after(conn, root_version)))
        signer = self._keys(newest).time
        if signer is None:
            raise NotFound("this hub attests no time", code=NO_TIME, hint="its root names no time key")
        # The clock is read last, so that the answer is as young as can be.
        time = AttestedTime(device=DeviceId(name), nonce=nonce, time_ms=self._sure_ms())
        signed = sign_time(time, signer)
        return signed[:-1] + b',"roots":' + json.dumps([root.decode() for root in roots]).encode() + b"}"


def _newest(conn: Connection) -> bytes:
    row = tables.find_metadata(conn, ROOT)
    if row is None:
        raise StorageError("the hub has no root", code="storage.no_repository", hint="run `outrider-hub init` first")
    return row.document


def _roots_after(conn: Connection, version: int) -> list[bytes]:
    """The next roots, as many as one answer may carry; a device that lacks more asks again."""
    found: list[bytes] = []
    room = MAX_TIME_ROOTS_BYTES
    for number in range(version + 1, version + 1 + MAX_ROOTS_WITH_TIME):
        row = tables.find_metadata(conn, ROOT, number)
        if row is None or (found and len(row.document) > room):
            break
        found.append(row.document)
        room -= len(row.document)
    return found
