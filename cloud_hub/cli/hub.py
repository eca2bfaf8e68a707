"""HTTPS to the hub: one CA, pinned at login; bounded answers; every wait has a deadline.

Rules: nothing secret travels before the hub's certificate was checked against the pinned CA; an answer larger than its
bound is refused before it is kept; an answer that does not parse as its type is an error and not a guess.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import http.client
import re
import ssl
from collections.abc import Callable
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.config import Context
from cloud_hub.cli.exits import CommandFailed, exit_of_status
from shared.errors import InvalidValue, OutriderError, ProtocolViolation, TransferCorrupt, TrustError, Unreachable
from shared.limits import KIB, MIB

TIMEOUT_S: Final = 30.0
MAX_ANSWER_BYTES: Final = 32 * MIB
MAX_PROBLEM_BYTES: Final = 64 * KIB
MAX_CA_BYTES: Final = 64 * KIB
_CHUNK_BYTES: Final = 256 * KIB

MAX_ITEMS: Final = 100_000
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")

T = TypeVar("T")
Document = dict[str, Any]
"""A JSON object as the hub sent it."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the hub sends it (RFC 9457)."""

    title: str = ""
    detail: str = ""
    code: str = ""
    hint: str = ""


class HubRefused(CommandFailed):
    """The hub answered and said no; the HTTP status and the problem's code decide the exit code."""

    code = "hub.refused"

    def __init__(self, message: str, *, http_status: int, code: str, hint: str) -> None:
        super().__init__(message, status=exit_of_status(http_status, code), code=code, hint=hint)
        self.http_status = http_status


def parse_url(text: str) -> tuple[str, int]:
    """Host and port of a hub's address; raises InvalidValue unless it is `https://HOST[:PORT]`."""
    try:
        parts = urlsplit(text)
        port = parts.port or 443
    except ValueError as error:
        raise InvalidValue(f"{text[:120]!r} is not an address: {error}", code="invalid.url") from error
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if parts.scheme != "https" or not parts.hostname or extra:
        raise InvalidValue(
            f"{text[:120]!r} is not the address of a hub",
            code="invalid.url",
            hint="give scheme, host and port, for example https://hub.example:8443",
        )
    return parts.hostname, port


def fetch_ca(url: str) -> str:
    """What the hub at this address says of its CAs, PEM; unverified, and the one that issues first.

    During a change of the CA there are two, and the link between them (`shared/trust/ca_links.py`).
    """
    from shared.trust.ca_links import fingerprints  # cryptography: no other command of this module needs it

    host, port = parse_url(url)
    blind = ssl.create_default_context()
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE  # the fingerprint is checked instead, and nothing secret is sent on this link
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=blind)
    try:
        with _foreign_errors(url):
            connection.request("GET", "/v1/ca")
            response = connection.getresponse()
            data = _read(response, MAX_CA_BYTES)
    finally:
        connection.close()
    if response.status != 200:
        raise Unreachable(f"{url} answered {response.status} to GET /v1/ca", code="hub.not_a_hub", hint="check the URL")
    pem = data.decode("ascii", errors="replace")
    try:
        fingerprints(pem)
    except ValueError as error:
        raise TrustError(
            f"what {url} shows as its CA is no certificate, or too many",
            code="trust.ca",
            hint="check the address: this is no hub, or somebody else answers for it",
        ) from error
    return pem


def fingerprint(pem: str) -> str:
    """SHA-256 of the certificate's DER form, hex; raises InvalidValue unless this is one certificate and no more.

    Exactly one, because a pin vouches for what it was computed over, while TLS would trust every certificate of the
    text: the library's own decoder stops at the padding and never sees a second one.
    """
    match = _PEM.fullmatch(pem.strip())
    try:
        if match is None:
            raise ValueError("it is not exactly one certificate")
        return hashlib.sha256(base64.b64decode("".join(match.group(1).split()), validate=True)).hexdigest()
    except (ValueError, binascii.Error) as error:
        raise InvalidValue(f"not a PEM certificate: {error}", code="invalid.certificate") from error


