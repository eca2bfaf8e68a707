"""REST of the releases room: `/v1/blobs`, `/v1/models`, `/v1/learned`, `/v1/releases`, `/v1/roots`, `/v1/metadata`,
`/v1/assignments`, `/v1/time`.

`router(desk)` makes the routes; `app.state.time_rate` holds how often one address may ask for the time. Bodies are
msgspec structs: unknown fields and wrong types are refused by name.
Blobs are streamed both ways and are exempt from the bounds on other requests (prefix `/v1/blobs/`): an upload is
bounded by its announced length, and by a deadline for each next piece of it.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from cloud_hub.ground import bodies
from cloud_hub.ground.auth import Principal, Role, require, require_any
from cloud_hub.ground.bodies import JSON_TYPE, json_answer, read_json, takes
from cloud_hub.ground.problems import NotAllowed, NotFound, Throttled
from cloud_hub.ground.rates import Buckets, source_of
from cloud_hub.releases.desk import Desk, Push, Selector
from cloud_hub.releases.tables import AssignmentRow, ModelRow
from shared import limits
from shared.clock import Clock
from shared.ids import FamilyName, ModelVersion, parse_digest
from shared.model import Lineage

STREAMED_PREFIX: Final = "/v1/blobs/"
BLOB_TYPE: Final = "application/octet-stream"

Viewer = Annotated[Principal, Depends(require(Role.VIEWER))]
Operator = Annotated[Principal, Depends(require(Role.OPERATOR))]
ReleaseManager = Annotated[Principal, Depends(require(Role.RELEASE_MANAGER))]
Admin = Annotated[Principal, Depends(require(Role.ADMIN))]
Anyone = Annotated[Principal, Depends(require_any())]
Limit = Annotated[int, Query(ge=1, le=limits.MAX_PAGE_ITEMS)]
After = Annotated[str, Query(max_length=160)]


class Publish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Signed metadata of a release: the family's role, and the targets where they had to change."""

    family: str
    version: str
    role: str
    targets: str | None = None


class Learned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that was learned on a base: the base's file, uploaded anew with other numbers in its head."""

    family: FamilyName
    base: ModelVersion
    version: ModelVersion
    model: str
    lineage: Lineage = Lineage()


class KeyChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Signed metadata that changes keys, by role: `root`, `targets`, `models/<family>`."""

    parts: dict[str, str]


class TimeAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device's question: 32 random bytes in base64url, its name, and the version of the root that it trusts."""

    nonce: str
    device: str
    root: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0


def router(desk: Desk) -> APIRouter:
    """The room's routes over this desk."""
    routes = APIRouter(prefix="/v1", tags=["releases"])
    blobs, models = _Blobs(desk), _Models(desk)
    releases, assignments = _Releases(desk), _Assignments(desk)
    add = routes.add_api_route
    add("/blobs/{digest}", blobs.put, methods=["PUT"], operation_id="put_blob", status_code=201, response_model=None)
    add("/blobs/{digest}", blobs.get, methods=["GET"], operation_id="get_blob", response_model=None)
    add("/blobs/{digest}", blobs.get, methods=["HEAD"], operation_id="head_blob", response_model=None)
    add("/models", models.push, methods=["POST"], operation_id="push_model", status_code=202, **takes(Push))
    add("/learned", models.learn, methods=["POST"], operation_id="learn_release", status_code=202, **takes(Learned))
    add("/models", models.page, methods=["GET"], operation_id="list_models", response_model=None)
    add("/models/{family}/{version}", models.get, methods=["GET"], operation_id="get_model", response_model=None)
    add(
        "/releases",
        releases.publish,
        methods=["POST"],
        operation_id="publish_release",
        status_code=201,
        **takes(Publish),
    )
    add("/releases", releases.page, methods=["GET"], operation_id="list_releases", response_model=None)
    release = "/releases/{family}/{version}"
    add(release, releases.get, methods=["GET"], operation_id="get_release", response_model=None)
    add(f"{release}/proposal", releases.proposal, methods=["GET"], operation_id="get_proposal", response_model=None)
    add(
        "/roots",
        releases.change_keys,
        methods=["POST"],
        operation_id="change_keys",
        status_code=201,
        **takes(KeyChange),
    )
    add("/metadata/{name:path}", releases.metadata, methods=["GET"], operation_id="get_metadata", response_model=None)
    add("/assignments", assignments.assign, methods=["POST"], operation_id="assign", status_code=201, **takes(Selector))
    add("/assignments", assignments.page, methods=["GET"], operation_id="list_assignments", response_model=None)
    time = _Time(desk)
    add("/time", time.tell, methods=["POST"], operation_id="attest_time", **takes(TimeAsked))
    return routes


