"""Everything that shows the device's certificate or trusts the hub's CA, and who keeps both alive. Part of the
composition root.

Rules of this file:
1. All of these go by the trusted time. Only the question for the time goes without dates (adapters/tls.py).
2. After a renewal each of them goes on with the new pair from its next connection on. A new CA is taken by all of them,
   the question for the time included. That the new certificate has begun to be valid is proof that this moment has
   passed.

A device whose clock has died and whose certificate has expired comes back in three steps: the time is asked without a
certificate, the renewal goes by that time and shows none to TLS, and the rest connects with the new one. The first two
follow a CA's link, so that the hub may have changed its CA meanwhile.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.adapters.cloud import HubCloud
from edge_agent.adapters.courier import MqttCourier, broker_context
from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.hub_time import HubTime
from edge_agent.adapters.ledger import SqliteLedger
from edge_agent.adapters.renewer import LiveRenewer
from edge_agent.adapters.sources import SourcedFetcher
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import dated_context, undated_context
from edge_agent.adapters.verifier import LiveVerifier
from edge_agent.driver.events import MessageArrived, Noted
from edge_agent.driver.loop import Inbox, Loop
from edge_agent.driver.renewals import Renewals
from edge_agent.driver.timekeeping import Timekeeping
from edge_agent.driver.uplink import Uplink
from edge_agent.identity import TRUST_DIR, Identity, load_identity
from edge_agent.ports import CertificateLife
from edge_agent.settings import AgentConfig
from edge_agent.update_ports import Fetcher
from shared.ids import DeviceId


@dataclass(frozen=True, slots=True)
class Connections:
    """What reaches the hub and its broker, and what is built on that."""

    fetcher: Fetcher
    cloud: HubCloud
    courier: MqttCourier
    verifier: LiveVerifier
    timekeeping: Timekeeping
    renewals: Renewals


def connect(
    config: AgentConfig,
    identity: Identity,
    *,
    profile: str,
    clock: SystemClock,
    loop: Loop,
    ledger: SqliteLedger,
    uplink: Callable[[], Uplink],
) -> Connections:
    """Make them all; raises TransferRefused when the identity's files cannot be used."""
    url = config.hub.url or identity.hub_url

    def now_ms() -> int:  # connections go by the time, and who finds that out needs connections
        return timekeeping.now_ms()

    context = _hub_context(identity, now_ms)
    hub = HubFetcher(hub_url=url, context=context, clock=clock)
    undated = HubFetcher(hub_url=url, context=undated_context(identity.ca_path), clock=clock)
    mirrors = [HubFetcher(hub_url=at, context=context, clock=clock) for at in (config.updates.mirror,) if at]
    fetcher = SourcedFetcher(hub=hub, mirrors=tuple(mirrors), clock=clock) if mirrors else hub
    cloud = HubCloud(hub_url=url, context=context, clock=clock)
    courier = _courier(config, identity, loop.inbox, uplink, now_ms=now_ms)
    verifier = _verifier(config, identity, profile=profile, fetcher=fetcher)
    renewer = LiveRenewer(
        state_dir=config.state_dir, hub_url=config.hub.url, now_ms=now_ms, basis=lambda: timekeeping.basis
    )
    timekeeping = Timekeeping(
        clock=clock,
        loop=loop,
        ledger=ledger,
        source=_hub_time(undated, renewer, verifier, device=identity.device),
        note=lambda name, detail: loop.inbox.post(Noted(name, detail)),
        issued_ms=identity.not_before_ms,
    )

    def adopt() -> None:
        new = load_identity(config.state_dir)
        context, unshown, broker = _hub_context(new, now_ms), undated_context(new.ca_path), _broker_context(new, now_ms)
        for each in (hub, *mirrors):
            each.adopt(context)
        cloud.adopt(context)
        undated.adopt(unshown)
        courier.adopt(broker)
        timekeeping.proven(new.not_before_ms)

    renewals = Renewals(
        now_ms=now_ms,
        loop=loop,
        renewer=renewer,
        life=CertificateLife(not_before_ms=identity.not_before_ms, not_after_ms=identity.not_after_ms),
        adopt=adopt,
    )
    return Connections(
        fetcher=fetcher, cloud=cloud, courier=courier, verifier=verifier, timekeeping=timekeeping, renewals=renewals
    )


def _hub_time(fetcher: HubFetcher, renewer: LiveRenewer, verifier: LiveVerifier, *, device: DeviceId) -> HubTime:
    return HubTime(fetcher=fetcher, follow=renewer.follow, verifier=verifier, device=device, random=secrets.token_bytes)


def _courier(
    config: AgentConfig, identity: Identity, inbox: Inbox, uplink: Callable[[], Uplink], *, now_ms: Callable[[], int]
) -> MqttCourier:
    return MqttCourier(
        host=config.broker.host or identity.broker_host,
        port=config.broker.port or identity.broker_port,
        device=identity.device,
        context=_broker_context(identity, now_ms),
        on_message=lambda topic, payload: inbox.post(MessageArrived(topic, payload)),
        on_lost=lambda reason: uplink().lost(reason),
        on_refused=lambda topic, ref, code, reason: uplink().refused(topic, ref, code, reason),
        on_taken=lambda ref: uplink().taken(ref),
    )


def _verifier(config: AgentConfig, identity: Identity, *, profile: str, fetcher: Fetcher) -> LiveVerifier:
    return LiveVerifier(
        trust_dir=config.state_dir / TRUST_DIR,
        device=identity.device,
        profile=profile,
        fetcher=fetcher,
        accept_learned=config.updates.accept_learned,
    )


def _hub_context(identity: Identity, now_ms: Callable[[], int]) -> ssl.SSLContext:
    return dated_context(
        identity.ca_path,
        now_ms=now_ms,
        certificate_path=identity.certificate_path,
        key_path=identity.key_path,
    )


def _broker_context(identity: Identity, now_ms: Callable[[], int]) -> ssl.SSLContext:
    return broker_context(
        ca_path=identity.ca_path,
        certificate_path=identity.certificate_path,
        key_path=identity.key_path,
        now_ms=now_ms,
    )
