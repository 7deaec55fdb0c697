"""What a request may ask for, and its body read within that: whoever sends one may mean harm."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

FIELD = "picture"
PASSED_OVER = 4
MOST_PARTS = 2000
"""Of a JSON text: what any request has, many times over. Parsing millions of small values takes seconds and gigabytes."""


@dataclass(frozen=True)
class Limits:
    """Bytes of a body, pixels of a picture, pictures of a request, requests that wait, and seconds for a body to arrive.

    All requests' bodies together have at most `held_bytes`: many senders must not fill a device's memory.
    """

    body_bytes: int = 16 * 1024 * 1024
    held_bytes: int = 64 * 1024 * 1024
    pixels: int = 50_000_000
    pictures: int = 16
    waiting: int = 32
    body_seconds: float = 30.0


class RefusedError(Exception):
    """A request that is not answered: HTTP status, a word for programs, a sentence for people."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.reason, self.detail = status, reason, detail


@dataclass
class Held:
    """How many bytes of bodies are in memory, of all requests."""

    most: int
    now: int = 0

    def take(self, size: int) -> None:
        """Count bytes that have come; raises RefusedError if there is no room for them."""
        if self.now + size > self.most:
            raise RefusedError(503, "busy", "too much is being sent at the same time: try again")
        self.now += size

    def give_back(self, size: int) -> None:
        """Count bytes that are gone."""
        self.now -= size


@dataclass(frozen=True)
class Asked:
    """Encoded pictures with the names that errors give them, and how many classes are wanted of each."""

    pictures: tuple[tuple[str, bytes], ...]
    top: int


async def read_request(request: Request, body: bytes, limits: Limits) -> Asked:
    """Return what a request asks for; raises RefusedError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        raise RefusedError(415, "content-type", "send multipart/form-data with a field `picture`, or application/json")
    if kind == "multipart/form-data":
        asked = await _form(request, body, limits)
    else:  # megabytes of base64 take a while, and others wait
        asked = await asyncio.get_running_loop().run_in_executor(None, _json, body)
    if not asked.pictures:
        raise RefusedError(422, "no-picture", "no picture was sent: a form needs a file field `picture`, JSON `pictures`")
    if len(asked.pictures) > limits.pictures:
        raise RefusedError(
            413, "too-many-pictures", f"{len(asked.pictures)} pictures in a request, at most {limits.pictures} are taken"
        )
    return asked


@asynccontextmanager
async def body_of(request: Request, limits: Limits, held: Held) -> AsyncIterator[bytes]:
    """Read a request's body, which counts as held meanwhile; raises RefusedError."""
    parts: list[bytes] = []
    try:
        await asyncio.wait_for(_read(request, parts, limits, held), limits.body_seconds)
        yield b"".join(parts)
    except asyncio.TimeoutError as error:
        raise RefusedError(408, "too-slow", f"the body did not arrive within {limits.body_seconds:g} s") from error
    except ClientDisconnect as error:
        raise RefusedError(400, "gone", "the connection was closed before the body was whole") from error
    finally:
        held.give_back(sum(map(len, parts)))


async def _read(request: Request, parts: list[bytes], limits: Limits, held: Held) -> None:
    """Fill `parts`.

    Of what is too large the rest is passed over, within reason: whoever is sending does not hear why until it has sent.
    """
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > PASSED_OVER * limits.body_bytes:
            break
        if size <= limits.body_bytes:
            held.take(len(part))
            parts.append(part)
    if size > limits.body_bytes:
        raise RefusedError(413, "too-large", f"the body is larger than {limits.body_bytes} bytes")


async def _form(request: Request, body: bytes, limits: Limits) -> Asked:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        # One more than is taken: what is too many is then told as such.
        most = {"max_files": limits.pictures + 1, "max_fields": 8, "max_part_size": 4096}
        async with Request(request.scope, receive).form(**most) as form:
            found = [part for name, part in form.multi_items() if name == FIELD and not isinstance(part, str)]
            pictures = tuple([(_printable(part.filename) or FIELD, await part.read()) for part in found])
            return Asked(pictures, _top(form.get("top", request.query_params.get("top", 1))))
    except (MultiPartException, HTTPException, UnicodeError, LookupError) as error:  # the last two: of a strange charset
        detail = getattr(error, "message", None) or getattr(error, "detail", "")
        raise RefusedError(400, "malformed", f"the form cannot be read: {detail}") from error


def _printable(name: str | None) -> str:
    """Return a name without what no answer could carry, as it comes of a strange charset."""
    return (name or "").encode("utf-8", "replace").decode()


def _json(body: bytes) -> Asked:
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MOST_PARTS:  # none of them is in base64
        raise RefusedError(413, "too-large", f"JSON of more than {MOST_PARTS} parts is not read: send fewer pictures")
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "malformed", f"the body is not JSON: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("pictures"), list) or said.keys() - {"pictures", "top"}:
        raise RefusedError(
            422, "malformed", "JSON has to be an object with `pictures`, a list of base64 texts, and perhaps `top`"
        )
    pictures = []
    for index, text in enumerate(said["pictures"]):
        try:
            pictures.append((f"pictures[{index}]", base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError, TypeError) as error:
            raise RefusedError(422, "malformed", f"pictures[{index}] is not base64: {error}") from error
    return Asked(tuple(pictures), _top(said.get("top", 1)))


def _top(said: Any) -> int:
    if isinstance(said, str) and said.isascii() and said.isdigit() and len(said) < 7:
        said = int(said)
    if isinstance(said, bool) or not isinstance(said, int) or not 1 <= said <= 1_000_000:
        raise RefusedError(422, "malformed", f"top is {str(said)[:50]!r}: a whole number from 1 on is needed")
    return said
