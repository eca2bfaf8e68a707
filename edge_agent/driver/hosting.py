"""The model hosts at work: brings them up on verified files, notices when one is lost, probes, stops.

A host is named by the key of its release. Which host answers for which family is not decided here
(edge_agent/driver/models.py keeps the routes), nor is when to start or stop one (edge_agent/core/slots.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from edge_agent.core.slot_values import AnswerBad, AnswerGood, Event, FilesBad, HostFailed, HostReady, Installed
from edge_agent.driver.events import ForSlot
from edge_agent.driver.loop import Loop
from edge_agent.opening import open_verified
from edge_agent.ports import Hosts, ModelHost
from edge_agent.update_ports import Shelf
from shared.errors import HostLost, OutriderError, StorageError, TransferCorrupt
from shared.ids import FamilyName

logger = logging.getLogger(__name__)


class Hosting:
    """The hosts that are up, and those on their way."""

    def __init__(self, *, loop: Loop, shelf: Shelf, hosts: Hosts, on_change: Callable[[FamilyName], None]) -> None:
        """`on_change(family)` is called after a host of the family came up or went away."""
        self._inbox, self._works = loop.inbox, loop.works
        self._shelf = shelf
        self._starter = hosts
        self._on_change = on_change
        self._hosts: dict[str, ModelHost] = {}
        self._starting: set[str] = set()

    def get(self, key: str | None) -> ModelHost | None:
        """The host of this release, while it is up."""
        return self._hosts.get(key) if key is not None else None

    def pids(self) -> dict[str, int]:
        """Process ids by release key."""
        return {key: host.pid for key, host in self._hosts.items()}

    def start(self, family: FamilyName, release: Installed) -> None:
        """See that the release's host runs; answered by HostReady, HostFailed or FilesBad."""
        if release.key in self._hosts:
            self._inbox.post(ForSlot(family, HostReady(release.key)))
        elif release.key not in self._starting:
            self._starting.add(release.key)
            self._works.start(("host", release.key), self._bring_up(family, release))

    def stop(self, family: FamilyName, key: str) -> None:
        """Drain and end the release's host, or give up bringing it up."""
        self._starting.discard(key)
        self._works.cancel(("host", key))
        self._works.cancel(("probe", key))
        host = self._hosts.pop(key, None)
        if host is not None:
            self._on_change(family)
            self._works.start(("stop", key, host.pid), host.stop())

    async def stop_all(self) -> None:
        """End every host; for the end."""
        hosts, self._hosts = list(self._hosts.values()), {}
        for host in hosts:
            await host.stop()

    def probe(self, family: FamilyName, key: str, count: int) -> None:
        """Run that many golden samples; each is answered by AnswerGood or AnswerBad."""
        self._works.start(("probe", key), self._probe(family, key, count))

    def cancel_probes(self, key: str) -> None:
        """Ask the host no more golden samples."""
        self._works.cancel(("probe", key))

    async def _bring_up(self, family: FamilyName, release: Installed) -> None:
        key = release.key
        ended: list[str] = []

        def lost(reason: str) -> None:
            ended.append(reason)
            if self._hosts.get(key) is host:
                self._lost(family, key, reason)

        host: ModelHost | None = None
        outcome: Event
        try:
            host, load_ms = await self._load(release, lost)
            if ended:
                raise HostLost(f"the model host ended right after its start: {ended[0]}")
        except TransferCorrupt as error:
            outcome = FilesBad(key=key, code=error.code, message=error.message)
        except StorageError as error:
            gone = error.code == "storage.missing"
            outcome = FilesBad(key=key, code=error.code, message=error.message, retry=not gone)
        except OutriderError as error:
            outcome = HostFailed(key=key, code=error.code, message=error.message, retry=error.retry)
        else:
            version = release.manifest.version
            logger.info("model host ready", extra={"family": family, "version": version, "load_ms": load_ms})
            self._hosts[key] = host
            self._on_change(family)
            outcome = HostReady(key)
        self._starting.discard(key)
        self._inbox.post(ForSlot(family, outcome))

    async def _load(self, release: Installed, on_lost: Callable[[str], None]) -> tuple[ModelHost, int]:
        model_fd = await open_verified(self._shelf, release.served.file)
        try:
            golden_fd = await open_verified(self._shelf, release.manifest.golden.file)
        except BaseException:
            os.close(model_fd)
            raise
        host, ready = await self._starter.start(
            manifest=release.manifest,
            variant=release.served,
            model_fd=model_fd,
            golden_fd=golden_fd,
            on_lost=on_lost,
        )
        return host, ready.load_ms

    def _lost(self, family: FamilyName, key: str, reason: str) -> None:
        self._hosts.pop(key, None)
        self._on_change(family)
        logger.warning("model host lost", extra={"family": family, "reason": reason})
        self._inbox.post(ForSlot(family, HostFailed(key=key, code="model.host_lost", message=reason, retry=True)))

    async def _probe(self, family: FamilyName, key: str, count: int) -> None:
        for _ in range(count):
            host = self._hosts.get(key)
            if host is None:
                return
            try:
                good = await host.probe()
            except HostLost:
                return  # told by on_lost
            except OutriderError as error:
                self._inbox.post(ForSlot(family, AnswerBad(key=key, code=error.code, message=error.message)))
                continue
            except TimeoutError:
                message = "a golden sample got no answer in time"
                self._inbox.post(ForSlot(family, AnswerBad(key=key, code="model.slow", message=message)))
                continue
            if good:
                self._inbox.post(ForSlot(family, AnswerGood(key)))
            else:
                message = "a golden sample got another answer than the recorded one"
                self._inbox.post(ForSlot(family, AnswerBad(key=key, code="model.golden", message=message)))
