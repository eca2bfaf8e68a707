"""The device's side of Outrider: the daemon, its model hosts, its verifier and the client for applications."""

from typing import Final

__version__: Final = "0.1.0"
