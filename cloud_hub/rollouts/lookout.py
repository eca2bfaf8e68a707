"""The picture that one look at a rollout is decided from: who is here, and what was said of which release.

Rules of this file:
1. Of a device that was offered the release, figures of the release count from its offer on (its cohort's first, by the
   minute): what an earlier attempt left behind is not evidence. What arrives later than that is taken for new.
2. Silence is judged only since we listen: since the start, or since the link to the broker last came up.
3. What is known of the time before changes little and is long to read. It is read again only after a pause that is a
   multiple of the time that reading it took.

Not here: what follows (rules.py), when to look (controller.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cloud_hub.devices.desk import Device
from cloud_hub.rollouts.answers import Answers
from cloud_hub.rollouts.evidence import controls_of
from cloud_hub.rollouts.values import Looked, Rollout, Seen, Sighting
from shared import limits
from shared.clock import Clock
from shared.ids import DeviceId
from shared.sketch import Sketch

PAST_PACE: Final = 20
"""What was before the rollout is read again after so many times what reading it took."""


class Fleet(Protocol):
    """What is asked of the devices room (cloud_hub/devices/desk.py)."""

    async def list(
        self, *, after: str = "", limit: int = limits.MAX_PAGE_ITEMS, labels: Mapping[str, str] | None = None
    ) -> tuple[Device, ...]:
        """Devices by name, those after `after`, at most `limit`."""
        ...


class VersionFigures(Protocol):
    """Figures of one version on one device."""

    @property
    def device(self) -> DeviceId:
        """Whose."""
        ...

    @property
    def version(self) -> str:
        """Of which version."""
        ...

    @property
    def answered(self) -> int:
        """Requests that got an answer."""
        ...

    @property
    def right(self) -> int:
        """Answers of which the application said that they were right."""
        ...

    @property
    def wrong(self) -> int:
        """Answers of which it said that they were wrong."""
        ...

    @property
    def latency(self) -> Sketch:
        """Microseconds."""
        ...


class FigureSource(Protocol):
    """What is asked of the telemetry room (cloud_hub/telemetry/desk.py)."""

    async def figures(
        self, *, family: str, since_ms: int, devices: Iterable[DeviceId] | None = None
    ) -> Sequence[VersionFigures]:
        """Figures since the minute of a time, by device and version."""
        ...


Link = Callable[[], int | None]
"""Since when the link to the broker is up, None while it is down."""


def always_up() -> int | None:
    """A link that nothing is known of."""
    return 0


@dataclass(frozen=True, slots=True)
class _Past:
    """What was read of the time before a rollout, when that ended, and how long it took."""

    seen: tuple[Seen, ...]
    read_ms: int
    took_ms: int


class Lookout:
    """Looks at the fleet; changes nothing.

    Args:
        clock: for the time of a look.
        fleet, figures: the other rooms.
        link: since when the link to the broker is up.
    """

    def __init__(self, *, clock: Clock, fleet: Fleet, figures: FigureSource, link: Link = always_up) -> None:
        self._clock = clock
        self._fleet = fleet
        self._figures = figures
        self._link = link
        self._started_ms = clock.wall_ms()
        self._pasts: dict[str, _Past] = {}

    async def fleet(self) -> dict[DeviceId, Device]:
        """Every device."""
        found: dict[DeviceId, Device] = {}
        after = ""
        while page := await self._fleet.list(after=after, limit=limits.MAX_PAGE_ITEMS):
            found |= {device.id: device for device in page}
            after = page[-1].id
        return found

    async def seen(self, family: str, *, since_ms: int, devices: Iterable[DeviceId]) -> tuple[Seen, ...]:
        """What the devices said of a family's versions since a time."""
        figures = await self._figures.figures(family=family, since_ms=since_ms, devices=list(devices))
        return tuple(
            Seen(
                DeviceId(one.device),
                one.version,
                Answers(answered=one.answered, right=one.right, wrong=one.wrong, latency=one.latency),
            )
            for one in figures
        )

    async def picture(self, state: Rollout, fleet: Mapping[DeviceId, Device]) -> Looked:
        """What is known of a rollout's devices now."""
        family, gates = state.spec.family, state.spec.gates
        compares = gates.outcomes.enabled or gates.latency.enabled
        new = await self._new(state)
        old = await self._old(state) if compares else ()
        return Looked(
            at_ms=self._clock.wall_ms(),
            watching_since_ms=self._since(),
            sightings={
                member.device: sighting_of(fleet[member.device], family)
                for member in state.members
                if member.device in fleet
            },
            new=new,
            old=old,
        )

    def forget(self, *, but: Iterable[str]) -> None:
        """Drop what is kept of rollouts, except these."""
        kept = set(but)
        self._pasts = {rollout: past for rollout, past in self._pasts.items() if rollout in kept}

    async def _new(self, state: Rollout) -> tuple[Seen, ...]:
        cohorts: dict[int, list[DeviceId]] = {}
        since: dict[int, int] = {}
        for member in state.members:
            if member.is_touched:
                cohorts.setdefault(member.cohort, []).append(member.device)
                since[member.cohort] = min(since.get(member.cohort, member.offered_ms), member.offered_ms)
        found: list[Seen] = []
        for cohort, devices in cohorts.items():
            found += await self.seen(state.spec.family, since_ms=since[cohort], devices=devices)
        controls = [member.device for member in controls_of(state.members)]
        if controls and state.spec.gates.latency.enabled:
            found += await self.seen(state.spec.family, since_ms=state.started_ms, devices=controls)
        return tuple(found)

    async def _old(self, state: Rollout) -> tuple[Seen, ...]:
        began_ms = self._clock.mono_ms()
        past = self._pasts.get(state.id)
        if past is None or began_ms - past.read_ms >= past.took_ms * PAST_PACE:
            since_ms = state.started_ms - state.spec.baseline_s * 1000
            names = [member.device for member in state.members]
            seen = await self.seen(state.spec.family, since_ms=since_ms, devices=names)
            read_ms = self._clock.mono_ms()
            past = self._pasts[state.id] = _Past(seen, read_ms=read_ms, took_ms=read_ms - began_ms)
        return past.seen

    def _since(self) -> int:
        up_since_ms = self._link()
        return self._clock.wall_ms() if up_since_ms is None else max(self._started_ms, up_since_ms)


def sighting_of(device: Device, family: str) -> Sighting:
    """A device with its slot of a family, from its newest report."""
    models = device.reported.get("models", ())
    slot: Mapping[str, str] = next((model for model in models if model.get("family") == family), {})
    return Sighting(
        device=device.id,
        profile=device.profile,
        labels=device.labels,
        online=device.online,
        last_seen_ms=device.last_seen_ms or 0,
        assignment_version=device.assignment_version,
        phase=slot.get("phase", ""),
        version=slot.get("version", ""),
        manifest=slot.get("manifest", ""),
        candidate=slot.get("candidate", ""),
        error_code=slot.get("error_code", ""),
        error=slot.get("error", ""),
        failed=slot.get("failed", ""),
        standing=device.standing.value,
    )
