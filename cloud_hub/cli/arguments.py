"""The tree of commands and their options. Nothing heavy is imported here: help and completion have to be instant.

Each leaf names the function that runs it as `module:function`; `__main__` imports that module only when it is wanted.
"""

from __future__ import annotations

import argparse
from typing import Final, NoReturn

PACKAGE: Final = "cloud_hub.cli"
LISTINGS: Final = ("devices", "models", "releases", "assignments", "rollouts")
THINGS: Final = ("device", "model", "release")

_Leaves = argparse._SubParsersAction  # the only name that argparse has for it


class Parser(argparse.ArgumentParser):
    """argparse with our error format and without abbreviations, which would break scripts when options are added."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and end with 2."""
        self.exit(2, f"error: {message}\ncode: usage\ntry: {self.prog} --help\n")


def build() -> Parser:
    """The whole tree."""
    parser = Parser(prog="outrider", description="Operate a fleet: devices, models, signed releases.")
    parser.add_argument("--version", dest="show_version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _login(commands)
    _look(commands)
    _device(commands)
    _model(commands)
    _release(commands)
    _rollout(commands)
    _round(commands)
    leaf = _leaf(commands, "audit", "list who did what, oldest first", run="fleet:audit")
    leaf.add_argument("--after", type=int, default=0, metavar="SEQ", help="start behind this row")
    leaf.add_argument("--limit", type=_count, default=200, metavar="N", help="at most this many rows (default 200)")
    completion = commands.add_parser("completion", help="print shell completion", description="Print shell completion.")
    completion.add_argument("shell", choices=["bash"])
    completion.set_defaults(run="completion:run", json=False)
    return parser


def _leaf(commands: _Leaves[Parser], name: str, summary: str, *, run: str) -> Parser:
    leaf: Parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    leaf.add_argument("--json", action="store_true", help="print one JSON document")
    leaf.add_argument("--context", metavar="NAME", help="use this saved hub instead of the current one")
    leaf.set_defaults(run=run)
    return leaf


def _group(commands: _Leaves[Parser], name: str, summary: str) -> _Leaves[Parser]:
    group: Parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    leaves: _Leaves[Parser] = group.add_subparsers(title="commands", metavar="COMMAND", dest=f"{name}_command")
    leaves.required = True
    return leaves


def _login(commands: _Leaves[Parser]) -> None:
    leaf = _leaf(commands, "login", "save how to reach a hub, pinning its CA", run="login:run")
    leaf.add_argument("url", metavar="URL", help="https://HOST:PORT of the hub")
    token = leaf.add_mutually_exclusive_group(required=True)
    token.add_argument("--token", metavar="TOKEN", help="API token; a file is safer, other users see arguments")
    token.add_argument("--token-file", metavar="FILE", help="file that holds the API token; - reads standard input")
    pin = leaf.add_mutually_exclusive_group()
    pin.add_argument("--ca", metavar="FILE", help="the hub's CA certificate (PEM)")
    pin.add_argument("--fingerprint", metavar="HEX", help="SHA-256 of the CA, as `outrider-hub ca show` prints it")


def _look(commands: _Leaves[Parser]) -> None:
    leaf = _leaf(commands, "ls", "list devices, models, releases or assignments", run="fleet:ls")
    leaf.add_argument("what", choices=LISTINGS, metavar="|".join(LISTINGS))
    leaf.add_argument("--watch", action="store_true", help="look again every two seconds until Ctrl-C")
    leaf = _leaf(commands, "get", "show one device, model or release", run="fleet:get")
    leaf.add_argument("what", choices=THINGS, metavar="|".join(THINGS))
    leaf.add_argument("name", metavar="NAME", help="a device's name, or FAMILY/VERSION")


def _device(commands: _Leaves[Parser]) -> None:
    leaves = _group(commands, "device", "change a device")
    leaf = _leaf(leaves, "label", "set and remove labels", run="fleet:label")
    leaf.add_argument("name", metavar="NAME")
    leaf.add_argument("changes", nargs="+", metavar="KEY=VALUE|KEY-", help="set a label, or remove it")
    leaf = _leaf(leaves, "revoke", "end a device's session and let it in nowhere any more", run="standing:revoke")
    leaf.add_argument("name", metavar="NAME")
    leaf.add_argument("--reason", default="", metavar="TEXT", help="kept with the device and audited")
    leaf = _leaf(
        leaves, "quarantine", "give a device nothing and take nothing of it for now", run="standing:quarantine"
    )
    leaf.add_argument("name", metavar="NAME")
    how = leaf.add_mutually_exclusive_group()
    how.add_argument("--reason", default="", metavar="TEXT", help="kept with the device and audited")
    how.add_argument("--lift", action="store_true", help="end the quarantine")


def _model(commands: _Leaves[Parser]) -> None:
    leaves = _group(commands, "model", "upload and inspect models")
    _push(_leaf(leaves, "push", "upload an ONNX model; the hub builds and measures its variants", run="models:push"))
    leaf = _leaf(leaves, "ls", "list models", run="models:ls")
    leaf.add_argument("--watch", action="store_true", help="look again every two seconds until Ctrl-C")
    leaf = _leaf(leaves, "show", "show one model and what was measured of it", run="models:show")
    leaf.add_argument("name", metavar="FAMILY/VERSION")
    leaf = _leaf(
        leaves, "verify", "fetch every file of a model, hash it and run the golden samples", run="models:verify"
    )
    leaf.add_argument("name", metavar="FAMILY/VERSION")


def _push(leaf: Parser) -> None:
    add = leaf.add_argument
    add("file", metavar="FILE.onnx")
    add("--family", required=True, metavar="NAME", help="the model's family, for example digits")
    add("--version", required=True, metavar="X.Y.Z", help="semantic version of this model")
    add("--golden", required=True, metavar="FILE.npz", help="samples: an array per input, and `labels`")
    add("--calibration", metavar="FILE.npz", help="other samples that set the int8 ranges (default: the golden ones)")
    add("--labels", metavar="FILE|A,B,C", help="class names in the order of the output: a file of lines, or a list")
    add("--task", choices=["classification", "raw"], default="classification")
    add("--signature", metavar="FILE.json", help="inputs and outputs (default: from the graph)")
    add("--input-scale", type=_number, metavar="X", help="the input is multiplied by this first")
    add("--input-mean", type=_numbers, metavar="X[,X…]", help="then this is subtracted")
    add("--input-std", type=_numbers, metavar="X[,X…]", help="then it is divided by this")
    add("--max-drop", type=_number, metavar="POINTS", help="accuracy that a variant may lose (default 1)")
    add("--min-accuracy", type=_number, metavar="SHARE", help="accuracy that a variant must reach, 0 to 1")
    add("--min-release-counter", type=int, metavar="N", help="devices that take this release refuse any below N")
    add("--learn", metavar="TENSOR[,…]", help="the hub may learn these tensors of it; allowed by `keys rotate`")
    add("--max-shift", type=_number, metavar="NORM", help="and move them by so much, as Euclidean norm")
    add("--data-tag", default="", metavar="TEXT", help="what it was trained on")
    add("--license", default="", metavar="TEXT")
    add("--owner", default="", metavar="TEXT")
    add("--parent", default="", metavar="FAMILY/VERSION", help="what it was derived from")
    add("--param", action="append", default=[], metavar="KEY=VALUE", help="a training parameter; may be repeated")
    add("--wait", action="store_true", help="wait until the hub has built and measured it")
    add("--wait-s", type=_count, default=300, metavar="SECONDS", help="how long --wait waits (default 300)")


def _release(commands: _Leaves[Parser]) -> None:
    leaves = _group(commands, "release", "sign and publish releases")
    leaf = _leaf(leaves, "sign", "check what the hub built and sign it with the offline keys", run="signing:sign")
    leaf.add_argument("name", metavar="FAMILY/VERSION")
    leaf.add_argument("--keys", required=True, metavar="DIR", help="folder with release.key (and targets.key)")
    leaf.add_argument("--from", dest="origin", metavar="DIR", help="an exported release (`release show --export`)")
    leaf.add_argument("--bundle", metavar="FILE", help="add your signature to what another has signed")
    leaf.add_argument("--out", metavar="FILE", help="where to write (default ./FAMILY-VERSION.release.json)")
    leaf.add_argument("--expires-days", type=_count, default=90, metavar="N", help="the signature's life (default 90)")
    leaf.add_argument("--yes", action="store_true", help="sign without asking")
    leaf = _leaf(leaves, "publish", "send a signed release to the hub and assign it", run="releases:publish")
    leaf.add_argument(
        "bundle", metavar="BUNDLE|FAMILY/VERSION", help="a signed bundle, a published release, or a draft of keys"
    )
    target = leaf.add_mutually_exclusive_group()
    target.add_argument("--assign", metavar="all|KEY=VALUE[,…]", help="assign it to these devices")
    target.add_argument("--device", action="append", metavar="NAME", help="assign it to this device; may be repeated")
    leaf.add_argument("--force", action="store_true", help="also where the device has quarantined it")
    leaf = _leaf(leaves, "learn", "let the hub measure, sign and publish what was learned", run="models:learn")
    leaf.add_argument("base", metavar="FAMILY/BASE", help="the release that it was learned on")
    leaf.add_argument("file", metavar="FILE.onnx", help="the base's file with other numbers in its head")
    leaf.add_argument("--version", required=True, metavar="X.Y.Z-learned.N", help="what it will be called")
    leaf.add_argument("--wait", action="store_true", help="wait until the hub has measured it")
    leaf.add_argument("--wait-s", type=_count, default=300, metavar="SECONDS", help="how long --wait waits")
    leaf = _leaf(leaves, "ls", "list releases", run="releases:ls")
    leaf.add_argument("--watch", action="store_true", help="look again every two seconds until Ctrl-C")
    leaf = _leaf(leaves, "show", "show one release and its files", run="releases:show")
    leaf.add_argument("name", metavar="FAMILY/VERSION")
    leaf.add_argument("--export", metavar="DIR", help="write what there is to sign into this new folder, to carry it")


def _rollout(commands: _Leaves[Parser]) -> None:
    leaves = _group(commands, "rollout", "bring a release to the fleet in stages")
    leaf = _leaf(leaves, "plan", "show what a rollout would do, and what its first stage can miss", run="rollouts:plan")
    leaf.add_argument("release", metavar="FAMILY/VERSION|FILE.toml", help="a release, or a file that says all")
    _rollout_options(leaf)
    leaf = _leaf(leaves, "start", "start a rollout", run="rollouts:start")
    what = "a release, a file that says all, or a draft's name (a draft takes no other options)"
    leaf.add_argument("release", metavar="FAMILY/VERSION|FILE.toml|DRAFT", help=what)
    _rollout_options(leaf)
    leaf.add_argument("--draft", action="store_true", help="keep it, to be started later by its name")
    _until_ended(leaf)
    leaf = _leaf(leaves, "status", "show a rollout, or list all of them", run="rollouts:status")
    leaf.add_argument("rollout", metavar="ROLLOUT", nargs="?", help="its name; without one all are listed")
    leaf.add_argument("--watch", action="store_true", help="look again every two seconds until Ctrl-C")
    _until_ended(leaf)
    leaf = _leaf(leaves, "explain", "show every decision with its numbers", run="rollouts:explain")
    leaf.add_argument("rollout", metavar="ROLLOUT")
    leaf = _leaf(leaves, "pause", "offer the release to nobody else for now", run="rollouts:pause")
    leaf.add_argument("rollout", metavar="ROLLOUT")
    leaf.add_argument("--reason", default="", metavar="TEXT", help="kept with the decision")
    leaf = _leaf(leaves, "resume", "go on; acknowledges what failed so far", run="rollouts:resume")
    leaf.add_argument("rollout", metavar="ROLLOUT")
    leaf = _leaf(leaves, "abort", "end a rollout", run="rollouts:abort")
    leaf.add_argument("rollout", metavar="ROLLOUT")
    then = leaf.add_mutually_exclusive_group()
    then.add_argument("--revert", action="store_true", help="devices go back to what they ran before (the default)")
    then.add_argument("--keep", action="store_true", help="devices keep what they have")


def _rollout_options(leaf: Parser) -> None:
    add = leaf.add_argument
    whom = leaf.add_mutually_exclusive_group()
    whom.add_argument("--all", action="store_true", help="all devices (the default)")
    whom.add_argument(
        "--selector", action="append", default=[], metavar="KEY=VALUE", help="only devices with this label; repeatable"
    )
    whom.add_argument("--device", action="append", default=[], metavar="NAME", help="only this device; repeatable")
    add("--stages", metavar="SIZE,…", help="counts or percent, growing (default 1%%,5%%,25%%,50%%,100%%)")
    add("--soak", type=_whole, metavar="SECONDS", help="how long a settled stage is watched (default 1800)")
    add("--max-harmed", type=_whole, metavar="N", help="harmed devices that are borne (default 5%%, at least 1)")
    add("--max-unresolved", type=_whole, metavar="N", help="unresolved devices that are borne (default as harmed)")
    add("--min-answers", type=_whole, metavar="N", help="good answers that make a device healthy (default 20)")
    add("--deadline", type=_count, metavar="SECONDS", help="after this an offered device is unresolved (default 1800)")
    add("--baseline", type=_count, metavar="SECONDS", help="how far back the release before is read (default 3600)")
    add("--gates", metavar="NAME,…|none", help="of devices, outcomes, latency (default all)")
    add("--margin", type=_number, metavar="SHARE", help="a rise of wrong answers to be found (default 0.05)")
    add("--tolerance", type=_number, metavar="SHARE", help="a rise that still counts as good (default 0.01)")
    add("--min-baseline", type=_count, metavar="N", help="outcomes that the release before needs (default 50)")
    add("--max-ratio", type=_number, metavar="X", help="p95 latency against the release before (default 1.5)")
    add("--min-timed", type=_count, metavar="N", help="timed answers that both releases need (default 50)")


def _until_ended(leaf: Parser) -> None:
    leaf.add_argument("--wait", action="store_true", help="wait until it has ended; 7 when that was not well")
    leaf.add_argument(
        "--timeout",
        type=_count,
        metavar="SECONDS",
        help="with --wait: how long (default a day), then 8",
    )


def _round(commands: _Leaves[Parser]) -> None:
    leaves = _group(commands, "round", "learn a model's head on the devices, without their data leaving them")
    leaf = _leaf(leaves, "start", "begin a federated run from a published release", run="rounds:start")
    add = leaf.add_argument
    add("--family", required=True, metavar="NAME", help="the model's family, for example digits")
    add("--base", required=True, metavar="X.Y.Z", help="the release whose features are kept; devices must serve it")
    add("--as", dest="result", required=True, metavar="X.Y.Z", help="version of the result")
    add("--rounds", type=_count, metavar="N", help="how many rounds (default 10)")
    add("--strategy", metavar="NAME", help="fedavg (default), fedprox, fedadam, fedyogi, fedmedian, …: Flower's own")
    add("--min-devices", type=_count, metavar="N", help="a round begins with so many (default 2)")
    add("--quorum", type=_count, metavar="N", help="so many good answers make a round (default --min-devices)")
    add("--round-timeout", type=_number, metavar="SECONDS", help="how long a round waits for answers (default 120)")
    add("--learning-rate", type=_number, metavar="X", help="of the devices' training (default 0.1)")
    add("--epochs", type=_count, metavar="N", help="passes over a device's samples per round (default 1)")
    add("--batch-size", type=_count, metavar="N", help="samples per step (default 16)")
    add("--seed", type=int, metavar="N", help="of everything that is drawn (default 0)")
    add("--selector", action="append", default=[], metavar="KEY=VALUE", help="only devices with this label; repeatable")
    add("--features", metavar="NAME", help="the output that holds the features (default: found in the graph)")
    add("--learned", action="store_true", help="start from the base's head; the hub signs the result by itself")
    add("--evaluate", action="store_true", help="devices also measure each round's result on their own samples")
    _wait(leaf)
    leaf = _leaf(leaves, "status", "show a run and its rounds", run="rounds:status")
    leaf.add_argument("run_id", metavar="RUN")
    _wait(leaf)
    _leaf(leaves, "ls", "list runs, newest first", run="rounds:ls")
    leaf = _leaf(leaves, "stop", "end a run for good", run="rounds:stop")
    leaf.add_argument("run_id", metavar="RUN")


def _wait(leaf: Parser) -> None:
    leaf.add_argument("--wait", action="store_true", help="wait until it has ended")
    leaf.add_argument("--wait-s", type=_count, default=3600, metavar="SECONDS", help="how long (default 3600)")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
    return value


def _whole(text: str) -> int:
    return 0 if text.strip() == "0" else _count(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))
