"""From parsed arguments to the configuration."""

from __future__ import annotations

import argparse
from typing import Final

from cloud_hub import config
from cloud_hub.config import Loaded

_FLAGS: Final = {
    "data": "data_dir",
    "host": "listen.host",
    "port": "listen.port",
    "broker_host": "broker.host",
    "broker_port": "broker.port",
    "broker_mode": "broker.mode",
    "log_level": "log.level",
}


def load(arguments: argparse.Namespace) -> Loaded:
    """The configuration that these arguments, the environment and the file amount to; raises ConfigError."""
    flags = {key: getattr(arguments, name, None) for name, key in _FLAGS.items()}
    return config.load(flags=flags, variables=config.environment())
