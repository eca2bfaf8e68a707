"""The steps `enrol`, `first-release` and `local-answers`: from an empty folder to devices that answer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from . import digits, models
from .cast import FAMILY, Device, House
from .telling import Figure, Teller, expect, require, until
from .work import TALLY_TITLES, ask_all

FIRST: Final = "1.0.0"
SECOND: Final = "1.1.0"
THIRD: Final = "1.2.0"
COMMITTED_S: Final = 40.0
LEAST_ACCURACY: Final = 0.95
LEAST_AGREEMENT: Final = 0.95


def enrol(house: House, tell: Teller) -> Mapping[str, Figure]:
    """Make the hub, log in, and bring three devices in with one-time tokens."""
    cloud, stage, folder = house.cloud, house.stage, house.folder
    admin = folder.operator / "admin.token"
    made = cloud.init(admin)
    cloud.start()
    tell.say(
        f"The hub made its own certificate authority and its keys, and answers on {cloud.url}; a real MQTT broker "
        f"(mosquitto) runs beside it on port {cloud.broker_port}. The keys that sign releases lie in another folder, "
        "as they would on the operator's own machine: the hub never has them."
    )
    house.operator.run("login", cloud.url, "--token-file", str(admin), "--fingerprint", made["ca_fingerprint"])
    token_file = folder.operator / "join.token"
    for device in house.devices:
        made_token = stage.run(
            "outrider-hub", "token", "create", "--data", str(cloud.folder), "--kind", "join", "--json"
        ).out
        token_file.write_text(json.loads(made_token)["token"], encoding="ascii")
        device.enrol(token_file)
    thief = folder.device("thief")
    spent = stage.run(
        "outrider-agent", "enroll", f"@{token_file}", "--state", str(thief), "--name", "thief", status=None
    )
    require(spent.status != 0, "a join token that was used once is refused the second time")
    for device in house.devices:
        device.start()
    for device in house.devices:
        device.wait_online()
        until(f"the hub sees {device.name} online", partial(_is_online, house, device), seconds=10)
    listed = house.operator.run("ls", "devices")["items"]
    expect("devices that the hub lists", wanted=sorted(house.names), found=sorted(item["id"] for item in listed))
    tell.say(
        "Three devices of different kinds each made a key of their own and traded a one-time token for a certificate. "
        f"All are online: {', '.join(house.names)}. The last token, tried a second time by somebody else, was refused."
    )
    return {"devices": len(house.devices), "spent_token_exit": spent.status or 0}


def first_release(house: House, tell: Teller) -> Mapping[str, Figure]:
    """Train, push, build int8, sign with the offline key, publish, assign; until all three have committed it."""
    training = models.trained(house, "digits-1")
    parts = digits.split()
    house.held_back = parts.held_back
    tell.say(
        f"A small network was trained here, in {training.seconds:.1f} s, on {len(parts.train.labels)} of "
        f"scikit-learn's handwritten digits. On {len(parts.held_back.labels)} digits that it never saw, it is right "
        f"{training.accuracy:.1%} of the time in float32."
    )
    push(house, FIRST, "digits-1")
    model = house.operator.run("model", "show", f"{FAMILY}/{FIRST}")
    variants = {variant["name"]: variant for variant in model["report"]["variants"]}
    require(variants["int8"]["released"], f"the int8 variant passed the hub's gate: {variants['int8']}")
    tell.say(
        f"The hub quantized it to int8 ({variants['int8']['length'] / 1000:.0f} kB instead of "
        f"{variants['fp32']['length'] / 1000:.0f} kB) and measured it on 200 golden samples: "
        f"{variants['int8']['accuracy']:.1%} right, {variants['fp32']['accuracy']:.1%} before."
    )
    signed = sign(house, FIRST)
    tell.say(
        "The operator's command fetched every file, hashed it and ran the golden samples itself before it signed "
        f"with the offline key (int8 here: {signed['variants'][0]['accuracy_here']:.1%})."
    )
    began = time.monotonic()
    house.operator.run("release", "publish", f"{FAMILY}/{FIRST}", "--assign", "all")
    wait_committed(house, FIRST)
    committed_s = time.monotonic() - began
    tell.say(
        f"Published and assigned: all three devices checked both signatures and committed it in {committed_s:.1f} s."
    )
    return {
        "train_seconds": round(training.seconds, 2),
        "fp32_held_back_accuracy": round(training.accuracy, 4),
        "int8_golden_accuracy": variants["int8"]["accuracy"],
        "fp32_golden_accuracy": variants["fp32"]["accuracy"],
        "int8_bytes": variants["int8"]["length"],
        "fp32_bytes": variants["fp32"]["length"],
        "golden_agreement_at_signing": signed["variants"][0]["agreement_here"],
        "commit_seconds": round(committed_s, 2),
        "committed": len(house.devices),
    }


def local_answers(house: House, tell: Teller) -> Mapping[str, Figure]:
    """Held-back digits through the Python client on each device, with the truth told afterwards."""
    rows = range(len(house.held_back.labels))
    tallies = ask_all(house, rows, title="day")
    tell.table(TALLY_TITLES, [[name, *tally.row()] for name, tally in tallies.items()])
    for name, tally in tallies.items():
        require(tally.accuracy >= LEAST_ACCURACY, f"{name} is right often enough: {tally.accuracy:.1%}")
        expect(f"versions that answered on {name}", wanted={FIRST}, found=tally.versions)
    tell.say(
        "Each device answered every held-back digit by itself, through its local socket, and was told afterwards what "
        "the digit was. Answers and truths are on their way to the hub."
    )
    return {
        "asked": sum(tally.asked for tally in tallies.values()),
        **{f"accuracy_{name}": round(tally.accuracy, 4) for name, tally in tallies.items()},
        **{f"p50_ms_{name}": round(tally.took_ms(0.5), 2) for name, tally in tallies.items()},
    }


def push(house: House, version: str, model: str, *, family: str = FAMILY, samples: str = "") -> None:
    """Upload a model and wait until the hub has built and measured it, on all samples or on `few-` of them."""
    models.trained(house, model)
    house.operator.run(
        "model", "push", f"{model}.onnx",
        "--family", family, "--version", version,
        "--golden", f"{samples}golden.npz", "--calibration", f"{samples}calibration.npz",
        "--labels", ",".join(digits.LABELS), "--input-scale", str(digits.SCALE),
        "--data-tag", "scikit-learn digits 1.0", "--param", f"seed={models.RECIPES[model].seed}",
        "--license", "BSD-3-Clause", "--wait",
    )  # fmt: skip


def sign(house: House, version: str, *, family: str = FAMILY) -> dict[str, list[dict[str, float]]]:
    """Sign a built model with the offline keys; returns what the command saw."""
    signed: dict[str, list[dict[str, float]]] = house.operator.run(
        "release", "sign", f"{family}/{version}", "--keys", str(house.folder.offline), "--yes"
    )
    for variant in signed["variants"]:
        require(variant["agreement_here"] >= LEAST_AGREEMENT, f"the signer's own run agrees: {variant}")
    return signed


def wait_committed(house: House, version: str) -> None:
    """Wait until all devices serve this version for good."""
    for device in house.devices:
        until(f"{device.name} has committed {version}", partial(device.serves, version), seconds=COMMITTED_S)
    house.served = version


def _is_online(house: House, device: Device) -> bool:
    return bool(house.operator.device(device.name)["online"])
