"""Looking at something on the hub again and again until it has ended: `--wait` of every command."""

from __future__ import annotations

from collections.abc import Callable

from cloud_hub.cli.exits import Exit
from cloud_hub.cli.hub import Document, Hub, HubRefused
from cloud_hub.cli.system import SystemClock
from shared.errors import Unreachable


def follow(
    hub: Hub, path: str, document: Document, *, ended: Callable[[Document], bool], wait_s: int, poll_ms: int
) -> Document:
    """The thing as it was when it had ended, or when the time was over.

    A hub that is away for a while (a restart) is waited for: what is waited for goes on by itself.

    Args:
        path: where it is looked at.
        document: what is known of it.
        ended: called with each look in turn; may tell of it, and says whether that was the last.

    Raises:
        HubRefused: the hub says that it will not answer.
    """
    clock = SystemClock()
    until_ms = clock.mono_ms() + wait_s * 1000
    while not ended(document) and clock.mono_ms() < until_ms:
        clock.wait_ms(poll_ms)
        try:
            document = hub.get(path, Document)
        except Unreachable:
            continue
        except HubRefused as error:
            if error.status is not Exit.UNREACHABLE:
                raise
    return document
