"""The hub's own leaves of the error tree: what only a server says. Pure, so that rules may raise them.

OutriderError
├── NotFound      there is nothing of that name (404)
├── NotAllowed    the caller is not known, or may not do this (401, 403)
└── Throttled     too many tries (429)
"""

from __future__ import annotations

from shared.errors import OutriderError


class NotFound(OutriderError):
    """There is nothing of that name."""

    code = "not_found"


class NotAllowed(OutriderError):
    """The caller is not known, or may not do this."""

    code = "auth"


class Throttled(OutriderError):
    """Too many tries; `retry_after_s` says when the next one has a chance."""

    code = "rate"
    retry = True

    def __init__(self, message: str, *, retry_after_s: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
