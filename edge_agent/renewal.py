"""Renewal: the certificate at hand is traded for one with a new key. A short-lived child of the daemon.

    python -I -m edge_agent.renewal STATE_DIR PARENT_PID NOW_MS BASIS [HUB_URL]   renews, says how it went, ends
    python -I -m edge_agent.renewal --look STATE_DIR PARENT_PID    only says how long the certificate is good
    python -I -m edge_agent.renewal --follow STATE_DIR PARENT_PID [HUB_URL]    only says which CAs follow from ours

Rules of this file:
1. No certificate is shown to TLS: what proves us is the old key's signature (`shared/renewal.py`), so that a device
   whose certificate has expired is renewed by the same path. The dates of the hub's certificate are held against the
   trusted time, which the parent gives: this machine's clock may have died.
2. The new key and its request are on disk before the hub is asked, and stay until an answer has been kept: when an
   answer is lost, the same request is sent again and gets the same certificate.
3. The answer is believed as enrolment believes it: for this key, under this name, signed by a CA of the hub. Its dates
   must go with the trusted time (BASIS says what that rests on); when they do not, the next question is a new one,
   because the hub would answer the same request with the same certificate.
4. The device is enrolled all the time: the new files lie beside the old ones, and replacing `identity.json`, which
   names them, is the only step that counts. Whatever else a power cut leaves is garbage.
5. A hub that has changed its CA while this device slept is believed by a link that a CA of ours has signed, or not.
   The question for the time, which comes before a renewal where the clock has died, follows the same links.

The answer to the parent is one JSON document on standard output. Not here: when (edge_agent/core/renewal.py).
"""

from __future__ import annotations

import base64
import ssl
import sys
from pathlib import Path
from typing import Final

import msgspec

from edge_agent import certificates, hub_call, keeping
from edge_agent.certificates import Life
from edge_agent.core.renewal import SELDOM, WRONG_LIFE
from edge_agent.host.confine import bind_to_parent
from edge_agent.identity import (
    IDENTITY_DIR,
    Identity,
    IdentityFile,
    Refusal,
    file_names,
    load_file,
    load_identity,
    sweep,
)
from shared.errors import OutriderError, ProtocolViolation, TrustError
from shared.trust.ca_links import fingerprints, vouched

LOOK: Final = "--look"
FOLLOW: Final = "--follow"


class RenewalSaid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the child tells its parent: the certificate's dates, or CAs; or an error's code, message and hint."""

    not_before_ms: int = 0
    not_after_ms: int = 0
    authorities: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""


class _Broker(msgspec.Struct, frozen=True):
    host: str
    port: int


class _Renewed(msgspec.Struct, frozen=True):
    device: str
    certificate_pem: str
    ca_pem: str
    hub_url: str
    broker: _Broker


def renew(state_dir: Path, *, hub_url: str, now_ms: int, attested: bool) -> Life:
    """Renew and switch over; returns how long the new certificate is good.

    Args:
        state_dir: the agent's; whoever calls holds its lock.
        hub_url: where to ask; empty for where the hub said that it is.
        now_ms: the trusted time; `attested` says whether the hub has told it.

    Raises:
        Unreachable: no answer, or the hub asks to try later. The same request is sent the next time.
        TransferRefused: the hub says no; the code tells whether it will change its mind.
        TrustError: whoever answers is not the hub, or its answer does not hold.
        StorageError: the disk refuses.
    """
    folder = state_dir / IDENTITY_DIR
    file, identity = load_file(state_dir), load_identity(state_dir)
    certificate_pem = identity.certificate_path.read_text("ascii")
    ca_pem = identity.ca_path.read_text("ascii")
    csr_pem = _request(folder, identity)
    proof = certificates.prove(
        csr_pem,
        key_path=identity.key_path,
        certificate_pem=certificate_pem,
        ca_pem=ca_pem,
        device=identity.device,
    )
    body = {"certificate_pem": certificate_pem, "csr_pem": csr_pem, "proof": base64.b64encode(proof).decode()}
    try:
        answer = _ask(hub_url or identity.hub_url, ca_pem, body=body, now_ms=now_ms)
        bundle = certificates.check_bundle(answer.ca_pem)
        life = certificates.check_certificate(
            answer.certificate_pem,
            device=identity.device,
            hub_url=answer.hub_url,
            csr_pem=csr_pem,
            ca_pem=bundle,
            now_ms=now_ms,
            attested=attested,
        )
    except OutriderError as error:
        _note(folder, error, now_ms=now_ms)
        raise
    if answer.device != identity.device or not answer.broker.host or not 0 < answer.broker.port < 65536:
        raise ProtocolViolation("the hub's answer is for another device or lacks the broker", code="protocol.renewal")
    _switch(folder, file, answer, ca_pem=bundle, life=life)
    return life


def _note(folder: Path, error: OutriderError, *, now_ms: int) -> None:
    """Leave word for people of what does not pass by itself."""
    if error.code not in SELDOM:
        return
    if error.code == WRONG_LIFE:
        with keeping.translated(folder):
            (folder / "next.csr").unlink(missing_ok=True)
    note = Refusal(code=error.code, message=error.message, hint=error.hint, at_ms=now_ms)
    keeping.replace(folder / "refusal.json", msgspec.json.encode(note))


def look(state_dir: Path) -> Life:
    """Note the dates of the certificate at hand where enrolment did not; returns them."""
    file, identity = load_file(state_dir), load_identity(state_dir)
    life = certificates.life_of(identity.certificate_path)
    _name(state_dir / IDENTITY_DIR, file, life=life)
    return life


def follow(state_dir: Path, *, hub_url: str) -> str:
    """The CAs that follow from ours by the hub's links, PEM; empty where none does. Raises as `fetch_ca` does."""
    identity = load_identity(state_dir)
    return _followed(hub_url or identity.hub_url, identity.ca_path.read_text("ascii"))