class Hub:
    """One hub, as the context's principal."""

    def __init__(self, context: Context, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = context.url
        self._host, self._port = parse_url(context.url)
        self._token = context.token
        self._timeout_s = timeout_s
        try:
            self._tls = ssl.create_default_context(cadata=context.ca_pem)
        except ssl.SSLError as error:
            raise TrustError(
                "the saved CA certificate does not parse", code="trust.ca", hint="log in again with outrider login"
            ) from error

    def get(self, path: str, answer: type[T], **query: str | int | None) -> T:
        """GET and parse; `query` leaves out what is None."""
        return self._json("GET", path, answer, query=query)

    def raw(self, path: str) -> bytes:
        """GET, as it comes; for signed metadata, of which every byte counts."""
        return self._request("GET", path)

    def send(self, method: str, path: str, body: object, answer: type[T]) -> T:
        """Send a JSON body and parse the answer."""
        return self._json(method, path, answer, body=msgspec.json.encode(body))

    def items(self, path: str, *, most: int = MAX_ITEMS, **query: str | int | None) -> list[Document]:
        """A list's items, page by page, as the hub sent them; `answers.read` gives them their types."""
        rows: list[Document] = []
        while True:
            page = self.get(path, _Page, **query)
            rows += page.items
            if page.next is None or len(rows) >= most:
                return rows[:most]
            query["after"] = page.next

    def has_blob(self, digest: str) -> bool:
        """Whether the hub holds this blob already."""
        connection = self._open()
        try:
            with _foreign_errors(self.url):
                connection.request("HEAD", f"/v1/blobs/{digest}", headers=self._headers())
                response = connection.getresponse()
                response.read(0)
        finally:
            connection.close()
        return response.status == 200

    def put_blob(self, digest: str, file: BinaryIO, *, length: int, progress: Progress) -> None:
        """Send a blob; the hub checks the digest. Sending it again is harmless."""
        connection = self._open()
        try:
            with _foreign_errors(self.url):
                connection.putrequest("PUT", f"/v1/blobs/{digest}")
                for name, value in {**self._headers(), "Content-Length": str(length)}.items():
                    connection.putheader(name, value)
                connection.putheader("Content-Type", "application/octet-stream")
                connection.endheaders()
                # A hub that refuses closes before it has read everything; its answer says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                    sent = 0
                    while chunk := file.read(_CHUNK_BYTES):
                        connection.send(chunk)
                        sent += len(chunk)
                        progress(sent, length)
                response = connection.getresponse()
                data = _read(response, MAX_PROBLEM_BYTES)
        finally:
            connection.close()
        if response.status >= 300:
            raise _refusal(response.status, data)

    def blob(self, digest: str, *, length: int, title: str = "") -> bytes:
        """Fetch a blob and hash it; raises TransferCorrupt unless it has exactly this length and digest.

        Args:
            digest: SHA-256, hex.
            length: in bytes; more is not read.
            title: names the progress bar.
        """
        progress = screen.Bar(title or digest[:12])
        data = self._request("GET", f"/v1/blobs/{digest}", max_bytes=length, progress=progress)
        if len(data) != length or hashlib.sha256(data).hexdigest() != digest:
            raise TransferCorrupt(
                f"the hub sent {len(data)} bytes for blob {digest[:12]}… that are not those it names",
                hint="the hub's store may be damaged or tampered with: do not sign; ask who runs the hub",
            )
        return data

    def _json(
        self,
        method: str,
        path: str,
        answer: type[T],
        *,
        query: dict[str, str | int | None] | None = None,
        body: bytes | None = None,
    ) -> T:
        kept = {name: value for name, value in (query or {}).items() if value is not None}
        target = f"{path}?{urlencode(kept)}" if kept else path
        data = self._request(method, target, body=body)
        try:
            return msgspec.json.decode(data, type=answer)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise _strange(path, error) from error

    def _request(
        self,
        method: str,
        target: str,
        *,
        body: bytes | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        progress: Progress | None = None,
    ) -> bytes:
        headers = self._headers()
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = self._open()
        try:
            with _foreign_errors(self.url):
                connection.request(method, target, body=body, headers=headers)
                response = connection.getresponse()
                if response.status < 300:
                    data = _read(response, max_bytes, progress=progress)
                else:
                    data = _read(response, MAX_PROBLEM_BYTES)
        finally:
            connection.close()
        if response.status >= 300:
            raise _refusal(response.status, data)
        return data

    def _open(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}", "Accept": "application/json, application/problem+json"}


class _Page(msgspec.Struct, frozen=True, kw_only=True):
    items: list[Document]
    next: str | int | None = None


class _foreign_errors:
    """Translates what ssl, sockets and http.client raise."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, OutriderError):
            return
        if isinstance(error, ssl.SSLCertVerificationError):
            raise TrustError(
                f"{self._url} does not show a certificate of the pinned CA: {error.verify_message}",
                code="trust.hub_certificate",
                hint="if the hub's CA was changed on purpose, log in again with its new fingerprint",
            ) from error
        if isinstance(error, TimeoutError):
            raise Unreachable(f"{self._url} did not answer in time", hint="is the hub overloaded?") from error
        if isinstance(error, OSError | http.client.HTTPException):
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(
                f"{self._url} cannot be reached: {reason}", hint="is `outrider-hub serve` running there?"
            ) from error


def _read(response: http.client.HTTPResponse, max_bytes: int, *, progress: Progress | None = None) -> bytes:
    data = bytearray()
    while chunk := response.read(min(_CHUNK_BYTES, max_bytes + 1 - len(data))):
        data += chunk
        if len(data) > max_bytes:
            raise ProtocolViolation(f"the hub's answer exceeds {max_bytes} bytes", code="protocol.too_large")
        if progress is not None:
            progress(len(data), max_bytes)
    return bytes(data)


def _refusal(status: int, data: bytes) -> HubRefused:
    try:
        problem = msgspec.json.decode(data, type=Problem)
    except (msgspec.MsgspecError, RecursionError):
        problem = Problem(title=http.client.responses.get(status, "refused"))  # not ours: a proxy's page, say
    message = problem.detail or problem.title or http.client.responses.get(status, "refused")
    hint = problem.hint
    if not hint and status == 401:
        hint = "log in again: outrider login URL --token-file FILE"
    return HubRefused(message, http_status=status, code=problem.code or f"hub.http_{status}", hint=hint)


def _strange(path: str, error: Exception) -> ProtocolViolation:
    return ProtocolViolation(
        f"the hub's answer to {path} does not parse: {error}",
        code="protocol.answer",
        hint="are `outrider` and the hub of the same version?",
    )
