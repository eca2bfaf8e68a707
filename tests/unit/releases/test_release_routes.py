"""The room's REST: roles, ranges, bounds, shapes and problems, through a real application."""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cloud_hub.ground import problems
from cloud_hub.ground.auth import PEER_CERTIFICATE, Gate, Role, issue_api_token
from cloud_hub.ground.problems import NotAllowed
from cloud_hub.releases import tables
from cloud_hub.releases.routes import router
from cloud_hub.releases.tables import PatchRow
from shared.ids import DeviceId
from tests.fakes.release_room import LABELS, ReleaseRoom

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


class Api:
    """A client of the application, one call per event loop."""

    def __init__(self, room: ReleaseRoom) -> None:
        self.room = room
        self.app = FastAPI()
        problems.install(self.app)
        self.app.include_router(router(room.desk))

        async def known(der: bytes) -> DeviceId:
            if der.decode() not in room.fleet.devices:
                raise NotAllowed("no such device here")
            return DeviceId(der.decode())

        self.app.state.gate = Gate(database=room.database, clock=room.clock, device_of=known)
        self.tokens = {
            role: room.database.write_now(
                lambda conn, role=role: issue_api_token(  # type: ignore[misc]
                    conn, name=role.value, role=role, at_ms=room.clock.wall, ttl_ms=None, actor="test"
                )
            ).text
            for role in (Role.VIEWER, Role.OPERATOR, Role.RELEASE_MANAGER)
        }

    def __call__(
        self, method: str, path: str, *, role: Role | None = Role.RELEASE_MANAGER, device: str = "", **options: Any
    ) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if role is not None and not device:
            headers["authorization"] = f"Bearer {self.tokens[role]}"

        async def as_device(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"] = {PEER_CERTIFICATE: device.encode()} if device else {}
            await self.app(scope, receive, send)

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=as_device)
            async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(call())


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    room = ReleaseRoom(tmp_path)
    yield room
    room.close()


@pytest.fixture
def api(room: ReleaseRoom) -> Api:
    return Api(room)


def is_problem(response: httpx.Response, status: int, code: str) -> bool:
    assert response.headers["content-type"] == "application/problem+json", response.text
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    return True


def test_a_blob_is_put_once_and_read_by_range(api: Api) -> None:
    assert api("PUT", f"/v1/blobs/{DIGEST}", content=DATA).status_code == 201
    assert api("PUT", f"/v1/blobs/{DIGEST}", content=DATA).status_code == 200
    whole = api("GET", f"/v1/blobs/{DIGEST}", role=Role.VIEWER)
    assert (whole.status_code, whole.content) == (200, DATA)
    assert whole.headers["etag"] == f'"{DIGEST}"'
    assert whole.headers["accept-ranges"] == "bytes"
    head = api("HEAD", f"/v1/blobs/{DIGEST}")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(DATA)))
    for given, expected, content_range in (
        ("bytes=0-9", DATA[:10], f"bytes 0-9/{len(DATA)}"),
        ("bytes=10000-", DATA[10000:], f"bytes 10000-{len(DATA) - 1}/{len(DATA)}"),
        ("bytes=-5", DATA[-5:], f"bytes {len(DATA) - 5}-{len(DATA) - 1}/{len(DATA)}"),
    ):
        part = api("GET", f"/v1/blobs/{DIGEST}", headers={"range": given})
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, expected, content_range)
    past = api("GET", f"/v1/blobs/{DIGEST}", headers={"range": f"bytes={len(DATA)}-"})
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


def test_ranges_hold_only_for_the_same_file(api: Api) -> None:
    api("PUT", f"/v1/blobs/{DIGEST}", content=DATA)
    same = {"range": "bytes=0-9", "if-range": f'"{DIGEST}"'}
    assert api("GET", f"/v1/blobs/{DIGEST}", headers=same).status_code == 206
    other = {"range": "bytes=0-9", "if-range": '"something else"'}
    assert api("GET", f"/v1/blobs/{DIGEST}", headers=other).content == DATA
    assert api("GET", f"/v1/blobs/{DIGEST}", headers={"if-none-match": f'"{DIGEST}"'}).status_code == 304


def test_bad_uploads_are_refused_with_a_problem(api: Api) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield DATA

    assert is_problem(api("PUT", f"/v1/blobs/{DIGEST}", content=endless()), 411, "length_required")
    assert is_problem(api("PUT", f"/v1/blobs/{DIGEST}", content=DATA[1:]), 422, "transfer.corrupt")
    assert is_problem(api("PUT", "/v1/blobs/nonsense", content=DATA), 422, "invalid.digest")
    assert is_problem(api("PUT", f"/v1/blobs/{DIGEST}", content=b""), 422, "invalid.length")
    assert is_problem(api("GET", f"/v1/blobs/{DIGEST}"), 404, "not_found.blob")


