"""The join token: one argument that holds all a new device needs for a first contact that is already safe.

`orj1.` and base64url without padding of MessagePack `{"u": hub URL, "f": CA fingerprint, "s": secret}`. The device
fetches the CA without trusting the link, compares its SHA-256 with `f`, and only then, on a connection that verifies
the hub with that CA, shows the token. The `1` is the format's version.

Who holds the text may enrol one device (or as many as the token allows): treat it like a password until it is spent.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

import msgspec

from shared.errors import InvalidValue
from shared.ids import parse_digest

PREFIX: Final = "orj1."
SECRET_BYTES: Final = 32
MAX_CHARS: Final = 2048
_URL: Final = re.compile(r"https://([a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?", re.IGNORECASE)


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """What a join token says.

    Attributes:
        hub_url: `https://host:port`, without a path.
        ca_fingerprint: SHA-256 of the DER of the hub's CA certificate, hex.
        secret: 32 random bytes; the hub stores only their SHA-256.
    """

    hub_url: str = msgspec.field(name="u")
    ca_fingerprint: str = msgspec.field(name="f")
    secret: bytes = msgspec.field(name="s")

    def __repr__(self) -> str:
        """Without the secret: a token must not end up in a log by being formatted."""
        return f"JoinToken(hub_url={self.hub_url!r}, ca_fingerprint={self.ca_fingerprint!r})"


def encode_join_token(token: JoinToken) -> str:
    """The token as one word of letters, digits, `-`, `_` and one dot."""
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(token)).rstrip(b"=").decode()


def decode_join_token(text: str) -> JoinToken:
    """Take a token apart; raises InvalidValue when it is not a whole one. Says nothing of whether the hub knows it."""
    text = text.strip()
    try:
        if not text.startswith(PREFIX) or len(text) > MAX_CHARS:
            raise ValueError(f"it does not start with {PREFIX}")
        body = text.removeprefix(PREFIX)
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        token = msgspec.msgpack.decode(data, type=JoinToken)
        parse_digest(token.ca_fingerprint)
        if not _URL.fullmatch(token.hub_url):
            raise ValueError("its URL is not an https address without a path")
        if len(token.secret) != SECRET_BYTES:
            raise ValueError("its secret has a wrong length")
    except (ValueError, binascii.Error, msgspec.MsgspecError, RecursionError, InvalidValue) as error:
        raise InvalidValue(
            "this is not a join token",
            code="invalid.join_token",
            hint="copy the whole text that `outrider-hub token create --kind join` printed, beginning with 'orj1.'",
        ) from error
    return token
