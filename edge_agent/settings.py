"""What can be configured, as values: the shape of `agent.toml`, and what the daemon is started with.

Not here: where the values come from (`config.py`), which the daemon's memory need not hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge_agent.core.cascade import Policy
from edge_agent.core.ways import PatchPolicy
from shared.errors import ConfigError
from shared.limits import MIB
from shared.profile import DeviceProfile
from shared.telemetry import RecordClass

_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
_Hours = Annotated[int, msgspec.Meta(ge=0, le=87_600)]
_Millis = Annotated[int, msgspec.Meta(ge=100, le=86_400_000)]


class HubConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`url`: the hub's address, empty for the one that enrolment left."""

    url: str = ""


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`host` and `port` of the MQTT broker; empty and 0 for those that enrolment left."""

    host: str = ""
    port: _Port = 0


class DoorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where applications ask.

    Attributes:
        path: the Unix socket, empty for `<state>/door.sock`.
        http: loopback address and port for the Open Inference Protocol over HTTP (`127.0.0.1:8090`), empty for none;
            whoever is on this machine may ask there.
    """

    path: str = ""
    http: str = ""

    @property
    def http_address(self) -> tuple[str, int] | None:
        """Address and port of `http`, which was checked when it was read; None where there is none."""
        host, _, port = self.http.rpartition(":")
        return ("127.0.0.1" if host == "localhost" else host.strip("[]"), int(port)) if port else None


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`level` and `format` of the log on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class IntervalConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How often the agent speaks by itself.

    Attributes:
        heartbeat_ms: between two reports of state to the hub when nothing changes.
        vitals_ms: between two readings of temperature, memory and disk.
    """

    heartbeat_ms: _Millis = 30_000
    vitals_ms: _Millis = 60_000


class ProbationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long a new release is on trial; 0 leaves the profile's figure.

    Attributes:
        duration_ms: length of the trial.
        good_answers: how many it must give.
        max_failures: how many end it.
    """

    duration_ms: Annotated[int, msgspec.Meta(ge=0, le=604_800_000)] = 0
    good_answers: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    max_failures: Annotated[int, msgspec.Meta(ge=0, le=1_000)] = 0


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many answers are kept to be given again; `entries` 0 keeps none, which is right unless inputs repeat."""

    entries: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    bytes: Annotated[int, msgspec.Meta(ge=0, le=2**32)] = 8_388_608


class QueueConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How records wait for the hub; how many bytes they may take is the profile's `disk.queue_bytes`.

    Attributes:
        flush_ms: how long a result may wait in memory for its commit; a crash takes what waits there.
        min_free_bytes: what the outbox leaves free on its file system, at most a twentieth of that; other programs
            live there too.
        outcome_ttl_h, result_ttl_h, reading_ttl_h: hours after which a record that could not be sent is given up; 0
            for never. Events never are. The default is a day more than the thirty that a device may be away.
    """

    flush_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 200
    min_free_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 64 * MIB
    outcome_ttl_h: _Hours = 744
    result_ttl_h: _Hours = 744
    reading_ttl_h: _Hours = 744

    @property
    def ttl_ms(self) -> dict[RecordClass, int]:
        """Milliseconds by class, without those that never expire."""
        hours = {
            RecordClass.OUTCOME: self.outcome_ttl_h,
            RecordClass.RESULT: self.result_ttl_h,
            RecordClass.READING: self.reading_ttl_h,
        }
        return {klass: 3_600_000 * count for klass, count in hours.items() if count}


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`enabled`: whether this device keeps labelled samples and takes part in federated runs."""

    enabled: bool = True


class UpdatesConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How releases are fetched.

    Attributes:
        daily_bytes: model files and patches fetched in any 24 hours; 0 for no budget.
        policy: `prefer_patch` takes a patch where it is shorter, `patch_only` fetches nothing whole (a first release
            neither), `full` takes no patches.
        mirror: an HTTPS address that is asked for files before the hub is, with a certificate of the hub's CA; empty
            for none. What it serves is held against what was signed, as everything is.
        accept_learned: whether releases are taken that no person signed: their base's file with other numbers in its
            head, within bounds that a person signed.
    """

    daily_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 0
    policy: PatchPolicy = "prefer_patch"
    mirror: str = ""
    accept_learned: bool = False


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be configured.

    Attributes:
        state_dir: where all of the agent's files are; only from a flag or the environment.
        profile: name of a device profile, or `auto` to detect one.
    """

    state_dir: Path
    profile: str = "auto"
    hub: HubConfig = HubConfig()
    broker: BrokerConfig = BrokerConfig()
    door: DoorConfig = DoorConfig()
    log: LogConfig = LogConfig()
    intervals: IntervalConfig = IntervalConfig()
    probation: ProbationConfig = ProbationConfig()
    cascade: Policy = Policy()
    cache: CacheConfig = CacheConfig()
    training: TrainingConfig = TrainingConfig()
    queue: QueueConfig = QueueConfig()
    updates: UpdatesConfig = UpdatesConfig()

    @property
    def door_path(self) -> Path:
        """The Unix socket for applications."""
        return Path(self.door.path) if self.door.path else self.state_dir / "door.sock"

    @property
    def outbox_dir(self) -> Path:
        """Where the records that wait for the hub are."""
        return self.state_dir / "outbox"

    @property
    def database_path(self) -> Path:
        """The SQLite file."""
        return self.state_dir / "agent.db"


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the daemon needs to know to start: the complete configuration and the resolved profile."""

    config: AgentConfig
    profile: DeviceProfile


def encode_launch(launch: Launch) -> str:
    """One argument for the daemon's command line; no key of it is a secret."""
    return msgspec.json.encode(launch, enc_hook=str).decode()


def decode_launch(text: str) -> Launch:
    """What `encode_launch` wrote; raises ConfigError for anything else."""
    try:
        return msgspec.json.decode(text, type=Launch, dec_hook=_path)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"the daemon was started by hand: {error}",
            code="config.launch",
            hint="start it with `outrider-agent run`",
        ) from error


def _path(kind: type, value: Any) -> Any:
    return kind(value)
