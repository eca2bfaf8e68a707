"""The online keys, as the releases room asks for them: by root."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

from cloud_hub.keyring import Keyring, learned_name
from cloud_hub.releases.desk import KeySource, OnlineKeys
from shared.trust import repository
from shared.trust.authority import role_keys
from shared.trust.library import Root, Signer

KEPT_ROOTS: Final = 2


def online_keys(folder: Path) -> KeySource:
    """The keys of this folder that a root lists; read once for each root.

    The source raises ConfigError when one is missing, unusable or open to others.
    """
    keyring = Keyring(folder)

    @lru_cache(maxsize=KEPT_ROOTS)
    def choose(root: bytes) -> OnlineKeys:
        trusted = repository.read_root(root).signed
        return OnlineKeys(
            snapshot=_find(keyring, trusted, "snapshot"),
            timestamp=_find(keyring, trusted, "timestamp"),
            assignment=_find(keyring, trusted, "assignment"),
            learned=lambda family, keyids: keyring.find(learned_name(family), keyids),
            time=None if role_keys(trusted, "time") is None else _find(keyring, trusted, "time"),
        )

    return choose


def _find(keyring: Keyring, root: Root, role: str) -> Signer:
    held = role_keys(root, role)
    return keyring.find(role, () if held is None else [key.keyid for key in held.keys])
