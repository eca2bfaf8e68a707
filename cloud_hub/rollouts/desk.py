"""The rollouts room's one public face: plan, start, pause, resume, abort, and what was decided and why.

Not here: how a rollout goes on by itself (controller.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground.bus import Bus
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotFound
from cloud_hub.releases.desk import Desk as Releases
from cloud_hub.rollouts import planning, rules, tables
from cloud_hub.rollouts.controller import Assigner, Controller, Counts, record, store, unknown
from cloud_hub.rollouts.lookout import FigureSource, Fleet, Link, Lookout, always_up, sighting_of
from cloud_hub.rollouts.planning import Chosen, Release
from cloud_hub.rollouts.values import AbortAsked, Note, PauseAsked, ResumeAsked, Rollout, Sighting, Started
from shared.clock import Clock
from shared.errors import Conflict
from shared.ids import DeviceId
from shared.rollout import (
    DecisionView,
    DeviceView,
    Phase,
    Plan,
    RolloutView,
    SkippedView,
    Spec,
    StageView,
    check_spec,
    harmed_limit,
)

__all__ = ["Assigner", "Desk", "FigureSource", "Fleet", "Link"]

NEWEST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What a rollout that is asked for would meet."""

    release: Release
    fleet: dict[DeviceId, Sighting]
    notes: tuple[str, ...]


