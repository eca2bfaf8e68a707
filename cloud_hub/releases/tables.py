"""The room's tables and the statements on them. Private to the room: others ask the desk.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from cloud_hub.ground.schema import metadata
from cloud_hub.releases.rules import BuildReport, Push, State
from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import FileRef, is_learned
from shared.release import Assignment

models = sa.Table(
    "models",
    metadata,
    sa.Column("family", sa.String(63), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("step", sa.String(64), nullable=False),
    sa.Column("push", sa.Text, nullable=False),
    sa.Column("build", sa.Integer, nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("created_by", sa.String(160), nullable=False),
    sa.Column("finished_ms", sa.BigInteger, nullable=True),
    sa.Column("report", sa.Text, nullable=True),
    sa.Column("release_counter", sa.BigInteger, nullable=True),
    sa.Column("min_release_counter", sa.BigInteger, nullable=True),
    sa.Column("published_ms", sa.BigInteger, nullable=True),
    sa.Column("published_by", sa.String(160), nullable=True),
    sa.UniqueConstraint("family", "release_counter"),
)

release_files = sa.Table(
    "release_files",
    metadata,
    sa.Column("family", sa.String(63), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("path", sa.String(255), nullable=False),
    sa.Column("length", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.ForeignKeyConstraint(["family", "version"], ["models.family", "models.version"]),
)

signed_metadata = sa.Table(
    "signed_metadata",
    metadata,
    sa.Column("role", sa.String(128), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("document", sa.LargeBinary, nullable=False),
    sa.Column("stored_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
)

assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("device", sa.String(63), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("document", sa.LargeBinary, nullable=False),
    sa.Column("assignment", sa.Text, nullable=False),
    sa.Column("issued_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("created_by", sa.String(160), nullable=False),
)

patches = sa.Table(
    "patches",
    metadata,
    sa.Column("base", sa.String(64), primary_key=True),
    sa.Column("result", sa.String(64), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=True),
    sa.Column("length", sa.BigInteger, nullable=False),
    sa.Column("full_length", sa.BigInteger, nullable=False),
    sa.Column("full_packed", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(200), nullable=False),
    sa.Column("made_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_patches_result", "result"),
)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One pushed version of a family.

    Attributes:
        build: grows with each push of it; a result that belongs to an earlier one is dropped.
        restarts: how often the hub stopped during this build.
        files: the manifest first; empty unless the state is `ready`.
    """

    family: FamilyName
    version: ModelVersion
    state: State
    step: str
    push: Push
    build: int
    restarts: int
    created_ms: int
    created_by: str
    finished_ms: int | None
    report: BuildReport | None
    release_counter: int | None
    min_release_counter: int | None
    published_ms: int | None
    published_by: str | None
    files: tuple[FileRef, ...]


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """One signed version of a metadata role, byte for byte."""

    role: str
    version: int
    document: bytes
    stored_ms: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class AssignmentRow:
    """One assignment of a device, and the same as signed."""

    assignment: Assignment
    document: bytes
    created_by: str


@dataclass(frozen=True, slots=True)
class PatchRow:
    """A patch that was made, or tried: then it has no digest, and a reason.

    Attributes:
        length: of the patch.
        full_length, full_packed: of the file that it makes, as it is and compressed.
    """

    base: Digest
    result: Digest
    digest: Digest | None
    length: int
    full_length: int
    full_packed: int
    reason: str
    made_ms: int


def find_model(conn: Connection, family: str, version: str) -> ModelRow | None:
    """The pushed version, or None."""
    row = conn.execute(sa.select(models).where(models.c.family == family, models.c.version == version)).one_or_none()
    return None if row is None else _model(conn, row)


def is_release_file(conn: Connection, digest: str) -> bool:
    """Whether this digest is that of a release's file, or of one that was pushed to be built."""
    built = sa.select(release_files.c.digest).where(release_files.c.digest == digest).limit(1)
    pushed = sa.select(models.c.family).where(models.c.push.contains(digest, autoescape=True)).limit(1)
    return conn.execute(built).first() is not None or conn.execute(pushed).first() is not None


