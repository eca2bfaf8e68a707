"""The log on stderr: constant messages with fields, as text for people or JSON lines for machines."""

from __future__ import annotations

import logging
import sys

import msgspec

from edge_agent.settings import LogConfig


def configure_logging(config: LogConfig) -> None:
    """Send the log to stderr, as text or as one JSON object per line; fields follow the constant message."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonLines() if config.format == "json" else TextLines())
    logging.basicConfig(level=config.level.upper(), handlers=[stream], force=True)


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00 INFO edge_agent.driver link up broker=hub:8883`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, with the record's own fields at its end."""
        extra = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + extra


class JsonLines(logging.Formatter):
    """One JSON object per line; times in milliseconds since 1970."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; what JSON cannot hold is shown as text."""
        document: dict[str, object] = {
            "at_ms": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document, enc_hook=str).decode()