class Desk:
    """The rollouts room.

    Args:
        database, clock, metrics: the hub's.
        fleet: the devices room.
        releases: the releases room.
        figures: the telemetry room.
        bus: tells of births and reports.
        assigner: makes assignments; the releases room's where none is given.
        link: since when the link to the broker is up.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        fleet: Fleet,
        releases: Releases,
        figures: FigureSource,
        bus: Bus,
        assigner: Assigner | None = None,
        link: Link = always_up,
    ) -> None:
        self._database = database
        self._clock = clock
        self._releases = releases
        self._lookout = Lookout(clock=clock, fleet=fleet, figures=figures, link=link)
        self.controller = Controller(
            database=database,
            clock=clock,
            counts=Counts(metrics),
            lookout=self._lookout,
            assigner=assigner or releases.assigning,
        )
        self.controller.listen(bus)

    async def run(self) -> None:
        """Let rollouts go on until cancelled; belongs into the hub's task group."""
        await self.controller.run()

    # Asking for a rollout

    async def plan(self, spec: Spec) -> Plan:
        """What the rollout would do; changes nothing. Raises as `start`."""
        ahead = await self._ahead(spec)
        taken = await self._database.read(lambda conn: tables.taken(conn, spec.family))
        chosen = planning.choose(ahead.fleet, spec, manifest=ahead.release.manifest, taken=taken)
        since_ms = self._clock.wall_ms() - spec.baseline_s * 1000
        old = await self._lookout.seen(spec.family, since_ms=since_ms, devices=chosen.eligible)
        return planning.plan(chosen, spec, release=ahead.release, old=old, warnings=ahead.notes)

    async def draft(self, spec: Spec, *, actor: str) -> RolloutView:
        """Keep a rollout without starting it. Raises as `start`."""
        ahead = await self._ahead(spec)
        state = await self._database.write(lambda conn: self._add(conn, spec, ahead, actor=actor))
        return await self.get(state.id)

    async def start(self, spec: Spec, *, actor: str) -> RolloutView:
        """Start a rollout.

        Raises:
            InvalidValue: the specification makes no sense.
            NotFound: there is no such release.
            Conflict: it is not published, no device is eligible, or another rollout of the family has one of them.
        """
        ahead = await self._ahead(spec)

        def work(conn: Connection) -> Rollout:
            return self._start(conn, self._add(conn, spec, ahead, actor=actor), ahead, actor=actor)

        state = await self._database.write(work)
        self.controller.wake()
        return await self.get(state.id)

    async def start_draft(self, rollout: str, *, actor: str) -> RolloutView:
        """Start a rollout that was kept as a draft. Raises as `start`, and Conflict when it is no draft any more."""
        ahead = await self._ahead((await self.controller.load(rollout)).spec)

        def work(conn: Connection) -> Rollout:
            state = tables.load(conn, rollout)
            if state is None:
                raise unknown(rollout)
            if state.phase is not Phase.DRAFT:
                raise Conflict(f"rollout {rollout} is {state.phase.value}", code="conflict.rollout_phase")
            return self._start(conn, state, ahead, actor=actor)

        await self._database.write(work)
        self.controller.wake()
        return await self.get(rollout)

    # Steering

    async def pause(self, rollout: str, *, actor: str, reason: str = "") -> RolloutView:
        """Offer it to nobody else until it is resumed; gates are still read. Raises NotFound, Conflict."""
        at_ms = self._clock.wall_ms()
        await self.controller.apply(rollout, lambda _: PauseAsked(at_ms=at_ms, actor=actor, reason=reason))
        return await self.get(rollout)

    async def resume(self, rollout: str, *, actor: str) -> RolloutView:
        """Go on, having seen which devices are harmed or unresolved. Raises NotFound, Conflict."""
        at_ms = self._clock.wall_ms()
        await self.controller.apply(rollout, lambda _: ResumeAsked(at_ms=at_ms, actor=actor))
        return await self.get(rollout)

    async def abort(self, rollout: str, *, actor: str, reverting: bool) -> RolloutView:
        """End it, and give the devices back what they ran before if `reverting`. Raises NotFound, Conflict."""
        at_ms = self._clock.wall_ms()
        await self.controller.apply(rollout, lambda _: AbortAsked(at_ms=at_ms, actor=actor, reverting=reverting))
        return await self.get(rollout)

    # Looking

    async def get(self, rollout: str) -> RolloutView:
        """One rollout; raises NotFound."""

        def work(conn: Connection) -> RolloutView | None:
            head = tables.load_head(conn, rollout)
            return None if head is None else _view(head, tables.tally(conn, rollout))

        view = await self._database.read(work)
        if view is None:
            raise unknown(rollout)
        return view

    async def page(self, *, below: int = NEWEST, limit: int) -> list[tuple[int, RolloutView]]:
        """Rollouts with their numbers below this one, newest first."""

        def work(conn: Connection) -> list[tuple[int, RolloutView]]:
            heads = tables.list_heads(conn, below=below, limit=limit)
            return [(number, _view(head, tables.tally(conn, head.id))) for number, head in heads]

        return await self._database.read(work)

    async def devices(self, rollout: str, *, after: int = -1, limit: int) -> list[DeviceView]:
        """The rollout's devices behind a position, in the order of offers; raises NotFound."""
        await self.get(rollout)
        found = await self._database.read(lambda conn: tables.list_members(conn, rollout, after=after, limit=limit))
        return [
            DeviceView(
                device=member.device,
                position=member.position,
                condition=member.condition,
                wish=member.wish,
                before=member.before,
                assignment_version=member.assignment_version,
                offered_ms=member.offered_ms,
                resolved_ms=member.resolved_ms,
                reason=member.reason,
                settled=member.settled,
                stranded=member.stranded,
            )
            for member in found
        ]

    async def explain(self, rollout: str, *, after: int = 0, limit: int) -> list[DecisionView]:
        """Every decision with its numbers, oldest first; raises NotFound."""
        await self.get(rollout)
        return await self._database.read(lambda conn: tables.list_decisions(conn, rollout, after=after, limit=limit))

    # Small parts

    async def _ahead(self, spec: Spec) -> _Ahead:
        check_spec(spec)
        row = await self._releases.catalogue.get(spec.family, spec.version)
        if row.published_ms is None or not row.files:
            raise Conflict(
                f"{spec.family}/{spec.version} is not published",
                code="conflict.not_published",
                hint=f"`outrider release sign {spec.family}/{spec.version} --keys DIR`, then publish it",
            )
        devices = await self._lookout.fleet()
        fleet = {name: sighting_of(device, spec.family) for name, device in devices.items()}
        notes = await self._no_way_back(spec, fleet, floor=row.min_release_counter or 0)
        # The manifest, the golden samples, and the largest of the variants.
        least, variants = row.files[:2], row.files[2:]
        most = sum(file.length for file in least) + max((file.length for file in variants), default=0)
        return _Ahead(release=Release(manifest=row.files[0].digest, bytes=most), fleet=fleet, notes=tuple(notes))

    async def _no_way_back(self, spec: Spec, fleet: Mapping[DeviceId, Sighting], *, floor: int) -> list[str]:
        notes = []
        for version in sorted({sighting.version for sighting in fleet.values()} - {"", spec.version}):
            try:
                counter = (await self._releases.catalogue.get(spec.family, version)).release_counter or 0
            except NotFound:
                notes.append(f"devices that run {version} cannot go back: the hub has no such release")
                continue
            if counter < floor:
                raised = f"{spec.family}/{spec.version} raises the security floor above it"
                notes.append(f"devices that run {version} cannot go back: {raised}")
        return notes

    def _add(self, conn: Connection, spec: Spec, ahead: _Ahead, *, actor: str) -> Rollout:
        name, number = tables.next_id(conn, spec.family, spec.version)
        at_ms = self._clock.wall_ms()
        state = Rollout(id=name, spec=spec, manifest=ahead.release.manifest, created_ms=at_ms, created_by=actor)
        tables.add(conn, state, number=number)
        notes = (Note(at_ms=at_ms, actor=actor, kind="drafted", text=f"{spec.family}/{spec.version}"),)
        tables.add_decisions(conn, name, notes)
        record(conn, name, notes)
        return state

    def _start(self, conn: Connection, state: Rollout, ahead: _Ahead, *, actor: str) -> Rollout:
        spec = state.spec
        taken = tables.taken(conn, spec.family)
        chosen = planning.choose(ahead.fleet, spec, manifest=state.manifest, taken=taken)
        _refuse_overlap(chosen.skipped, taken)
        if not chosen.eligible:
            raise Conflict("no device is eligible", code="conflict.no_devices", hint=_why_none(chosen))
        started = Started(at_ms=self._clock.wall_ms(), actor=actor, members=planning.members(chosen, spec))
        decision = rules.decide(state, started)
        store(conn, state, decision.state, decision.effects)
        return decision.state


