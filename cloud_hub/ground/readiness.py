"""Tells the service manager that the hub is ready or ends (sd_notify(3)); nothing where there is none."""

from __future__ import annotations

import contextlib
import socket


def notify(address: str | None, state: str) -> None:
    """Send `READY=1` or `STOPPING=1` to the manager's datagram socket; a manager that is gone is no error."""
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        # `@` stands for the abstract namespace's leading zero byte.
        sender.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
