"""Who plays: the hub with its broker, the operator with the command line, and three devices with their applications."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cloud_hub.cli.config import Context
from cloud_hub.cli.hub import Document, Hub
from edge_agent.client import Client
from shared.errors import OutriderError
from shared.ids import FamilyName
from shared.inference import AgentState, ModelState

from .folder import Folder
from .stage import Stage, children, free_ports, kill_pid, wait_gone
from .telling import NeverTrue, NotTrue, until

FAMILY: Final = FamilyName("digits")
PROFILES: Final = ("x86-gateway", "pi4", "pi5")
"""One device per profile, named like it."""

AGENT_TOML: Final = """\
# The demo's device: its profile, and a trial short enough to watch.
profile = "{profile}"

[door]
path = "{door}"

[probation]
duration_ms = 1500
"""

MAX_SOCKET_PATH_CHARS: Final = 100
HUB_UP_S: Final = 30.0
AGENT_UP_S: Final = 20.0
ONLINE_S: Final = 30.0
BROKER_PROGRAM: Final = "mosquitto"


@dataclass(slots=True)
class Cloud:
    """The hub and its broker."""

    stage: Stage
    port: int
    broker_port: int
    pid: int = 0
    broker_pid: int = 0

    @property
    def folder(self) -> Path:
        """The hub's data directory."""
        return self.stage.folder.hub

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"https://localhost:{self.port}"

    def init(self, token_file: Path) -> dict[str, Any]:
        """Make the hub; returns what the command said."""
        folder = self.stage.folder
        made = self.stage.run(
            "outrider-hub", "init",
            "--data", str(folder.hub),
            "--offline", str(folder.offline),
            "--port", str(self.port),
            "--broker-port", str(self.broker_port),
            "--token-file", str(token_file),
            "--json",
        )  # fmt: skip
        document: dict[str, Any] = json.loads(made.out)
        return document

    def start(self) -> None:
        """Start it and wait until hub and broker are up."""
        self.pid = self.stage.start("hub", "outrider-hub", "serve", "--data", str(self.folder))
        until("the hub is up", self._is_up, seconds=HUB_UP_S)
        self.broker_pid = self._find_broker()

    def kill(self) -> None:
        """kill -9 of the hub and of the broker, both at once."""
        kill_pid(self.broker_pid)
        self.stage.kill("hub")
        wait_gone("the broker", self.broker_pid)

    def kill_hub_only(self) -> None:
        """kill -9 of the hub; the broker has to follow by itself."""
        self.stage.kill("hub")
        wait_gone("the broker of the killed hub", self.broker_pid)

    def _is_up(self) -> bool:
        if not self.stage.alive("hub"):
            raise NeverTrue("the hub has ended")
        try:
            context = self.context()
            ready = Hub(context, timeout_s=2).get("/readyz", Document)
        except OutriderError as error:
            raise NotTrue(error.message) from error
        return bool(ready.get("ready"))

    def context(self) -> Context:
        """How the hub is reached before anyone has logged in: the CA is read from its folder, there is no token."""
        ca = (self.folder / "ca" / "ca.pem").read_text(encoding="ascii")
        return Context(url=self.url, token="", ca_pem=ca, fingerprint="")

    def _find_broker(self) -> int:
        for pid, command in children(self.pid).items():
            if BROKER_PROGRAM in command:
                return pid
        raise NotTrue(f"the hub (process {self.pid}) has no child called {BROKER_PROGRAM}")


@dataclass(slots=True)
class Operator:
    """Runs `outrider`; the story's own questions to the hub go the same way, without starting a process each time."""

    stage: Stage

    def run(self, *arguments: str, status: int = 0) -> Any:
        """Run `outrider … --json` and return its document; None when it printed none."""
        out = self.stage.run("outrider", *arguments, "--json", status=status).out
        return json.loads(out) if out.strip() else None

    def hub(self) -> Hub:
        """The hub, as whoever is logged in."""
        saved = json.loads((self.stage.folder.operator / "contexts.json").read_text(encoding="utf-8"))
        return Hub(Context(**saved["contexts"][saved["current"]]), timeout_s=10)

    def device(self, name: str) -> dict[str, Any]:
        """A device as the hub knows it."""
        return self.hub().get(f"/v1/devices/{name}", Document)


