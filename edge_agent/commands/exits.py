"""Exit codes, in one table, and which error ends with which: by its code where that says more, else by its class."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from shared.errors import (
    ConfigError,
    Conflict,
    InputRefused,
    InvalidValue,
    OutriderError,
    TransferCorrupt,
    TransferRefused,
    TrustError,
    Unreachable,
)


class Exit(IntEnum):
    """What the shell sees; people script against these numbers."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_ALLOWED = 4
    UNREACHABLE = 5
    CONFLICT = 6
    UNHEALTHY = 7
    STILL_RUNNING = 8
    NOT_TRUSTED = 9
    BAD_CONFIGURATION = 78
    INTERRUPTED = 130


_BY_CODE: Final[dict[str, Exit]] = {
    "auth": Exit.NOT_ALLOWED,
    "deadline": Exit.STILL_RUNNING,
    "enrol": Exit.NOT_ALLOWED,
    "enrol.name_taken": Exit.CONFLICT,
    "invalid": Exit.USAGE,
    "model.unknown": Exit.NOT_FOUND,
    "not_found": Exit.NOT_FOUND,
    "release.no_previous": Exit.CONFLICT,
    "transfer.not_found": Exit.NOT_FOUND,
    "transfer.timeout": Exit.STILL_RUNNING,
}
"""By the longest dotted prefix of the error's code."""

_BY_CLASS: Final[tuple[tuple[type[OutriderError], Exit], ...]] = (
    (ConfigError, Exit.BAD_CONFIGURATION),
    (InvalidValue, Exit.USAGE),
    (InputRefused, Exit.USAGE),
    (TrustError, Exit.NOT_TRUSTED),
    (TransferCorrupt, Exit.NOT_TRUSTED),
    (TransferRefused, Exit.NOT_ALLOWED),
    (Unreachable, Exit.UNREACHABLE),
    (Conflict, Exit.CONFLICT),
)


def exit_of(error: OutriderError) -> Exit:
    """The exit code for an error that ended a command."""
    parts = error.code.split(".")
    for length in range(len(parts), 0, -1):
        found = _BY_CODE.get(".".join(parts[:length]))
        if found is not None:
            return found
    for kind, code in _BY_CLASS:
        if isinstance(error, kind):
            return code
    return Exit.FAILED
