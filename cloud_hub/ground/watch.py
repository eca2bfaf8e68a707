"""When the hub asks the broker for a sign of life, and when it gives a connection up. Counts looks; pure.

The client's own keepalive does not fit: it sees neither messages, which are taken before they reach it, nor that the
hub reads nothing while its hands are full. A broker that then seems silent is not.
"""

from __future__ import annotations

from typing import Final, Literal

ANSWER_LOOKS: Final = 10
"""Until the broker has let us in and granted the subscription."""
PING_LOOKS: Final = 10
"""Well within the keepalive that the broker was told, whatever else is sent."""
SILENT_LOOKS: Final = 30
"""Without a byte from the broker, which is asked for one meanwhile."""

Step = Literal["wait", "ping", "unanswered", "silent"]


class Watch:
    """One connection's watch."""

    def __init__(self) -> None:
        self._looks = 0
        self._unanswered = 0
        self._silent = 0

    def look(self, *, is_up: bool, has_heard: bool, can_hear: bool) -> Step:
        """What to do now; `unanswered` and `silent` end the connection.

        Args:
            is_up: the subscription is granted.
            has_heard: bytes have come since the last look.
            can_hear: we read; while we do not, nothing is known of the broker.
        """
        self._looks += 1
        if can_hear:
            self._unanswered = 0 if is_up else self._unanswered + 1
        self._silent = self._silent + 1 if can_hear and not has_heard else 0
        if self._unanswered >= ANSWER_LOOKS:
            return "unanswered"
        if self._silent >= SILENT_LOOKS:
            return "silent"
        return "wait" if self._looks % PING_LOOKS else "ping"
