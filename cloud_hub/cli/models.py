"""`outrider model push | ls | show | verify`."""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import Variant, parse_release, read
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import CommandFailed, Exit
from cloud_hub.cli.following import follow
from cloud_hub.cli.goldens import golden_from_npz
from cloud_hub.cli.hub import Document, Hub
from cloud_hub.cli.listing import watch
from shared import limits
from shared.errors import InvalidValue
from shared.ids import parse_family, parse_version
from shared.model import Signature, check_signature

POLL_MS: Final = 300
FILE_HINT: Final = "check the path and that you may read the file"


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A pushed version, as far as this program reads it."""

    family: str
    version: str
    state: str
    step: str = ""


class OfferedPatch(msgspec.Struct, frozen=True, kw_only=True):
    """A patch to one of a version's files, as far as this program reads it."""

    path: str
    base_version: str
    length: int
    share: float


def push(arguments: argparse.Namespace) -> Exit:
    """Upload what is missing, ask for the build, and with --wait see how it ends."""
    family, version = parse_family(arguments.family), parse_version(arguments.version)
    labels = _labels(arguments.labels)
    if arguments.task == "classification" and not labels:
        raise InvalidValue("a classification model needs --labels", hint="for example --labels cat,dog")
    model = _model_file(Path(arguments.file))
    golden = golden_from_npz(Path(arguments.golden), labels=labels)
    calibration = golden_from_npz(Path(arguments.calibration), labels=labels) if arguments.calibration else None
    signature = _signature(arguments.signature)
    request: dict[str, Any] = {
        "family": family,
        "version": version,
        "labels": labels,
        "task": arguments.task,
        "preparations": _preparations(arguments, signature, golden),
        "lineage": _lineage(arguments),
        "gate": _given(max_drop_pt=arguments.max_drop, min_accuracy=arguments.min_accuracy),
        **_given(
            signature=signature,
            min_release_counter=arguments.min_release_counter,
            learning=_learning(arguments.learn, arguments.max_shift),
        ),
    }
    hub = Hub(load_context(arguments.context))
    for field, data in (("model", model), ("golden", golden), ("calibration", calibration)):
        if data is not None:
            request[field] = _upload(hub, data, title=field)
    document: Document = hub.send("POST", "/v1/models", request, Document)
    if arguments.wait:
        document = _wait(hub, document, wait_s=arguments.wait_s)
    return _report(document, as_json=arguments.json, waited=arguments.wait)


def learn(arguments: argparse.Namespace) -> Exit:
    """Upload what was learned on a base; the hub measures it, signs it by itself and publishes it."""
    family, base = parse_release(arguments.base)
    hub = Hub(load_context(arguments.context))
    request = {
        "family": family,
        "base": base,
        "version": parse_version(arguments.version),
        "model": _upload(hub, _model_file(Path(arguments.file)), title="model"),
    }
    document: Document = hub.send("POST", "/v1/learned", request, Document)
    if arguments.wait:
        document = _wait(hub, document, wait_s=arguments.wait_s)
    return _report(document, as_json=arguments.json, waited=False)


def _learning(tensors: str | None, max_shift: float | None) -> dict[str, Any] | None:
    """What the hub may learn on top of a pushed model."""
    if (tensors is None) != (max_shift is None):
        raise InvalidValue("--learn and --max-shift belong together", code="invalid.usage")
    if tensors is None:
        return None
    return {"variant": "fp32", "tensors": tensors.split(","), "max_shift": max_shift}


def ls(arguments: argparse.Namespace) -> Exit:
    """List models."""
    return watch(arguments, "models")


def show(arguments: argparse.Namespace) -> Exit:
    """Show one model."""
    family, version = parse_release(arguments.name)
    document = Hub(load_context(arguments.context)).get(f"/v1/models/{family}/{version}", Document)
    if arguments.json:
        screen.show_json(document)
    else:
        show_model(document)
    return Exit.DONE


def verify(arguments: argparse.Namespace) -> Exit:
    """Fetch, hash and run a model's variants; ends with 9 unless all is as the manifest says."""
    from cloud_hub.cli.inspection import inspect
    from cloud_hub.cli.origins import MAX_KNOWN, HubOrigin

    family, version = parse_release(arguments.name)
    origin = HubOrigin(Hub(load_context(arguments.context)), known_root=MAX_KNOWN)
    inspected = inspect(origin, family, version)
    if arguments.json:
        screen.show_json(inspected.summary())
    else:
        print(inspected.text())
    inspected.require_fit()
    screen.note("every file has its digest, and every variant answers as recorded")
    return Exit.DONE


def show_model(document: Document) -> None:
    """Print a model's state and what was measured of its variants."""
    model = read(document, Model, what="model")
    report = document.get("report") or {}
    print(screen.fields([("model", f"{model.family}/{model.version}"), ("state", model.state)]))
    if report.get("reason"):
        told = [("reason", str(report["reason"])), ("code", str(report.get("code") or "-"))]
        print(screen.fields([*told, *([("try", str(report["hint"]))] if report.get("hint") else [])]))
    variants = read(report.get("variants", []), list[Variant], what="build report")
    rows = [
        [
            variant.name,
            f"{variant.accuracy:.1%}",
            f"{variant.drop_pt:+.2f}" if variant.drop_pt else "0.00",
            f"{variant.p50_us} us",
            screen.size(variant.length),
            "released" if variant.released else variant.reason or "left out",
        ]
        for variant in variants
    ]
    if rows:
        screen.show_table(["VARIANT", "ACCURACY", "DROP", "P50", "SIZE", "VERDICT"], rows, nothing="")
    patches = read(document.get("patches", []), list[OfferedPatch], what="list of patches")
    if patches:
        offered = [
            [patch.path.rpartition("/")[2], patch.base_version or "-", screen.size(patch.length), f"{patch.share:.1%}"]
            for patch in patches
        ]
        screen.show_table(["PATCH TO", "FROM", "SIZE", "OF THE FILE"], offered, nothing="")
    for warning in read(report.get("warnings", []), list[str], what="build report"):
        screen.note(f"warning: {warning}")


