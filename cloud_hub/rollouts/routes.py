"""REST of the rollouts room: `/v1/rollouts`.

`router(desk)` makes the routes. A rollout is asked for in the shape of shared/rollout.py `Spec`; unknown fields and
wrong types are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response

from cloud_hub.ground.auth import Principal, Role, require
from cloud_hub.ground.bodies import json_answer, read_json, takes
from cloud_hub.rollouts.desk import NEWEST, Desk
from shared import limits
from shared.rollout import RolloutView, Spec, parse_spec

Viewer = Annotated[Principal, Depends(require(Role.VIEWER))]
Operator = Annotated[Principal, Depends(require(Role.OPERATOR))]
Limit = Annotated[int, Query(ge=1, le=limits.MAX_PAGE_ITEMS)]


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rollout to begin, or with `draft` only to keep."""

    spec: Any
    draft: bool = False


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why it shall wait."""

    reason: str = ""


class Abort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the devices get back what they ran before."""

    revert: bool = True


def router(desk: Desk) -> APIRouter:
    """The room's routes over this desk."""
    routes = APIRouter(prefix="/v1/rollouts", tags=["rollouts"])
    rollouts = _Rollouts(desk)
    add, one = routes.add_api_route, "/{rollout}"
    add("/plan", rollouts.plan, methods=["POST"], operation_id="plan_rollout", **takes(Spec))
    add("", rollouts.start, methods=["POST"], operation_id="start_rollout", status_code=201, **takes(Start))
    add("", rollouts.page, methods=["GET"], operation_id="list_rollouts", response_model=None)
    add(one, rollouts.get, methods=["GET"], operation_id="get_rollout", response_model=None)
    add(f"{one}/devices", rollouts.devices, methods=["GET"], operation_id="rollout_devices", response_model=None)
    add(f"{one}/decisions", rollouts.explain, methods=["GET"], operation_id="rollout_decisions", response_model=None)
    add(f"{one}/start", rollouts.start_draft, methods=["POST"], operation_id="start_draft", response_model=None)
    add(f"{one}/pause", rollouts.pause, methods=["POST"], operation_id="pause_rollout", **takes(Pause))
    add(f"{one}/resume", rollouts.resume, methods=["POST"], operation_id="resume_rollout", response_model=None)
    add(f"{one}/abort", rollouts.abort, methods=["POST"], operation_id="abort_rollout", **takes(Abort))
    return routes


class _Rollouts:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def plan(self, request: Request, _principal: Viewer) -> Response:
        """Whom a rollout would be for, its stages, its bytes, and what its canary can miss. Changes nothing."""
        return json_answer(await self._desk.plan(parse_spec(await read_json(request, Any))))

    async def start(self, request: Request, principal: Operator) -> Response:
        """Start a rollout, or keep it as a draft."""
        body = await read_json(request, Start)
        spec = parse_spec(body.spec)
        begin = self._desk.draft if body.draft else self._desk.start
        return json_answer(await begin(spec, actor=principal.actor), status=201)

    async def page(
        self, _principal: Viewer, after: Annotated[int, Query(ge=1)] = NEWEST, limit: Limit = 50
    ) -> Response:
        """Rollouts, newest first."""
        found = await self._desk.page(below=after, limit=limit + 1)
        more = len(found) > limit
        views = [view for _, view in found[:limit]]
        return json_answer({"items": views, "next": found[limit - 1][0] if more else None})

    async def get(self, rollout: str, _principal: Viewer) -> Response:
        """One rollout: its phase, its stage, its devices by condition, and what the gates said last."""
        return json_answer(await self._desk.get(rollout))

    async def devices(
        self, rollout: str, _principal: Viewer, after: Annotated[int, Query(ge=-1)] = -1, limit: Limit = 100
    ) -> Response:
        """The rollout's devices in the order of offers."""
        found = await self._desk.devices(rollout, after=after, limit=limit + 1)
        more = len(found) > limit
        return json_answer({"items": found[:limit], "next": found[limit - 1].position if more else None})

    async def explain(
        self, rollout: str, _principal: Viewer, after: Annotated[int, Query(ge=0)] = 0, limit: Limit = 100
    ) -> Response:
        """Every decision with the numbers that it was taken from, oldest first."""
        found = await self._desk.explain(rollout, after=after, limit=limit + 1)
        more = len(found) > limit
        return json_answer({"items": found[:limit], "next": found[limit - 1].seq if more else None})

    async def start_draft(self, rollout: str, principal: Operator) -> Response:
        """Start a draft."""
        return json_answer(await self._desk.start_draft(rollout, actor=principal.actor))

    async def pause(self, request: Request, rollout: str, principal: Operator) -> Response:
        """Offer it to nobody else until it is resumed; gates are still read."""
        body = await read_json(request, Pause)
        return json_answer(await self._desk.pause(rollout, actor=principal.actor, reason=body.reason))

    async def resume(self, rollout: str, principal: Operator) -> Response:
        """Go on; acknowledges the devices that are harmed or unresolved so far."""
        return json_answer(await self._desk.resume(rollout, actor=principal.actor))

    async def abort(self, request: Request, rollout: str, principal: Operator) -> Response:
        """End it; devices go back to what they ran before unless `revert` is false."""
        body = await read_json(request, Abort)
        view: RolloutView = await self._desk.abort(rollout, actor=principal.actor, reverting=body.revert)
        return json_answer(view)
