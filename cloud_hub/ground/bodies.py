"""Bodies of REST: JSON that parses into structs, JSON that goes back, and files that come in pieces.

Rooms parse their own bodies, so that unknown fields and wrong types are refused by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from shared.errors import InvalidValue, TransferCorrupt

JSON_TYPE: Final = "application/json"
PIECE_DEADLINE_S: Final = 30.0
"""For each next piece of a file that comes."""

T = TypeVar("T")


async def read_json(request: Request, kind: type[T]) -> T:
    """The request's body as this type; raises InvalidValue that names the field."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidValue(str(error)[:300], code="invalid.request", hint="see /openapi.json for the shape") from error


def takes(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Options of a route that document a body which `read_json` reads; nested types are named and not spelled out."""
    fields = {field.encode_name: {"description": str(field.type)} for field in msgspec.structs.fields(kind)}
    required = [field.encode_name for field in msgspec.structs.fields(kind) if field.required]
    schema = {
        "type": "object",
        "title": kind.__name__,
        "description": kind.__doc__,
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }
    content = {"required": True, "content": {JSON_TYPE: {"schema": schema}}}
    return {"openapi_extra": {"requestBody": content}, "response_model": None}


def json_answer(document: object, *, status: int = 200) -> Response:
    """A JSON document as a response."""
    return Response(msgspec.json.encode(document), status_code=status, media_type=JSON_TYPE)


def announced_length(request: Request) -> int:
    """The length of an upload; raises InvalidValue when none is announced."""
    text = request.headers.get("content-length", "")
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise InvalidValue(
            "an upload needs a Content-Length", code="length_required", hint="send the file's size, not chunks"
        )
    return int(text)


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes; raises TransferCorrupt when the next piece does not come in time, or never will."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(PIECE_DEADLINE_S):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise TransferCorrupt(f"nothing arrived for {PIECE_DEADLINE_S:.0f} s", hint="send it again") from error
        except ClientDisconnect as error:
            raise TransferCorrupt("the connection ended before the file did", hint="send it again") from error
        yield piece