def _report(document: Document, *, as_json: bool, waited: bool) -> Exit:
    model = read(document, Model, what="model")
    if as_json:
        screen.show_json(document)
    else:
        show_model(document)
    name = f"{model.family}/{model.version}"
    if model.state == "rejected":
        report = document.get("report") or {}
        raise CommandFailed(
            f"the hub rejected {name}: {report.get('reason') or 'see its report'}",
            status=Exit.FAILED,
            code=str(report.get("code") or "model.rejected"),
            hint=str(report.get("hint") or f"outrider model show {name}"),
        )
    if waited:
        screen.note(f"next: outrider release sign {name} --keys DIR")
    elif model.state == "building":
        screen.note(f"the hub is building it; see: outrider model show {name}")
    return Exit.DONE


def _wait(hub: Hub, document: Document, *, wait_s: int) -> Document:
    """Tell of each step; raises CommandFailed when it is still being built after that time."""
    said = ""

    def look(seen: Document) -> bool:
        nonlocal said
        model = read(seen, Model, what="model")
        if model.state == "building" and model.step != said:
            said = model.step
            screen.note(f"building: {said}")
        return model.state != "building"

    model = read(document, Model, what="model")
    path = f"/v1/models/{model.family}/{model.version}"
    document = follow(hub, path, document, ended=look, wait_s=wait_s, poll_ms=POLL_MS)
    model = read(document, Model, what="model")
    if model.state == "building":
        raise CommandFailed(
            f"{model.family}/{model.version} is still being built",
            status=Exit.STILL_RUNNING,
            code="timeout.build",
            hint=f"outrider model show {model.family}/{model.version}",
        )
    return document


def _upload(hub: Hub, data: bytes, *, title: str) -> str:
    digest = hashlib.sha256(data).hexdigest()
    if not hub.has_blob(digest):
        hub.put_blob(digest, io.BytesIO(data), length=len(data), progress=screen.Bar(title))
    return digest


def _model_file(path: Path) -> bytes:
    try:
        length = path.stat().st_size
        if length > limits.MAX_MODEL_BYTES:
            raise InvalidValue(
                f"{path} is {length} bytes long; at most {limits.MAX_MODEL_BYTES} are taken",
                code="invalid.file",
                hint="push a smaller model",
            )
        data = path.read_bytes()
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}", code="invalid.file", hint=FILE_HINT) from error
    if not data:
        raise InvalidValue(f"{path} is empty", code="invalid.file", hint="export the model again")
    return data


def _labels(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    path = Path(text)
    if "," not in text and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InvalidValue(
                f"labels file {path} cannot be read: {error.strerror}", code="invalid.labels", hint=FILE_HINT
            ) from error
        except UnicodeDecodeError as error:
            raise InvalidValue(
                f"labels file {path} is not UTF-8 text",
                code="invalid.labels",
                hint="give a text file, one label a line",
            ) from error
        return tuple(line.strip() for line in lines if line.strip())
    if "," not in text:
        raise InvalidValue(
            f"--labels {text!r} is neither a file nor a list", code="invalid.labels", hint="for example cat,dog"
        )
    return tuple(part.strip() for part in text.split(","))


def _signature(name: str | None) -> Signature | None:
    if name is None:
        return None
    try:
        signature = msgspec.json.decode(Path(name).read_bytes()[: limits.MAX_JSON_BODY_BYTES], type=Signature)
    except OSError as error:
        raise InvalidValue(f"{name} cannot be read: {error.strerror}", code="invalid.file", hint=FILE_HINT) from error
    except msgspec.MsgspecError as error:
        raise InvalidValue(f"{name} is not a signature: {error}", code="invalid.signature") from error
    check_signature(signature)
    return signature


def _preparations(arguments: argparse.Namespace, signature: Signature | None, golden: bytes) -> list[dict[str, Any]]:
    numbers = _given(scale=arguments.input_scale, mean=arguments.input_mean, std=arguments.input_std)
    if not numbers:
        return []
    if signature is not None:
        names = [spec.name for spec in signature.inputs]
    else:
        names = [tensor["name"] for tensor in msgspec.msgpack.decode(golden)["inputs"]]
    if len(names) != 1:
        raise InvalidValue(
            f"--input-scale, --input-mean and --input-std are for one input; this model has {', '.join(names)}",
            code="invalid.preparation",
            hint="put the preparation into the graph",
        )
    return [{"input": names[0], **numbers}]


def _lineage(arguments: argparse.Namespace) -> dict[str, Any]:
    parameters = {}
    for text in arguments.param:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidValue(f"--param {text!r} is not KEY=VALUE", code="invalid.param")
        parameters[key] = value
    texts = {
        "training_data": arguments.data_tag,
        "license": arguments.license,
        "owner": arguments.owner,
        "parent": arguments.parent,
    }
    lineage: dict[str, Any] = {name: text for name, text in texts.items() if text}
    return {**lineage, "parameters": parameters} if parameters else lineage


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
