"""`outrider login`: learn the hub's CA, check it against a pin, try the token, save both as a context.

The CA comes over a link that nothing vouches for yet, so it counts only when its fingerprint is the one that the
operator was told on another way (`outrider-hub ca show` on the hub's machine). Without a pin a person at a terminal may
compare and agree; a script may not. The token travels only on a second link, verified against that CA.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.answers import WhoAmI
from cloud_hub.cli.config import Context, load_contexts, save_contexts
from cloud_hub.cli.exits import Exit
from cloud_hub.cli.hub import Hub, fetch_ca, fingerprint, parse_url
from shared.errors import InvalidValue, TrustError
from shared.limits import KIB
from shared.trust.ca_links import fingerprints, vouched

_CONTEXT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def run(arguments: argparse.Namespace) -> Exit:
    """Save the context and make it the current one."""
    url = arguments.url.rstrip("/")
    host, port = parse_url(url)
    name = arguments.context or f"{host}-{port}"
    if not _CONTEXT_NAME.fullmatch(name):
        raise InvalidValue(f"context name {name[:80]!r} is not valid", hint="use letters, digits, '.', '_' and '-'")
    token = _token(arguments)
    ca_pem = _ca(arguments, url)
    context = Context(url=url, token=token, ca_pem=ca_pem, fingerprint=fingerprints(ca_pem)[0])
    who = Hub(context).get("/v1/whoami", WhoAmI)
    saved = load_contexts()
    path = save_contexts(
        msgspec.structs.replace(saved, current=name, contexts={**saved.contexts, name: context}),
    )
    answer = {"context": name, "url": url, "name": who.name, "role": who.role, "fingerprint": context.fingerprint}
    if arguments.json:
        screen.show_json({**answer, "file": str(path)})
    else:
        print(f"logged in to {url} as {screen.clean(who.name)} ({screen.clean(who.role)})")
        screen.note(f"saved as context {name!r} in {path}")
    return Exit.DONE


def _token(arguments: argparse.Namespace) -> str:
    text = arguments.token
    if text is None:
        source = arguments.token_file
        text = sys.stdin.read(KIB) if source == "-" else _small_file(source, what="token")
    token: str = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidValue(
            "that is not a token", code="invalid.token", hint="give one as `outrider-hub token create` prints it"
        )
    return token


def _ca(arguments: argparse.Namespace, url: str) -> str:
    if arguments.ca is not None:
        pem = _small_file(arguments.ca, what="CA certificate")
        fingerprint(pem)
        return pem
    published = fetch_ca(url)
    found = fingerprints(published)[0]
    if arguments.fingerprint is not None:
        wanted = arguments.fingerprint.replace(":", "").strip().lower()
        if not re.fullmatch(r"[0-9a-f]{64}", wanted):
            raise InvalidValue("the fingerprint is not 64 hex digits", code="invalid.fingerprint")
        pem = vouched(published, pins=frozenset({wanted}))
        if not pem:
            raise TrustError(
                f"the CA at {url} has fingerprint {found}, not the one that was given",
                code="trust.ca",
                hint="somebody else may be answering at that address; compare with `outrider-hub ca show` on the hub",
            )
        return pem
    screen.note(f"the CA at {url} has the fingerprint {found}")
    if not screen.can_ask():
        raise TrustError(
            "nobody is here to compare the CA's fingerprint",
            code="trust.ca",
            hint="give --fingerprint HEX or --ca FILE (`outrider-hub ca show` on the hub prints it)",
        )
    if not screen.confirm("is this what `outrider-hub ca show` prints on the hub?"):
        raise TrustError("the CA's fingerprint was not confirmed; nothing was saved", code="trust.ca")
    return vouched(published, pins=frozenset({found}))


def _small_file(name: str, *, what: str) -> str:
    try:
        with Path(name).open("rb") as file:
            data = file.read(64 * KIB)
        return data.decode("ascii")
    except OSError as error:
        raise InvalidValue(
            f"{what} file {name} cannot be read: {error.strerror}",
            code="invalid.file",
            hint="check the path and that you may read the file",
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidValue(
            f"{what} file {name} is not text",
            code="invalid.file",
            hint="give the file as `outrider-hub` wrote or printed it",
        ) from error