def test_a_full_disk_is_a_507(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cloud_hub.ground.arrivals.os.fsync", full)
    assert is_problem(api("PUT", f"/v1/blobs/{DIGEST}", content=DATA), 507, "storage.full")


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("PUT", f"/v1/blobs/{DIGEST}", Role.OPERATOR),
        ("POST", "/v1/models", Role.OPERATOR),
        ("POST", "/v1/releases", Role.OPERATOR),
        ("GET", "/v1/releases/digits/1.0.0/proposal", Role.OPERATOR),
        ("POST", "/v1/assignments", Role.VIEWER),
    ],
)
def test_each_step_needs_its_role(api: Api, method: str, path: str, role: Role) -> None:
    assert is_problem(api(method, path, role=role, content=b"{}"), 403, "auth.role")
    assert is_problem(api(method, path, role=None, content=b"{}"), 401, "auth.missing")


def test_nothing_is_read_without_proof(api: Api) -> None:
    for path in ("/v1/models", "/v1/releases", "/v1/assignments", "/v1/metadata/timestamp.json", f"/v1/blobs/{DIGEST}"):
        assert is_problem(api("GET", path, role=None), 401, "auth.missing")


def test_a_push_is_checked_before_anything_is_built(api: Api, room: ReleaseRoom) -> None:
    golden = room.desk.blobs.put(b"golden").digest
    body: dict[str, Any] = {
        "family": "digits", "version": "1.0.0", "model": DIGEST, "golden": golden, "labels": list(LABELS)
    }  # fmt: skip
    missing = api("POST", "/v1/models", json=body)
    assert is_problem(missing, 422, "invalid.blob_missing")
    assert f"PUT /v1/blobs/{DIGEST}" in missing.json()["hint"]
    api("PUT", f"/v1/blobs/{DIGEST}", content=DATA)
    unknown = api("POST", "/v1/models", json={**body, "gate": {"max_drop": 1}})
    assert is_problem(unknown, 422, "invalid.request")
    assert "max_drop" in unknown.json()["detail"]
    assert is_problem(api("POST", "/v1/models", json={**body, "version": "one"}), 422, "invalid.version")
    assert is_problem(api("POST", "/v1/models", content=b"{"), 422, "invalid.request")
    floor = api("POST", "/v1/models", json={**body, "min_release_counter": 2})
    assert is_problem(floor, 422, "invalid.min_release_counter")
    taken = api("POST", "/v1/models", json=body)
    assert taken.status_code == 202
    assert (taken.json()["state"], taken.json()["created_by"]) == ("building", "token:release_manager")
    assert api("POST", "/v1/models", json=body).json() == taken.json()
    other = api("POST", "/v1/models", json={**body, "labels": ["a", "b"]})
    assert is_problem(other, 409, "conflict.version")
    assert is_problem(api("GET", "/v1/releases/digits/1.0.0/proposal"), 409, "conflict.not_ready")


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("family", "../../etc"),
        ("family", "a/b"),
        ("family", "%2e%2e"),
        ("version", "../1.0.0"),
        ("version", "1.0.0/.."),
    ],
)
def test_attack_32_a_name_that_would_be_a_path_is_refused(api: Api, room: ReleaseRoom, field: str, name: str) -> None:
    golden, model = (room.desk.blobs.put(data).digest for data in (b"golden", DATA))
    body: dict[str, Any] = {
        "family": "digits", "version": "1.0.0", "model": model, "golden": golden, "labels": list(LABELS), field: name
    }  # fmt: skip
    assert is_problem(api("POST", "/v1/models", json=body), 422, f"invalid.{field}")


