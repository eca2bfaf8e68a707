"""`outrider-hub ca show`: the fingerprint that operators and devices pin."""

from __future__ import annotations

import argparse

from cloud_hub.cli import screen
from cloud_hub.commands import settings
from cloud_hub.ground import transport


def show(arguments: argparse.Namespace) -> int:
    """Print the CA's fingerprint, or the certificate itself."""
    config = settings.load(arguments).config
    config.require()
    folder = config.folder
    authority = transport.load_authority(folder)
    if arguments.json:
        screen.show_json(
            {
                "fingerprint": authority.fingerprint,
                "file": str(folder.ca_certificate),
                "expires_ms": authority.expires_ms,
                "pem": authority.pem,
            }
        )
    elif arguments.pem:
        print(authority.pem, end="")
    else:
        print(authority.fingerprint)
    return 0