class _Time:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def tell(self, request: Request) -> Response:
        """The time, signed for one device and one nonce. Needs no proof: who has no clock may have no valid one."""
        rate: Buckets = request.app.state.time_rate
        clock: Clock = request.app.state.clock
        address = request.client.host if request.client else "unknown"
        wait_s = rate.take(source_of(address), now_ms=clock.mono_ms())
        if wait_s:
            raise Throttled("too many questions for the time from this address", retry_after_s=wait_s, hint="wait")
        asked = await read_json(request, TimeAsked)
        answer = await self._desk.attesting.attest(device=asked.device, nonce=asked.nonce, root_version=asked.root)
        return Response(answer, media_type=JSON_TYPE, headers={"cache-control": "no-store"})


class _Blobs:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def put(self, request: Request, digest: str, _principal: ReleaseManager) -> Response:
        """Store a file under its SHA-256; 201 when it is new, 200 when the hub has it already."""
        name = parse_digest(digest)
        length = bodies.announced_length(request)
        is_new = await self._desk.blobs.receive(name, length, bodies.pieces(request))
        if is_new:
            self._desk.counts.blob_bytes.inc(length)
        return json_answer({"digest": name, "length": length}, status=201 if is_new else 200)

    async def get(self, request: Request, digest: str, principal: Anyone) -> Response:
        """A file by its SHA-256, whole or in ranges (RFC 9110, section 14); its ETag is its digest.

        A device reads files of the releases that are assigned to it, and of no others.
        """
        name = parse_digest(digest)
        if principal.device is not None and not await self._desk.assigning.may_read(principal.device, name):
            raise NotAllowed("this file belongs to a release that is not assigned to this device", code="auth.blob")
        blob = await asyncio.to_thread(self._desk.blobs.find, name)
        if blob is None:
            raise NotFound(f"there is no file {name}", code="not_found.blob")
        headers = {"etag": f'"{name}"', "cache-control": "private, max-age=31536000, immutable"}
        if f'"{name}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        stat = await asyncio.to_thread(blob.path.stat)
        return FileResponse(blob.path, media_type=BLOB_TYPE, headers=headers, stat_result=stat)


class _Models:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def push(self, request: Request, principal: ReleaseManager) -> Response:
        """Have an uploaded model built and measured; the same push again tells how it went so far."""
        push = await read_json(request, Push)
        row = await self._desk.catalogue.push(push, actor=principal.actor)
        return json_answer(_model(row), status=202)

    async def learn(self, request: Request, principal: ReleaseManager) -> Response:
        """Have a model that was learned on a base measured, then signed by the hub itself and published."""
        body = await read_json(request, Learned)
        row = await self._desk.catalogue.learn(
            body.family,
            body.base,
            version=body.version,
            model=parse_digest(body.model),
            lineage=body.lineage,
            actor=principal.actor,
        )
        return json_answer(_model(row), status=202)

    async def page(self, _principal: Viewer, after: After = "", limit: Limit = 100, family: After = "") -> Response:
        """Pushed models by name, whatever their state."""
        rows = await self._desk.catalogue.page(family=family or None, after=_cursor(after), limit=limit + 1)
        return _page([_model(row) for row in rows], limit=limit, key=_name)

    async def get(self, family: str, version: str, _principal: Viewer) -> Response:
        """One pushed model with what was measured of it, and the patches to its files."""
        row = await self._desk.catalogue.get(family, version)
        return json_answer({**_model(row), "patches": await self._desk.patches.offered(row)})


