"""REST of the rounds room: `/v1/rounds`. Bodies are msgspec structs: unknown fields are refused by name.

Large answers of devices are streamed and exempt from the bounds on other requests (prefix `/v1/rounds/`): an upload is
bounded by its announced length, by a deadline for each next piece of it, and by one for the whole.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response

from cloud_hub.ground import bodies
from cloud_hub.ground.auth import Principal, Role, require, require_device
from cloud_hub.ground.bodies import json_answer, read_json, takes
from cloud_hub.rounds.desk import Desk, Run, Spec
from cloud_hub.rounds.tables import RunRow
from shared import limits

STREAMED_PREFIX: Final = "/v1/rounds/"

Viewer = Annotated[Principal, Depends(require(Role.VIEWER))]
Operator = Annotated[Principal, Depends(require(Role.OPERATOR))]
ReleaseManager = Annotated[Principal, Depends(require(Role.RELEASE_MANAGER))]
Device = Annotated[Principal, Depends(require_device())]
Limit = Annotated[int, Query(ge=1, le=limits.MAX_PAGE_ITEMS)]
After = Annotated[str, Query(max_length=64)]


def router(desk: Desk) -> APIRouter:
    """The room's routes over this desk."""
    routes = APIRouter(prefix="/v1/rounds", tags=["rounds"])
    rounds = _Rounds(desk)
    add = routes.add_api_route
    add("", rounds.start, methods=["POST"], operation_id="start_round", status_code=201, **takes(Spec))
    add("", rounds.page, methods=["GET"], operation_id="list_rounds", response_model=None)
    add("/{run}", rounds.get, methods=["GET"], operation_id="get_round", response_model=None)
    add("/{run}/stop", rounds.stop, methods=["POST"], operation_id="stop_round", response_model=None)
    replies = "/{run}/replies/{message}"
    add(replies, rounds.reply, methods=["PUT"], operation_id="put_round_reply", status_code=201, response_model=None)
    return routes


class _Rounds:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def start(self, request: Request, principal: ReleaseManager) -> Response:
        """Begin a federated run from a published release; its result becomes a model that waits to be signed."""
        run = await self._desk.start(await read_json(request, Spec), actor=principal.actor)
        return json_answer(_document(run), status=201)

    async def page(self, _principal: Viewer, after: After = "", limit: Limit = 100) -> Response:
        """Runs, newest first."""
        rows = await self._desk.page(after=after, limit=limit + 1)
        more = len(rows) > limit
        items = [_summary(row) for row in rows[:limit]]
        return json_answer({"items": items, "next": items[-1]["run"] if more else None})

    async def get(self, run: str, _principal: Viewer) -> Response:
        """One run with its finished rounds."""
        return json_answer(_document(await self._desk.get(run)))

    async def stop(self, run: str, principal: Operator) -> Response:
        """End a run for good."""
        return json_answer(_document(await self._desk.stop(run, actor=principal.actor)))

    async def reply(self, request: Request, run: str, message: str, principal: Device) -> Response:
        """A device's large answer to a task; 201 when it is new, 200 when the hub has one already."""
        assert principal.device is not None
        length, pieces = bodies.announced_length(request), bodies.pieces(request)
        is_new = await self._desk.upload(principal.device, run=run, message=message, length=length, pieces=pieces)
        return json_answer({"run": run, "message": message}, status=201 if is_new else 200)


def _summary(row: RunRow) -> dict[str, Any]:
    return {
        "run": row.run,
        "state": row.state,
        "round": row.round,
        "spec": row.spec,
        "features": row.head.features,
        "width": row.head.width,
        "classes": row.head.classes,
        "code": row.code,
        "reason": row.reason,
        "hint": row.hint,
        "created_ms": row.created_ms,
        "created_by": row.created_by,
        "finished_ms": row.finished_ms,
        "model": row.model,
    }


def _document(run: Run) -> dict[str, Any]:
    last = run.results[-1].metrics if run.results else {}
    return {**_summary(run.row), "accuracy": last.get("accuracy"), "rounds": run.results}
