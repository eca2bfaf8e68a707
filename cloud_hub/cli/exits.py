"""Exit codes, in one table, and which error ends with which."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from shared.errors import (
    ConfigError,
    Conflict,
    InvalidValue,
    OutriderError,
    TransferCorrupt,
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


class CommandFailed(OutriderError):
    """A command ended with an exit code of its own: `build failed`, `timed out while still running`."""

    code = "command.failed"

    def __init__(self, message: str, *, status: Exit, code: str | None = None, hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.status = status


_BY_ERROR: Final[tuple[tuple[type[OutriderError], Exit], ...]] = (
    (ConfigError, Exit.BAD_CONFIGURATION),
    (InvalidValue, Exit.USAGE),
    (TrustError, Exit.NOT_TRUSTED),
    (TransferCorrupt, Exit.NOT_TRUSTED),
    (Unreachable, Exit.UNREACHABLE),
    (Conflict, Exit.CONFLICT),
)
_BY_STATUS: Final[dict[int, Exit]] = {
    401: Exit.NOT_ALLOWED,
    403: Exit.NOT_ALLOWED,
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    502: Exit.UNREACHABLE,
    503: Exit.UNREACHABLE,
    504: Exit.STILL_RUNNING,
}


def exit_of(error: OutriderError) -> Exit:
    """The exit code for an error that nothing caught."""
    if isinstance(error, CommandFailed):
        return error.status
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    return Exit.FAILED


def exit_of_status(status: int, code: str) -> Exit:
    """The exit code for what the hub answered: by the problem's code where that says more, else by HTTP status."""
    if code.startswith("trust."):
        return Exit.NOT_TRUSTED
    if code.startswith("invalid."):
        # As when this program notices it by itself: what was given cannot be used.
        return Exit.USAGE
    return _BY_STATUS.get(status, Exit.FAILED)
