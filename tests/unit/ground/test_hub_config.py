"""The hub's configuration: who wins, what is refused, and that all faults are told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_hub import config
from cloud_hub.__main__ import main
from cloud_hub.ground.broker import local_address
from shared.errors import ConfigError, InvalidValue
from shared.ids import parse_device_id


def load(tmp_path: Path, toml: str = "", variables: dict[str, str] | None = None, **flags: object) -> config.Loaded:
    (tmp_path / "hub.toml").write_text(toml)
    return config.load(flags={"data_dir": str(tmp_path), **flags}, variables=variables or {})


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    toml = "[listen]\nport = 1111\nhost = '10.0.0.1'\n[broker]\nport = 2222"
    variables = {"OUTRIDER_HUB_LISTEN__PORT": "3333", "OUTRIDER_HUB_BROKER__PORT": "4444", "HOME": "/x"}
    loaded = load(tmp_path, toml, variables, **{"broker.port": 5555, "broker.mode": None})
    assert (loaded.config.listen.host, loaded.config.listen.port) == ("10.0.0.1", 3333)
    assert (loaded.config.broker.port, loaded.config.broker.mode) == (5555, "managed")
    assert loaded.origins["listen.port"] == "OUTRIDER_HUB_LISTEN__PORT"
    assert loaded.origins["broker.port"] == "flag"
    assert loaded.origins["broker.mode"] == "default"
    assert "listen.port = 3333  # OUTRIDER_HUB_LISTEN__PORT" in config.describe(loaded)


def test_lists_and_booleans_come_from_the_environment(tmp_path: Path) -> None:
    variables = {"OUTRIDER_HUB_PUBLIC__NAMES": "a.example, 10.0.0.1", "OUTRIDER_HUB_METRICS__OPEN": "true"}
    loaded = load(tmp_path, variables=variables).config
    assert loaded.public.names == ("a.example", "10.0.0.1")
    assert loaded.metrics.open
    assert loaded.hub_url == "https://a.example:8443"
    assert loaded.server_names == ("a.example", "10.0.0.1", "localhost", "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "reached", "told"),
    [
        ("127.0.0.1", "127.0.0.1", "localhost"),
        ("0.0.0.0", "127.0.0.1", "localhost"),
        ("::", "::1", "localhost"),
        ("10.0.0.7", "10.0.0.7", "10.0.0.7"),
        ("::1", "::1", "::1"),
    ],
)
def test_certificates_carry_the_address_that_is_listened_on(tmp_path: Path, host: str, reached: str, told: str) -> None:
    """The hub reaches its own broker there, and checks the certificate as devices do."""
    loaded = load(tmp_path, f"[listen]\nhost = '{host}'\n[broker]\nhost = '{host}'").config
    assert local_address(host) == reached
    assert reached in loaded.broker_names
    assert reached in loaded.server_names
    assert told in loaded.broker_names
    assert loaded.broker_host == told
    assert loaded.hub_url == f"https://{f'[{told}]' if ':' in told else told}:8443"
    assert load(tmp_path, f"[listen]\nhost = '{host}'\n[public]\nnames = ['a']").config.broker_host == "a"


def test_all_faults_are_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    toml = "[listen]\nprt = 1\nport = 'x'\n[borker]\nhost = 'h'\n[broker]\nport = 70000"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, {"OUTRIDER_HUB_LOG__LEVEL": "loud", "OUTRIDER_HUB_NONSENSE": "1"})
    text = caught.value.message
    assert "unknown key 'listen.prt'; did you mean 'listen.port'?" in text
    assert "unknown key 'borker.host'; did you mean 'broker.host'?" in text
    assert "listen.port: Expected `int`, got `str`" in text
    assert "70000 is not a port" in text
    assert "OUTRIDER_HUB_LOG__LEVEL: log.level" in text
    assert "OUTRIDER_HUB_NONSENSE: unknown key 'nonsense'" in text


@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        ("data_dir = '/x'", "data_dir cannot be set in the file"),
        ("[listen]\nport = 9000\n[broker]\nport = 9000", "must differ"),
        ("[public]\nnames = ['a b']", "'a b' is not a host name"),
        ('[broker]\nhost = "::1%\\nallow_anonymous true"', "is not a host name"),
        ("[public]\nurl = 'http://x'", "is not https://"),
        ("[certificates]\ndevice_days = 0", "certificates.device_days: 0"),
        ("[broker]\nhub_name = 'pi-1'", "broker.hub_name: 'pi-1' is neither"),
        ("[broker]\nhub_name = 'hub-1'", "broker.hub_name"),
        ("[broker]\nhub_name = 'hub.'", "broker.hub_name"),
        ('[broker]\nhub_name = "hub.b\\ntopic #"', "broker.hub_name"),
        ("listen = 3", "unknown key 'listen'"),
        ("= broken", "Invalid"),
    ],
)
def test_values_that_cannot_work(tmp_path: Path, toml: str, fault: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        load(tmp_path, toml)
    assert fault in caught.value.message


def test_no_device_can_have_a_hubs_name(tmp_path: Path) -> None:
    assert load(tmp_path).config.broker.hub_name == "hub"
    for name in ("hub", "hub.b", "hub.berlin-2"):
        assert load(tmp_path, f"[broker]\nhub_name = '{name}'").config.broker.hub_name == name
        with pytest.raises(InvalidValue):
            parse_device_id(name)


def test_the_command_checks_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hub.toml").write_text("[listen]\nport = 1234\n")
    assert main(["serve", "--data", str(tmp_path), "--print-config"]) == 0
    assert f"listen.port = 1234  # {tmp_path}/hub.toml" in capsys.readouterr().out
    assert main(["serve", "--data", str(tmp_path), "--check-config"]) == 0
    (tmp_path / "hub.toml").write_text("[listen]\nporto = 1234\n")
    assert main(["serve", "--data", str(tmp_path), "--check-config"]) == 78
    error = capsys.readouterr().err
    assert "did you mean 'listen.port'?" in error
    assert "code: config.invalid" in error


def test_the_database_is_in_the_data_directory_unless_it_is_named(tmp_path: Path) -> None:
    assert load(tmp_path).config.database_url == f"sqlite:///{tmp_path}/hub.db"
    url = "postgresql+psycopg://hub@db.example:5433/outrider?sslmode=verify-full"
    assert load(tmp_path, f"[database]\nurl = '{url}'").config.database_url == url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://hub:secret@db.example/outrider",
        "postgresql+psycopg://hub@db.example/outrider?password=secret",
        "postgresql+psycopg://hub@db.example/",
        "postgresql://hub@db.example/outrider",
        "mysql://hub@db.example/secret",
        "postgresql+psycopg://[secret/outrider",
    ],
)
def test_a_database_that_cannot_be_used_or_holds_a_secret_is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"database\.url") as caught:
        load(tmp_path, variables={"OUTRIDER_HUB_DATABASE__URL": url})
    assert "secret" not in caught.value.message