def assigned_digests(conn: Connection, device: str, *, newest: int) -> frozenset[str]:
    """Digests of all files and patches that the newest so many assignments of a device name, bases included."""
    query = sa.select(assignments.c.assignment).where(assignments.c.device == device)
    rows = conn.execute(query.order_by(assignments.c.version.desc()).limit(newest))
    named = [msgspec.json.decode(row.assignment, type=Assignment) for row in rows]
    releases = {(model.family, model.version) for assignment in named for model in assignment.models}
    rows_of_learned = [find_model(conn, *named) for named in releases if is_learned(named[1])]
    releases |= {(row.family, row.push.learned_on) for row in rows_of_learned if row and row.push.learned_on}
    files = sa.select(release_files.c.digest).where(
        sa.or_(
            sa.false(),
            *(
                sa.and_(release_files.c.family == family, release_files.c.version == version)
                for family, version in sorted(releases)
            ),
        )
    )
    patches = {str(patch.digest) for assignment in named for patch in assignment.patches}
    return frozenset({*patches, *(row.digest for row in conn.execute(files))})


def list_models(
    conn: Connection, *, family: str | None, after: tuple[str, str], limit: int, published: bool
) -> list[ModelRow]:
    """Pushed (or only published) versions in the order of their names, beginning after a (family, version)."""
    query = sa.select(models).where(sa.tuple_(models.c.family, models.c.version) > sa.tuple_(*map(sa.literal, after)))
    if family is not None:
        query = query.where(models.c.family == family)
    if published:
        query = query.where(models.c.published_ms.is_not(None))
    return [_model(conn, row) for row in conn.execute(query.order_by(models.c.family, models.c.version).limit(limit))]


def list_building(conn: Connection) -> list[ModelRow]:
    """Versions whose build has not ended, oldest first."""
    query = sa.select(models).where(models.c.state == "building").order_by(models.c.created_ms, models.c.version)
    return [_model(conn, row) for row in conn.execute(query)]


def begin_build(conn: Connection, push: Push, *, build: int, at_ms: int, actor: str) -> None:
    """Store a push as being built, in place of a rejected one of the same version if there is one."""
    conn.execute(models.delete().where(models.c.family == push.family, models.c.version == push.version))
    conn.execute(
        models.insert().values(
            family=push.family,
            version=push.version,
            state="building",
            step="waiting",
            push=msgspec.json.encode(push).decode(),
            build=build,
            restarts=0,
            created_ms=at_ms,
            created_by=actor,
        )
    )


def note_restart(conn: Connection, row: ModelRow) -> None:
    """Count that the hub stopped while this was being built."""
    conn.execute(models.update().where(*_this_build(row)).values(restarts=row.restarts + 1, step="waiting"))


def set_step(conn: Connection, row: ModelRow, step: str) -> None:
    """Note how far a build is."""
    conn.execute(models.update().where(*_this_build(row)).values(step=step[:64]))


def finish_build(
    conn: Connection,
    row: ModelRow,
    *,
    state: State,
    report: BuildReport,
    at_ms: int,
    counters: tuple[int | None, int] | None = None,
    files: Sequence[FileRef] = (),
) -> bool:
    """Store how a build ended; False when the row has moved on to another build meanwhile."""
    counter, floor = counters or (None, None)
    changed = conn.execute(
        models.update()
        .where(*_this_build(row))
        .values(
            state=state,
            step="",
            report=msgspec.json.encode(report).decode(),
            finished_ms=at_ms,
            release_counter=counter,
            min_release_counter=floor,
        )
    )
    if changed.rowcount != 1:
        return False
    for position, file in enumerate(files):
        conn.execute(
            release_files.insert().values(
                family=row.family,
                version=row.version,
                position=position,
                path=file.path,
                length=file.length,
                digest=file.digest,
            )
        )
    return True


def family_counters(conn: Connection, family: str) -> tuple[list[int], int]:
    """The family's release counters so far, and its highest `min_release_counter` (0 for none)."""
    query = sa.select(models.c.release_counter, models.c.min_release_counter).where(
        models.c.family == family, models.c.release_counter.is_not(None)
    )
    rows = conn.execute(query).all()
    return [row.release_counter for row in rows], max((row.min_release_counter for row in rows), default=0)


