"""`outrider release publish | ls | show`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import parse_release, read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import CommandFailed, Exit
from cloud_hub.cli.hub import Document, Hub, HubRefused
from cloud_hub.cli.listing import moment, watch
from shared.errors import InvalidValue, TrustError
from shared.ids import FamilyName, ModelVersion, parse_device_id
from shared.model import FileRef

if TYPE_CHECKING:
    from shared.trust.drafts import Draft


class Assigned(msgspec.Struct, frozen=True, kw_only=True):
    """A device that got an assignment."""

    device: str
    version: int


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A device that did not, and why."""

    device: str
    reason: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The hub's answer to an assignment."""

    assigned: list[Assigned]
    skipped: list[Skipped] = []


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A published release, as far as this program reads it."""

    family: str
    version: str
    release_counter: int | None = None
    min_release_counter: int | None = None
    published_ms: int | None = None
    published_by: str | None = None
    files: tuple[FileRef, ...] = ()


class KeyVersions(msgspec.Struct, frozen=True, kw_only=True):
    """The hub's answer to a change of keys: versions by role."""

    versions: dict[str, int]


def publish(arguments: argparse.Namespace) -> Exit:
    """Send a bundle to the hub unless it is published already, then assign it if that was asked for."""
    selector = _selector(arguments)
    hub = Hub(load_context(arguments.context))
    draft = _draft(arguments.bundle)
    if draft is not None:
        return _change_keys(arguments, hub, draft)
    family, version, release = _publish(hub, arguments.bundle)
    document: dict[str, Any] = {"release": release, "assigned": [], "skipped": []}
    if not arguments.json:
        print(f"published {family}/{version}")
    if selector is None:
        if arguments.json:
            screen.show_json(document)
        else:
            screen.note(f"next: outrider release publish {family}/{version} --assign all")
        return Exit.DONE
    answer = hub.send(
        "POST",
        "/v1/assignments",
        {"family": family, "version": version, "force": arguments.force, **selector},
        Document,
    )
    outcome = read(answer, Outcome, what="assignment")
    if arguments.json:
        screen.show_json({**document, **answer})
    else:
        for assigned in outcome.assigned:
            print(f"assigned to {screen.clean(assigned.device)} (assignment {assigned.version})")
    for skipped in outcome.skipped:
        screen.note(f"skipped {skipped.device}: {skipped.reason}")
    if not outcome.assigned:
        raise CommandFailed(
            "no device got it", status=Exit.NOT_FOUND, code="not_found.devices", hint="outrider ls devices"
        )
    return Exit.DONE


def ls(arguments: argparse.Namespace) -> Exit:
    """List releases."""
    return watch(arguments, "releases")


def show(arguments: argparse.Namespace) -> Exit:
    """Show one release and its files."""
    family, version = parse_release(arguments.name)
    if arguments.export:
        return _export(arguments, family, version)
    document = Hub(load_context(arguments.context)).get(f"/v1/releases/{family}/{version}", Document)
    if arguments.json:
        screen.show_json(document)
        return Exit.DONE
    release = read(document, Release, what="release")
    print(
        screen.fields(
            [
                ("release", f"{release.family}/{release.version}"),
                ("counter", str(release.release_counter)),
                ("floor", str(release.min_release_counter)),
                ("published", f"{moment(release.published_ms)} UTC by {release.published_by or '-'}"),
            ]
        )
    )
    rows = [[file.path.rpartition("/")[2], screen.size(file.length), file.digest] for file in release.files]
    screen.show_table(["FILE", "SIZE", "SHA-256"], rows, nothing="no files")
    return Exit.DONE


def _export(arguments: argparse.Namespace, family: FamilyName, version: ModelVersion) -> Exit:
    from cloud_hub.cli.origins import export

    folder = Path(arguments.export)
    proposal = export(Hub(load_context(arguments.context)), family, version, folder)
    size = sum(file.length for file in proposal.files)
    if arguments.json:
        screen.show_json({"folder": str(folder), "files": proposal.files, "bytes": size})
    else:
        print(f"wrote {len(proposal.files)} files, {screen.size(size)}, to {folder}")
        screen.note(f"next, where the key is: outrider release sign {family}/{version} --from {folder} --keys DIR")
    return Exit.DONE


def _draft(name: str) -> Draft | None:
    """The draft of a change of keys that a file holds; None when it is no such file."""
    from shared.trust.drafts import MAX_DRAFT_BYTES, decode_draft

    path = Path(name)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_DRAFT_BYTES + 1)
    try:
        return decode_draft(data)
    except InvalidValue:
        return None  # a bundle, then; if not that either, its reader says so


def _change_keys(arguments: argparse.Namespace, hub: Hub, draft: Draft) -> Exit:
    from shared.trust.drafts import missing, quorums

    if arguments.assign or arguments.device:
        raise InvalidValue("a change of keys is not assigned", code="invalid.usage", hint="leave --assign away")
    lines = missing(quorums(draft))
    if lines:
        raise TrustError(
            "signatures are missing:\n" + "\n".join(lines),
            code="trust.threshold",
            hint=f"outrider-hub keys sign {arguments.bundle} --keys DIR, where one of these keys is",
        )
    answer = hub.send("POST", "/v1/roots", {"parts": draft.parts}, Document)
    if arguments.json:
        screen.show_json(answer)
    else:
        versions = read(answer, KeyVersions, what="change of keys").versions
        print(f"published {', '.join(f'{role} {version}' for role, version in versions.items())}")
    return Exit.DONE


def _publish(hub: Hub, name: str) -> tuple[str, str, Document]:
    """Publish what is named: a bundle's file, or FAMILY/VERSION with its bundle here or published before."""
    from cloud_hub.cli.signing import bundle_name, read_bundle

    path = Path(name)
    if not path.is_file():
        try:
            family, version = parse_release(name)
        except InvalidValue as error:
            raise CommandFailed(
                f"there is no file {name[:200]!r}, and that is no release's name either",
                status=Exit.NOT_FOUND,
                code="not_found.bundle",
                hint="give the file that `outrider release sign` wrote, or FAMILY/VERSION",
            ) from error
        path = Path(bundle_name(family, version))
        try:
            return family, version, hub.get(f"/v1/releases/{family}/{version}", Document)
        except HubRefused as error:
            if error.status is not Exit.NOT_FOUND:
                raise
            if not path.is_file():
                raise InvalidValue(
                    f"{name} is not published, and there is no {path} here",
                    code="invalid.bundle",
                    hint=f"outrider release sign {name} --keys DIR",
                ) from error
    bundle = read_bundle(path)
    request = {"family": bundle.family, "version": bundle.version, "role": bundle.role}
    if bundle.targets is not None:
        request["targets"] = bundle.targets
    return bundle.family, bundle.version, hub.send("POST", "/v1/releases", request, Document)


def _selector(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if arguments.device:
        return {"devices": [parse_device_id(name) for name in arguments.device]}
    if arguments.assign is None:
        return None
    if arguments.assign == "all":
        return {"all": True}
    labels = {}
    for part in arguments.assign.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InvalidValue(
                f"--assign {part!r} is neither `all` nor KEY=VALUE",
                code="invalid.selector",
                hint="for example --assign all, or --assign site=north,row=2; single devices are named with --device",
            )
        labels[key] = value
    return {"labels": labels}
