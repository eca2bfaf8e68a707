"""Keeps devices out of the broker: writes the lists, has them read, and ends the session of who is on them.

A broker that reads its lists again goes on serving the sessions that it has. A session ends when another client comes
in under its name, so the hub issues itself a certificate of that name for a quarter of an hour, comes in with it, and
leaves. While it is in, it writes to the topic that nobody may write to since the lists were read (`revocation.py`):
the broker's refusal is the proof that it has read them, and that who was pushed out cannot come back.

Not here: who is to be kept out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.courier import LinkSettings
from cloud_hub.ground.revocation import AccessLists, RevokedCertificate
from shared.clock import Clock
from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.wire import topics

logger = logging.getLogger(__name__)

VISIT_DAYS: Final = 15 / (24 * 60)
VISIT_MS: Final = 2_000
"""One try to come in and be refused."""
ENFORCE_S: Final = 4.0
"""All tries together: a revoked device is silent within five seconds, or the hub says that it may not be."""
AGAIN_S: Final = 0.1
_POLL_S: Final = 0.05
_NOT_AUTHORIZED: Final = 0x87


@dataclass(frozen=True, slots=True)
class PushedOut:
    """What the broker has shown of names whose sessions were to end.

    Attributes:
        ended: their sessions have ended; who has them may come in again where the broker has not read the lists.
        out: the broker has read the lists, and their sessions have ended after that.
    """

    ended: frozenset[DeviceId] = frozenset()
    out: frozenset[DeviceId] = frozenset()


class BrokerAccess:
    """The broker's door, as far as the hub can close it.

    Args:
        lists: the files that the broker reads.
        authorities: issue the certificates for visits.
        link: where the broker is.
        reload: has the broker read its files again; does nothing where the broker is its owner's affair.
        clock: for certificates and deadlines.
    """

    def __init__(
        self,
        lists: AccessLists,
        *,
        authorities: Authorities,
        link: LinkSettings,
        reload: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.lists = lists
        self._authorities = authorities
        self._link = link
        self._reload = reload
        self._clock = clock
        self._turn = asyncio.Lock()
        self._visits = 0
        self._visited: dict[DeviceId, int] = {}

    async def enforce(
        self,
        *,
        revoked: Collection[RevokedCertificate],
        denied: Collection[DeviceId],
        kick: Collection[DeviceId],
    ) -> PushedOut:
        """Write the lists, have them read, and end these devices' sessions.

        Args:
            revoked, denied: all that the lists shall hold.
            kick: whose sessions end.

        Returns:
            What the broker has shown in time.

        Raises:
            StorageError: the lists cannot be written; nothing has changed.
        """
        async with self._turn:
            mark = await asyncio.to_thread(self.lists.write, revoked=revoked, denied=denied)
            self._reload()
            return await self._push_out(kick, mark)

    async def _push_out(self, kick: Collection[DeviceId], mark: str) -> PushedOut:
        """Visit each in turn until the broker refuses the marked topic, or the time is over.

        Who was visited longest ago comes first, so that one that stays in does not keep the others in.
        """
        ended: set[DeviceId] = set()
        out: set[DeviceId] = set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENFORCE_S):
                while waiting := sorted(set(kick) - out, key=lambda device: (self._visited.get(device, 0), device)):
                    for device in waiting:
                        reason = await self._visit(device, mark)
                        self._visits += 1
                        self._visited[device] = self._visits
                        if reason is not None:
                            ended.add(device)
                        if reason == _NOT_AUTHORIZED:
                            out.add(device)
                            del self._visited[device]
                    if not out.issuperset(waiting):
                        await asyncio.sleep(AGAIN_S)
        return PushedOut(ended=frozenset(ended), out=frozenset(out))

    async def _visit(self, device: DeviceId, mark: str) -> int | None:
        """What the broker answered to the marked topic while we were in under the device's name; None: not in."""
        deadline_ms = self._clock.mono_ms() + VISIT_MS

        def visit() -> int | None:
            pair = self._authorities.issue_client(device, now_ms=self._clock.wall_ms(), days=VISIT_DAYS)
            with tempfile.TemporaryDirectory(prefix=".visit-", dir=self._link.certificate.parent) as folder:
                certificate, key = Path(folder) / "visit.pem", Path(folder) / "visit.key"
                certificate.write_bytes(pair.certificate_pem)
                key.touch(mode=0o600)
                key.write_bytes(pair.key_pem)
                context = ssl.create_default_context(cafile=str(self._link.ca))
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.load_cert_chain(certificate, key)
            return self._write_marked(device, mark, context=context, deadline_ms=deadline_ms)

        try:
            return await asyncio.to_thread(visit)
        except (OSError, ValueError, OutriderError) as error:
            logger.debug("the broker could not be visited: %s", error)
            return None

    def _write_marked(self, device: DeviceId, mark: str, *, context: ssl.SSLContext, deadline_ms: int) -> int | None:
        reasons: list[int] = []
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=device, protocol=mqtt.MQTTv5, reconnect_on_failure=False
        )

        def connected(_client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
            if not reason.is_failure:
                client.publish(f"{topics.up_branch(device)}{mark}", b"", qos=1)

        def answered(_client: mqtt.Client, _data: Any, _mid: int, reason: ReasonCode, _properties: Any) -> None:
            reasons.append(reason.value)

        client.on_connect = connected
        client.on_publish = answered
        client.connect_timeout = VISIT_MS / 1000
        client.tls_set_context(context)
        client.connect(self._link.host, self._link.port, keepalive=5, clean_start=True)
        while not reasons and self._clock.mono_ms() < deadline_ms:
            if client.loop(_POLL_S) != mqtt.MQTT_ERR_SUCCESS:
                break
        client.disconnect()
        client.loop(_POLL_S)
        return reasons[0] if reasons else None