def published_floor(conn: Connection, family: str) -> int:
    """The highest `min_release_counter` that was published for the family; devices refuse what lies below."""
    query = sa.select(sa.func.max(models.c.min_release_counter)).where(
        models.c.family == family, models.c.published_ms.is_not(None)
    )
    return conn.execute(query).scalar_one() or 0


def mark_published(conn: Connection, family: str, version: str, *, at_ms: int, actor: str) -> None:
    """Note that signed metadata lists the release."""
    where = models.c.family == family, models.c.version == version
    conn.execute(models.update().where(*where).values(published_ms=at_ms, published_by=actor))


def find_metadata(conn: Connection, role: str, version: int | None = None) -> MetadataRow | None:
    """A role's metadata: this version, or the newest."""
    query = sa.select(signed_metadata).where(signed_metadata.c.role == role)
    if version is not None:
        query = query.where(signed_metadata.c.version == version)
    row = conn.execute(query.order_by(signed_metadata.c.version.desc()).limit(1)).one_or_none()
    return None if row is None else _metadata(row)


def newest_metadata(conn: Connection) -> dict[str, MetadataRow]:
    """The newest version of every role, by role."""
    newest = sa.select(signed_metadata.c.role, sa.func.max(signed_metadata.c.version)).group_by(signed_metadata.c.role)
    query = sa.select(signed_metadata).where(sa.tuple_(signed_metadata.c.role, signed_metadata.c.version).in_(newest))
    return {row.role: _metadata(row) for row in conn.execute(query)}


def add_metadata(conn: Connection, rows: Iterable[MetadataRow]) -> None:
    """Store signed metadata; a version that exists already is refused by the database (Conflict)."""
    for row in rows:
        conn.execute(
            signed_metadata.insert().values(
                role=row.role,
                version=row.version,
                document=row.document,
                stored_ms=row.stored_ms,
                expires_ms=row.expires_ms,
            )
        )


def forget_metadata(conn: Connection, role: str, *, below: int) -> None:
    """Remove old versions of an online role: nothing refers to them any more and they come every few hours."""
    conn.execute(signed_metadata.delete().where(signed_metadata.c.role == role, signed_metadata.c.version < below))


def current_assignment(conn: Connection, device: str) -> AssignmentRow | None:
    """The device's newest assignment."""
    query = sa.select(assignments).where(assignments.c.device == device).order_by(assignments.c.version.desc()).limit(1)
    row = conn.execute(query).one_or_none()
    return None if row is None else _assignment(row)


def current_assignments(conn: Connection, *, after: str = "", limit: int = -1) -> list[AssignmentRow]:
    """The newest assignment of every device, in the order of their names, beginning after a name."""
    newest = sa.select(assignments.c.device, sa.func.max(assignments.c.version)).group_by(assignments.c.device)
    query = sa.select(assignments).where(
        sa.tuple_(assignments.c.device, assignments.c.version).in_(newest), assignments.c.device > after
    )
    return [_assignment(row) for row in conn.execute(query.order_by(assignments.c.device).limit(limit))]


def add_assignment(conn: Connection, row: AssignmentRow) -> None:
    """Store a signed assignment; a version that exists already is refused by the database (Conflict)."""
    conn.execute(
        assignments.insert().values(
            device=row.assignment.device,
            version=row.assignment.version,
            document=row.document,
            assignment=msgspec.json.encode(row.assignment).decode(),
            issued_ms=row.assignment.issued_ms,
            expires_ms=row.assignment.expires_ms,
            created_by=row.created_by,
        )
    )


def list_ready(conn: Connection) -> list[ModelRow]:
    """Every version whose build is done, by name."""
    query = sa.select(models).where(models.c.state == "ready").order_by(models.c.family, models.c.version)
    return [_model(conn, row) for row in conn.execute(query)]


def version_of_file(conn: Connection, family: str, digest: str) -> str | None:
    """The oldest version of the family that has this file."""
    query = (
        sa.select(release_files.c.version)
        .join(
            models,
            sa.and_(models.c.family == release_files.c.family, models.c.version == release_files.c.version),
        )
        .where(release_files.c.family == family, release_files.c.digest == digest)
        .order_by(models.c.release_counter)
        .limit(1)
    )
    return conn.execute(query).scalar_one_or_none()


