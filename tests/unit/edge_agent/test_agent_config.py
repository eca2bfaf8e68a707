"""Configuration: which source wins, what is refused, all problems at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edge_agent.commands.init import template
from edge_agent.config import load_config
from edge_agent.settings import QueueConfig
from shared.errors import ConfigError
from shared.telemetry import RecordClass


def write(state: Path, text: str) -> None:
    (state / "agent.toml").write_text(text)


def test_defaults_need_no_file(tmp_path: Path) -> None:
    config = load_config(state_dir=str(tmp_path), environ={}).config
    assert config.state_dir == tmp_path
    assert config.door_path == tmp_path / "door.sock"
    assert config.profile == "auto"
    assert not config.updates.accept_learned


def test_later_sources_win_and_origins_are_known(tmp_path: Path) -> None:
    write(tmp_path, '[log]\nlevel = "debug"\nformat = "json"\n[intervals]\nheartbeat_ms = 5000\n')
    environ = {"OUTRIDER_AGENT_LOG__LEVEL": "warning", "OUTRIDER_AGENT_INTERVALS__VITALS_MS": "700", "HOME": "/x"}
    loaded = load_config(state_dir=str(tmp_path), flags={"log.level": "error"}, environ=environ)
    assert (loaded.config.log.level, loaded.config.log.format) == ("error", "json")
    assert (loaded.config.intervals.heartbeat_ms, loaded.config.intervals.vitals_ms) == (5000, 700)
    origins = {setting.key: setting.origin for setting in loaded.settings}
    assert origins["log.level"] == "flag --log-level"
    assert origins["log.format"] == str(tmp_path / "agent.toml")
    assert origins["intervals.vitals_ms"] == "environment OUTRIDER_AGENT_INTERVALS__VITALS_MS"
    assert origins["profile"] == "default"
    assert origins["state_dir"] == "flag --state"


def test_the_state_directory_comes_from_flag_or_environment(tmp_path: Path) -> None:
    environ = {"OUTRIDER_AGENT_STATE_DIR": str(tmp_path / "env")}
    assert load_config(environ=environ).config.state_dir == tmp_path / "env"
    assert load_config(state_dir=str(tmp_path / "flag"), environ=environ).config.state_dir == tmp_path / "flag"


def test_learned_releases_are_taken_where_the_device_says_so(tmp_path: Path) -> None:
    write(tmp_path, "[updates]\naccept_learned = true\n")
    assert load_config(state_dir=str(tmp_path), environ={}).config.updates.accept_learned


def test_all_problems_are_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        'profil = "pi4"\nstate_dir = "/x"\n[log]\nlevel = "loud"\n[intervals]\nvitals_ms = "700"\n[dor]\na = 1\n',
    )
    environ = {"OUTRIDER_AGENT_BROKER__PROT": "1", "OUTRIDER_AGENT_BROKER__PORT": "99999"}
    with pytest.raises(ConfigError) as caught:
        load_config(state_dir=str(tmp_path), environ=environ)
    text = str(caught.value)
    for part in (
        "unknown key 'profil'; did you mean 'profile'?",
        "state_dir cannot be set in a file",
        'log.level = "loud"',
        'intervals.vitals_ms = "700"',
        "unknown key 'dor'",
        "unknown variable OUTRIDER_AGENT_BROKER__PROT; did you mean OUTRIDER_AGENT_BROKER__PORT?",
        'broker.port = "99999"',
    ):
        assert part in text
    assert text.startswith("7 problems:")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("not toml", "is not TOML"),
        ('[hub]\nurl = "http://hub"\n', "hub.url"),
        ('[updates]\nmirror = "http://mirror"\n', "updates.mirror"),
        ('[updates]\npolicy = "never"\n', "updates.policy"),
        ("[updates]\ndaily_bytes = -1\n", "updates.daily_bytes"),
        ('[broker]\nhost = "hub"\n', "belong together"),
        (f'[door]\npath = "/{"x" * 120}"\n', "a socket's path may have 107"),
        *(
            (f'[door]\nhttp = "{address}"\n', "no address on loopback")
            for address in (
                "0.0.0.0:8090",
                "192.168.1.7:8090",
                "[::]:8090",
                "8090",
                "127.0.0.1",
                "127.0.0.1:0",
                "localhost:70000",
                "localhost.example:80",
                "::1:8090",
                "127.0.0.1:8\u0663",
            )
        ),
        ("[intervals]\nheartbeat_ms = 1\n", "heartbeat_ms"),
        ("log = 3\n", "unknown key 'log'"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, text: str, part: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(state_dir=str(tmp_path), environ={})
    assert part in str(caught.value)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(state_dir=str(tmp_path), file=str(tmp_path / "none.toml"), environ={})


def test_credentials_in_a_url_are_masked(tmp_path: Path) -> None:
    environ = {"OUTRIDER_AGENT_HUB__URL": "https://me:hunter2@hub"}
    with pytest.raises(ConfigError) as caught:
        load_config(state_dir=str(tmp_path), environ=environ)
    assert "https://***@hub" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_template_is_toml_that_says_the_same(tmp_path: Path) -> None:
    environ = {"OUTRIDER_AGENT_LOG__FORMAT": "json"}
    loaded = load_config(state_dir=str(tmp_path), environ=environ)
    text = template(loaded)
    assert tomllib.loads(text)["log"] == {"format": "json"}
    write(tmp_path, text)
    assert load_config(state_dir=str(tmp_path), environ={}).config == loaded.config
    write(tmp_path, "\n".join(line.removeprefix("# ") for line in text.splitlines()[2:]))
    assert load_config(state_dir=str(tmp_path), environ={}).config == loaded.config


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("127.0.0.1:8090", ("127.0.0.1", 8090)),
        ("localhost:1", ("127.0.0.1", 1)),
        ("127.1.2.3:65535", ("127.1.2.3", 65535)),
        ("[::1]:8090", ("::1", 8090)),
    ],
)
def test_the_port_for_http_is_on_loopback(tmp_path: Path, text: str, address: tuple[str, int] | None) -> None:
    write(tmp_path, f'[door]\nhttp = "{text}"\n')
    assert load_config(state_dir=str(tmp_path), environ={}).config.door.http_address == address


def test_what_waits_is_kept_for_the_thirty_days_that_a_device_may_be_away() -> None:
    kept = QueueConfig().ttl_ms
    assert RecordClass.EVENT not in kept
    assert all(kept[klass] > 30 * 86_400_000 for klass in RecordClass if klass is not RecordClass.EVENT)
    assert QueueConfig(outcome_ttl_h=0, result_ttl_h=1).ttl_ms == {
        RecordClass.RESULT: 3_600_000,
        RecordClass.READING: kept[RecordClass.READING],
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("flush_ms = 20000", "queue.flush_ms"),
        ("reading_ttl_h = -1", "queue.reading_ttl_h"),
        ("event_ttl_h = 1", "unknown key 'queue.event_ttl_h'"),
    ],
)
def test_a_queue_that_makes_no_sense_is_told(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "agent.toml").write_text(f"[queue]\n{line}\n")
    with pytest.raises(ConfigError, match=problem):
        load_config(state_dir=str(tmp_path), environ={})
