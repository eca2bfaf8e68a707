"""REST of the rounds room: `/v1/rounds`. Bodies are msgspec structs: unknown fields are refused by name.

Large answers of devices are streamed and exempt from the bounds on other requests (prefix `/v1/rounds/`): an upload is
bounded by its announced length, and by a deadline for each next piece of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.requests import ClientDisconnect

from cloud_hub.ground.auth import Principal, Role, require, require_device
from cloud_hub.rounds.desk import Desk, Run, Spec
from cloud_hub.rounds.tables import RunRow
from shared import limits
from shared.errors import InvalidValue, TransferCorrupt

STREAMED_PREFIX: Final = "/v1/rounds/"
PIECE_DEADLINE_S: Final = 30.0
JSON_TYPE: Final = "application/json"

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
    add("", rounds.start, methods=["POST"], operation_id="start_round", status_code=201, **_body(Spec))
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
        run = await self._desk.start(await _spec(request), actor=principal.actor)
        return _json(_document(run), status=201)

    async def page(self, _principal: Viewer, after: After = "", limit: Limit = 100) -> Response:
        """Runs, newest first."""
        rows = await self._desk.page(after=after, limit=limit + 1)
        more = len(rows) > limit
        items = [_summary(row) for row in rows[:limit]]
        return _json({"items": items, "next": items[-1]["run"] if more else None})

    async def get(self, run: str, _principal: Viewer) -> Response:
        """One run with its finished rounds."""
        return _json(_document(await self._desk.get(run)))

    async def stop(self, run: str, principal: Operator) -> Response:
        """End a run for good."""
        return _json(_document(await self._desk.stop(run, actor=principal.actor)))

    async def reply(self, request: Request, run: str, message: str, principal: Device) -> Response:
        """A device's large answer to a task; 201 when it is new, 200 when the hub has one already."""
        assert principal.device is not None
        text = request.headers.get("content-length", "")
        if not text.isascii() or not text.isdigit() or len(text) > 15:
            raise InvalidValue("an upload needs a Content-Length", code="length_required", hint="send the file's size")
        is_new = await self._desk.upload(
            principal.device, run=run, message=message, length=int(text), pieces=_pieces(request)
        )
        return _json({"run": run, "message": message}, status=201 if is_new else 200)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(PIECE_DEADLINE_S):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise TransferCorrupt(
                f"nothing arrived for {PIECE_DEADLINE_S:.0f} s", hint="send the answer again"
            ) from error
        except ClientDisconnect as error:
            raise TransferCorrupt("the connection ended before the answer did", hint="send it again") from error
        yield piece


async def _spec(request: Request) -> Spec:
    try:
        return msgspec.json.decode(await request.body(), type=Spec)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidValue(str(error)[:300], code="invalid.request", hint="see /openapi.json for the shape") from error


def _body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Documents a body that we parse ourselves."""
    fields = {field.encode_name: {"description": str(field.type)} for field in msgspec.structs.fields(kind)}
    required = [field.encode_name for field in msgspec.structs.fields(kind) if field.required]
    schema = {
        "type": "object",
        "title": kind.__name__,
        "description": kind.__doc__,
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }
    content = {"required": True, "content": {JSON_TYPE: {"schema": schema}}}
    return {"openapi_extra": {"requestBody": content}, "response_model": None}


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


def _json(document: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status_code=status, media_type=JSON_TYPE)