def _refuse_overlap(skipped: tuple[SkippedView, ...], taken: dict[DeviceId, str]) -> None:
    both = [one.device for one in skipped if one.device in taken]
    if both:
        other = taken[DeviceId(both[0])]
        raise Conflict(
            f"{len(both)} of the devices are in rollout {other} ({both[0]} for one)",
            code="conflict.rollout",
            hint=f"wait for it, or `outrider rollout abort {other}`",
        )


def _why_none(chosen: Chosen) -> str:
    reasons = sorted({one.reason for one in chosen.skipped})
    return f"devices that match: {'; '.join(reasons)[:300]}" if reasons else "no device matches: `outrider ls devices`"


def _view(head: Rollout, tally: tables.Tally) -> RolloutView:
    eligible = sum(tally.conditions.values())
    stage = None
    if head.stage is not None:
        stage = StageView(
            number=head.stage.index + 1,
            of=len(head.sizes),
            size=head.sizes[head.stage.index],
            phase=head.stage.phase,
            since_ms=head.stage.since_ms,
        )
    return RolloutView(
        id=head.id,
        family=head.spec.family,
        version=head.spec.version,
        phase=head.phase,
        reason=head.reason,
        stage=stage,
        eligible=eligible,
        devices=dict(tally.conditions),
        returned=tally.returned,
        outstanding=tally.outstanding,
        stranded=tally.stranded,
        max_harmed=harmed_limit(head.spec, eligible),
        gates=head.readings,
        created_ms=head.created_ms,
        created_by=head.created_by,
        started_ms=head.started_ms or None,
        ended_ms=head.ended_ms or None,
        spec=head.spec,
    )