def test_from_proposal_to_assignment(api: Api, room: ReleaseRoom) -> None:
    room.fleet.add("one")
    room.make_ready("1.0.0")
    assert is_problem(api("GET", "/v1/releases/digits/1.0.0"), 404, "not_found.release")
    proposal = api("GET", "/v1/releases/digits/1.0.0/proposal").json()
    assert set(proposal) == {
        "family", "version", "manifest", "files", "root", "root_version", "targets", "role", "report"
    }  # fmt: skip
    signed = room.operator.sign(asyncio.run(room.desk.publishing.proposal("digits", "1.0.0")), now_ms=room.clock.wall)
    body = {"family": "digits", "version": "1.0.0", "targets": signed[0], "role": signed[1]}
    forged = {**body, "role": signed[1].replace("models/digits/1.0.0/golden.bin", "models/digits/1.0.0/g0lden.bin")}
    assert is_problem(api("POST", "/v1/releases", json=forged), 422, "trust.signature")
    published = api("POST", "/v1/releases", json=body)
    assert (published.status_code, published.json()["published_by"]) == (201, "token:release_manager")
    assert api("GET", "/v1/releases/digits/1.0.0", role=Role.VIEWER).json() == published.json()
    assert [item["version"] for item in api("GET", "/v1/releases").json()["items"]] == ["1.0.0"]
    for name in ("timestamp.json", "2.snapshot.json", "1.models%2Fdigits.json", "1.root.json"):
        assert api("GET", f"/v1/metadata/{name}", role=Role.VIEWER).status_code == 200
    assert api("GET", "/v1/metadata/1.models%2Fdigits.json").text == signed[1]
    assert is_problem(api("GET", "/v1/metadata/..%2Fhub.db"), 422, "invalid.metadata_name")
    assert is_problem(api("GET", "/v1/metadata/9.root.json"), 404, "not_found.metadata")
    answer = api(
        "POST", "/v1/assignments", role=Role.OPERATOR, json={"family": "digits", "version": "1.0.0", "all": True}
    )
    assert answer.status_code == 201
    assert answer.json() == {"assigned": [{"device": "one", "version": 1}], "skipped": []}
    listed = api("GET", "/v1/assignments", role=Role.VIEWER).json()
    assert listed["next"] is None
    assert listed["items"][0]["device"] == "one"
    assert listed["items"][0]["models"][0]["version"] == "1.0.0"


def test_lists_come_in_pages(api: Api, room: ReleaseRoom) -> None:
    names = [("alpha", "1.0.0"), ("alpha", "1.1.0"), ("beta", "1.0.0")]
    for family, version in names:
        room.make_ready(version, family=family)
    seen: list[tuple[str, str]] = []
    after = ""
    while True:
        page = api("GET", "/v1/models", params={"limit": 1, "after": after}).json()
        seen += [(item["family"], item["version"]) for item in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == names
    assert len(api("GET", "/v1/models", params={"family": "alpha"}).json()["items"]) == 2
    assert is_problem(api("GET", "/v1/models", params={"limit": 0}), 422, "invalid.request")


def test_a_model_names_the_patches_to_its_files(api: Api, room: ReleaseRoom) -> None:
    old, new = (room.make_ready(version).files[-1] for version in ("1.0.0", "1.1.0"))
    assert api("GET", "/v1/models/digits/1.1.0").json()["patches"] == []
    row = PatchRow(
        base=old.digest, result=new.digest, digest=new.digest, length=5, full_length=20, full_packed=20, reason="",
        made_ms=1,
    )  # fmt: skip
    room.database.write_now(lambda conn: tables.add_patch(conn, row))
    (patch,) = api("GET", "/v1/models/digits/1.1.0", role=Role.VIEWER).json()["patches"]
    assert (patch["path"], patch["base_version"]) == (new.path, "1.0.0")
    assert (patch["length"], patch["share"]) == (5, 0.25)
    assert api("GET", "/v1/models/digits/1.0.0").json()["patches"] == []


def test_operations_have_stable_names(api: Api) -> None:
    operations = {
        operation["operationId"] for path in api.app.openapi()["paths"].values() for operation in path.values()
    }
    assert operations == {
        "put_blob", "get_blob", "head_blob", "push_model", "learn_release",
        "list_models", "get_model", "publish_release",
        "list_releases", "get_release", "get_proposal", "get_metadata", "assign", "list_assignments",
        "change_keys",
        "attest_time",
    }  # fmt: skip


def test_a_device_reads_only_files_of_releases_that_are_assigned_to_it(api: Api, room: ReleaseRoom) -> None:
    for name in ("one", "two"):
        room.fleet.add(name)
    row = room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    paths = [f"/v1/blobs/{file.digest}" for file in row.files]
    assert is_problem(api("GET", paths[0], device="nobody"), 403, "auth")
    for path in paths:
        assert is_problem(api("GET", path, device="one"), 403, "auth.blob")
        assert api("HEAD", path, device="one").status_code == 403
    assigned = {"family": "digits", "version": "1.0.0", "devices": ["one"]}
    assert api("POST", "/v1/assignments", role=Role.OPERATOR, json=assigned).status_code == 201
    for path, file in zip(paths, row.files, strict=True):
        assert len(api("GET", path, device="one").content) == file.length
        part = api("GET", path, device="one", headers={"range": "bytes=1-", "if-range": f'"{file.digest}"'})
        assert (part.status_code, part.headers["etag"]) == (206, f'"{file.digest}"')
        assert is_problem(api("GET", path, device="two"), 403, "auth.blob")