class _Releases:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def publish(self, request: Request, principal: ReleaseManager) -> Response:
        """Make a release available under an operator's signature."""
        body = await read_json(request, Publish)
        row = await self._desk.publishing.publish(
            body.family, body.version, targets=body.targets, role=body.role, actor=principal.actor
        )
        return json_answer(_model(row), status=201)

    async def page(self, _principal: Viewer, after: After = "", limit: Limit = 100, family: After = "") -> Response:
        """Published releases by name."""
        rows = await self._desk.catalogue.page(
            family=family or None, after=_cursor(after), limit=limit + 1, published=True
        )
        return _page([_model(row) for row in rows], limit=limit, key=_name)

    async def get(self, family: str, version: str, _principal: Viewer) -> Response:
        """One published release."""
        row = await self._desk.catalogue.get(family, version)
        if row.published_ms is None:
            raise NotFound(
                f"{row.family}/{row.version} is not published",
                code="not_found.release",
                hint=f"`outrider release sign {row.family}/{row.version} --keys DIR`, then publish it",
            )
        return json_answer(_model(row))

    async def proposal(self, family: str, version: str, _principal: ReleaseManager) -> Response:
        """What an operator's machine needs to check and sign a release."""
        proposal = await self._desk.publishing.proposal(family, version)
        row = proposal.release
        document = {
            "family": row.family,
            "version": row.version,
            "manifest": proposal.manifest,
            "files": row.files,
            "root": proposal.root,
            "root_version": proposal.root_version,
            "targets": proposal.targets,
            "role": proposal.role,
            "report": _report(row),
        }
        return json_answer(document)

    async def change_keys(self, request: Request, principal: Admin) -> Response:
        """Make a signed change of keys take effect: a new root, and what has to be signed again under it."""
        body = await read_json(request, KeyChange)
        changed = await self._desk.publishing.change_keys(body.parts, actor=principal.actor)
        return json_answer({"versions": changed.versions}, status=201 if changed.is_new else 200)

    async def metadata(self, name: str, _principal: Anyone) -> Response:
        """A metadata file by its consistent-snapshot name: `timestamp.json`, `3.targets.json`."""
        data = await self._desk.publishing.metadata(name)
        cache = "no-cache" if name == "timestamp.json" else "private, max-age=31536000, immutable"
        return Response(data, media_type=JSON_TYPE, headers={"cache-control": cache})


class _Assignments:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def assign(self, request: Request, principal: Operator) -> Response:
        """Set a family of some devices' desired state to a published release."""
        outcome = await self._desk.assigning.assign(await read_json(request, Selector), actor=principal.actor)
        return json_answer(outcome, status=201)

    async def page(self, _principal: Viewer, after: After = "", limit: Limit = 100) -> Response:
        """The newest assignment of each device, by device."""
        rows = await self._desk.assigning.page(after=after, limit=limit + 1)
        return _page([_assignment(row) for row in rows], limit=limit, key=lambda item: str(item["device"]))


def _page(items: list[dict[str, Any]], *, limit: int, key: Any) -> Response:
    more = len(items) > limit
    return json_answer({"items": items[:limit], "next": key(items[limit - 1]) if more else None})


def _name(item: dict[str, Any]) -> str:
    return f"{item['family']}/{item['version']}"


def _cursor(after: str) -> tuple[str, str]:
    family, _, version = after.partition("/")
    return family, version


def _model(row: ModelRow) -> dict[str, Any]:
    return {
        "family": row.family,
        "version": row.version,
        "state": row.state,
        "step": row.step,
        "created_ms": row.created_ms,
        "created_by": row.created_by,
        "finished_ms": row.finished_ms,
        "release_counter": row.release_counter,
        "min_release_counter": row.min_release_counter,
        "published_ms": row.published_ms,
        "published_by": row.published_by,
        "manifest": row.files[0].digest if row.files else None,
        "files": row.files,
        "push": row.push,
        "report": _report(row),
    }


def _report(row: ModelRow) -> dict[str, Any] | None:
    """The report without the recorded answers, which are in the manifest and would fill the screen."""
    if row.report is None:
        return None
    report: dict[str, Any] = msgspec.to_builtins(row.report)
    for variant in report["variants"]:
        del variant["answers"]
    return report


def _assignment(row: AssignmentRow) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(row.assignment)
    document["created_by"] = row.created_by
    return document