@dataclass(slots=True)
class Device:
    """One device: its agent, and an application that talks to it.

    Attributes:
        answered: label given by request id, for every request that was answered.
        unsure: requests whose answer came right before a kill: their record may or may not have reached the disk.
        confirmed: requests whose feedback the agent has confirmed, which means it is on disk.
    """

    stage: Stage
    name: str
    profile: str
    pid: int = 0
    answered: dict[str, str] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    confirmed: set[str] = field(default_factory=set)

    @property
    def state(self) -> Path:
        """The agent's state directory."""
        return self.stage.folder.device(self.name)

    @property
    def door(self) -> Path:
        """The socket that applications use; relative to the demo's folder where the whole path is too long for one."""
        path = self.state / "door.sock"
        return path if len(str(path)) <= MAX_SOCKET_PATH_CHARS else path.relative_to(self.stage.folder.path)

    def enrol(self, token_file: Path) -> None:
        """Say which kind of device this is, and trade the token for an identity."""
        self.state.mkdir(mode=0o700)
        settings = AGENT_TOML.format(profile=self.profile, door=self.door)
        (self.state / "agent.toml").write_text(settings, encoding="utf-8")
        self.stage.run("outrider-agent", "enroll", f"@{token_file}", "--state", str(self.state), "--name", self.name)

    def start(self) -> None:
        """Start the agent and wait until its door is open."""
        self.pid = self.stage.start(self.name, "outrider-agent", "run", "--state", str(self.state))
        until(f"the agent {self.name} answers", self._answers, seconds=AGENT_UP_S)

    def reconfigure(self, more: str) -> None:
        """Add to the configuration and start the agent anew, as an operator would."""
        file = self.state / "agent.toml"
        file.write_text(file.read_text(encoding="utf-8") + more, encoding="utf-8")
        if self.stage.stop(self.name) is None:
            raise NotTrue(f"the agent {self.name} had to be killed, it did not end by itself")
        self.start()

    def client(self) -> Client:
        """The Python client, as an application uses it."""
        return Client(self.door, timeout_ms=5000)

    def status(self) -> AgentState:
        """How the agent is; raises NotTrue when it does not answer."""
        try:
            with self.client() as client:
                return client.status()
        except OutriderError as error:
            raise NotTrue(f"{self.name}: {error.message}") from error

    def model(self) -> ModelState:
        """The digits model's slot; raises NotTrue when there is none."""
        for model in self.status().models:
            if model.family == FAMILY:
                return model
        raise NotTrue(f"{self.name} has no model of the family {FAMILY}")

    def serves(self, version: str) -> bool:
        """Whether this version is committed and serves."""
        model = self.model()
        return model.phase == "committed" and model.version == version and not model.candidate

    def connect_now(self) -> None:
        """Have it try at once (`outrider-agent queue flush`): killed again and again, hubs are tried less and less."""
        try:
            with self.client() as client:
                client.control("queue.flush")
        except OutriderError as error:
            raise NotTrue(f"{self.name}: {error.message}") from error
        self.wait_online()

    def wait_online(self) -> None:
        """Wait until the link to the broker is up."""
        until(f"{self.name} is online", lambda: self.status().link == "online", seconds=ONLINE_S)

    def host_pids(self) -> list[int]:
        """The model hosts' process ids."""
        return list(self.status().hosts.values())

    def waiting(self) -> int:
        """How many records wait for the hub."""
        return sum(self.status().queue.values())

    def has_waiting(self, count: int) -> bool:
        """Whether at least that many records wait."""
        return self.waiting() >= count

    def is_settled(self) -> bool:
        """Whether the hub has acknowledged everything."""
        return self.waiting() == 0

    def is_offline(self) -> bool:
        """Whether the link is down and the agent knows it."""
        return self.status().link != "online"

    def _answers(self) -> bool:
        if not self.stage.alive(self.name):
            raise NeverTrue(f"the agent {self.name} has ended")
        return bool(self.status().pid)


@dataclass(slots=True)
class House:
    """Everybody."""

    stage: Stage
    cloud: Cloud
    operator: Operator
    devices: list[Device]
    held_back: Any = None
    served: str = ""

    @property
    def names(self) -> list[str]:
        """The devices' names."""
        return [device.name for device in self.devices]

    @property
    def folder(self) -> Folder:
        """The demo's folder."""
        return self.stage.folder

    def lose_hub(self) -> None:
        """kill -9 of the hub, which takes its broker with it; then start it again, and bring everybody back."""
        self.cloud.kill_hub_only()
        self.cloud.start()
        for device in self.devices:
            device.connect_now()


def gather(folder: Folder) -> House:
    """Everybody, not started yet."""
    stage = Stage(folder)
    port, broker_port = free_ports(2)
    return House(
        stage=stage,
        cloud=Cloud(stage=stage, port=port, broker_port=broker_port),
        operator=Operator(stage=stage),
        devices=[Device(stage=stage, name=profile, profile=profile) for profile in PROFILES],
    )