def _request(folder: Path, identity: Identity) -> str:
    """The request that is on its way, or a new one with a new key."""
    key, csr = folder / "next.key", folder / "next.csr"
    try:
        text = csr.read_text("ascii")
        # The second: a switch that was cut off after it had counted. That key is in use, and the hub wants a new one.
        if certificates.fits(text, key) and not certificates.fits(text, identity.key_path):
            return text
    except (OSError, ValueError):
        pass  # none, or a part of one: a key without a whole request was never shown to anybody
    with keeping.translated(folder):
        csr.unlink(missing_ok=True)
        key.unlink(missing_ok=True)
    certificates.new_key(key)
    text = certificates.new_request(key)
    keeping.replace(csr, text.encode())
    return text


def _ask(hub_url: str, ca_pem: str, *, body: dict[str, str], now_ms: int) -> _Renewed:
    try:
        status, data = _post(hub_url, hub_call.trusting(ca_pem, now_ms=now_ms), body)
    except TrustError as error:
        wider = _followed(hub_url, ca_pem)
        if error.code != "trust.hub_certificate" or not wider:
            raise
        status, data = _post(hub_url, hub_call.trusting(wider, now_ms=now_ms), body)
    if status not in (200, 201):
        raise hub_call.refusal(hub_url, status, data, hint="look at the hub's `outrider audit`, or enrol again")
    try:
        return msgspec.json.decode(data, type=_Renewed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(
            f"the hub's answer does not parse: {error}", code="protocol.renewal", hint="update the agent"
        ) from error


def _post(hub_url: str, context: ssl.SSLContext, body: dict[str, str]) -> tuple[int, bytes]:
    return hub_call.exchange(hub_url, context, method="POST", path="/v1/renew", body=msgspec.json.encode(body))


def _followed(hub_url: str, ca_pem: str) -> str:
    """The CAs that follow from ours by the hub's links, PEM; empty where none does."""
    try:
        ours = frozenset(fingerprints(ca_pem))
        found = vouched(hub_call.fetch_ca(hub_url), pins=ours)
        return "" if not found or set(fingerprints(found)) <= ours else found
    except ValueError:
        return ""


def _switch(folder: Path, file: IdentityFile, answer: _Renewed, *, ca_pem: str, life: Life) -> None:
    """Put the new files beside the old ones, then name them: that one step is the switch."""
    generation = file.generation + 1
    key, certificate, ca = (folder / name for name in file_names(generation))
    keeping.write_anew(key, (folder / "next.key").read_bytes())
    keeping.write_anew(certificate, answer.certificate_pem.encode())
    keeping.write_anew(ca, ca_pem.encode())
    keeping.sync(folder)
    named = msgspec.structs.replace(
        file,
        generation=generation,
        hub_url=answer.hub_url,
        broker_host=answer.broker.host,
        broker_port=answer.broker.port,
    )
    _name(folder, named, life=life)
    with keeping.translated(folder):
        for name in ("next.csr", "next.key", "refusal.json"):
            (folder / name).unlink(missing_ok=True)
        sweep(folder, generation=generation)


def _name(folder: Path, file: IdentityFile, *, life: Life) -> None:
    named = msgspec.structs.replace(file, not_before_ms=life.not_before_ms, not_after_ms=life.not_after_ms)
    keeping.replace(folder / "identity.json", msgspec.json.format(msgspec.json.encode(named), indent=1))


def main(arguments: list[str]) -> int:
    """Run as a child of the daemon; returns the exit status."""
    task = arguments[0] if arguments[0] in (LOOK, FOLLOW) else ""
    state_dir, parent, *rest = arguments[1:] if task else arguments
    bind_to_parent(int(parent))
    try:
        said = _answer(task, Path(state_dir), rest)
    except OutriderError as error:
        said = RenewalSaid(code=error.code, message=error.message, hint=error.hint)
    except (OSError, ValueError) as error:
        # The identity's own files: gone, unreadable, or not what they were.
        said = RenewalSaid(
            code="storage.identity", message=f"the identity cannot be read: {error}", hint="run `outrider-agent doctor`"
        )
    sys.stdout.buffer.write(msgspec.json.encode(said))
    return 0


def _answer(task: str, state_dir: Path, rest: list[str]) -> RenewalSaid:
    if task == FOLLOW:
        return RenewalSaid(authorities=follow(state_dir, hub_url=rest[0] if rest else ""))
    if task == LOOK:
        life = look(state_dir)
    else:
        now_ms, basis, *url = rest
        life = renew(state_dir, hub_url=url[0] if url else "", now_ms=int(now_ms), attested=basis == "attested")
    return RenewalSaid(not_before_ms=life.not_before_ms, not_after_ms=life.not_after_ms)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
