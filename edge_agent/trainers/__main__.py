"""`python -I -m edge_agent.trainers SOCKET_FD MODEL_FD PARENT_PID NICENESS`: started by the core only."""

from __future__ import annotations

import socket
import sys

from edge_agent.host import confine


def main(arguments: list[str]) -> int:
    """Run a trainer on the descriptors that the core passed."""
    link_fd, model_fd, parent, niceness = (int(argument) for argument in arguments)
    confine.bind_to_parent(parent)
    from edge_agent.trainers.child import serve  # numpy and the rest only after the tie to the core holds

    with socket.socket(fileno=link_fd) as link:
        try:
            serve(link=link, model_fd=model_fd, parent=parent, niceness=niceness)
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the core is gone, and so is the reason to be here
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