def list_patches(conn: Connection) -> list[PatchRow]:
    """Every patch that was made or tried."""
    return [_patch(row) for row in conn.execute(sa.select(patches).order_by(patches.c.base, patches.c.result))]


def patches_to(conn: Connection, results: Sequence[str]) -> list[PatchRow]:
    """The patches that can be used to make one of these files, shortest first."""
    query = sa.select(patches).where(patches.c.result.in_(results), patches.c.digest.is_not(None))
    return [_patch(row) for row in conn.execute(query.order_by(patches.c.length, patches.c.base))]


def patches_from(conn: Connection, bases: Sequence[str]) -> list[PatchRow]:
    """The patches that can be used by who has one of these files, shortest first."""
    query = sa.select(patches).where(patches.c.base.in_(bases), patches.c.digest.is_not(None))
    return [_patch(row) for row in conn.execute(query.order_by(patches.c.length, patches.c.result))]


def add_patch(conn: Connection, row: PatchRow) -> None:
    """Store how a patch came out, in place of what was known of the pair."""
    conn.execute(patches.delete().where(patches.c.base == row.base, patches.c.result == row.result))
    conn.execute(
        patches.insert().values(
            base=row.base,
            result=row.result,
            digest=row.digest,
            length=row.length,
            full_length=row.full_length,
            full_packed=row.full_packed,
            reason=row.reason[:200],
            made_ms=row.made_ms,
        )
    )


def forget_patch(conn: Connection, row: PatchRow) -> None:
    """Remove a row."""
    conn.execute(patches.delete().where(patches.c.base == row.base, patches.c.result == row.result))


def _patch(row: Row[tuple[object, ...]]) -> PatchRow:
    return PatchRow(
        base=Digest(row.base),
        result=Digest(row.result),
        digest=None if row.digest is None else Digest(row.digest),
        length=row.length,
        full_length=row.full_length,
        full_packed=row.full_packed,
        reason=row.reason,
        made_ms=row.made_ms,
    )


def _this_build(row: ModelRow) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        models.c.family == row.family,
        models.c.version == row.version,
        models.c.build == row.build,
        models.c.state == "building",
    )


def _model(conn: Connection, row: Row[tuple[object, ...]]) -> ModelRow:
    query = (
        sa.select(release_files)
        .where(release_files.c.family == row.family, release_files.c.version == row.version)
        .order_by(release_files.c.position)
    )
    files = tuple(
        FileRef(path=file.path, length=file.length, digest=Digest(file.digest)) for file in conn.execute(query)
    )
    push = msgspec.json.decode(row.push, type=Push)
    counter = row.release_counter
    if row.state == "ready" and push.learned_on is not None:
        # What was learned has its base's counter, which is stored once.
        of_base = models.c.family == push.family, models.c.version == push.learned_on
        counter = conn.execute(sa.select(models.c.release_counter).where(*of_base)).scalar_one_or_none()
    return ModelRow(
        family=FamilyName(row.family),
        version=ModelVersion(row.version),
        state=row.state,
        step=row.step,
        push=push,
        build=row.build,
        restarts=row.restarts,
        created_ms=row.created_ms,
        created_by=row.created_by,
        finished_ms=row.finished_ms,
        report=None if row.report is None else msgspec.json.decode(row.report, type=BuildReport),
        release_counter=counter,
        min_release_counter=row.min_release_counter,
        published_ms=row.published_ms,
        published_by=row.published_by,
        files=files,
    )


def _metadata(row: Row[tuple[object, ...]]) -> MetadataRow:
    return MetadataRow(
        role=row.role,
        version=row.version,
        document=row.document,
        stored_ms=row.stored_ms,
        expires_ms=row.expires_ms,
    )


def _assignment(row: Row[tuple[object, ...]]) -> AssignmentRow:
    return AssignmentRow(
        assignment=msgspec.json.decode(row.assignment, type=Assignment),
        document=row.document,
        created_by=row.created_by,
    )
