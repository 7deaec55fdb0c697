"""The HTTP service: takes pictures in, lets a few threads answer them, and says how it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib import resources

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_client.errors import InferenceError, NoModelError, PictureTooLargeError
from edge_client.inference.answering import Answer, Answering
from edge_client.inference.model import Model
from edge_client.inference.pictures import decode_picture
from edge_client.inference.serve.limits import Asked, Held, Limits, RefusedError, body_of, read_request
from edge_client.inference.serve.openapi import describe
from edge_client.inference.serve.telling import Figures

log = logging.getLogger(__name__)

BUSY_S = 1
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'"
)
# Pages of other origins must neither frame these nor guess types.
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "x-frame-options": "DENY"}


class Service:
    """Answers requests with what `answering` holds. At most `workers` pictures are in work at a time."""

    def __init__(self, answering: Answering, limits: Limits | None = None, workers: int = 1) -> None:
        self.answering = answering
        self.limits = limits or Limits()
        self.figures = Figures()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="answer")
        self._pending = 0
        self._held = Held(self.limits.held_bytes)
        self._workers = workers

    def app(self) -> Starlette:
        """Return the ASGI application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self._pool.shutdown()

        return Starlette(
            routes=[
                Route("/", lambda _: page("page.html")),
                Route("/docs", lambda _: page("docs.html")),
                Route("/openapi.json", lambda _: JSONResponse(describe(self.limits))),
                Route("/v1/classify", self.classify, methods=["POST"]),
                Route("/healthz", lambda _: PlainTextResponse("ok\n")),
                Route("/readyz", self.ready),
                Route("/metrics", self.metrics),
            ],
            lifespan=lifespan,
        )

    async def classify(self, request: Request) -> Response:
        """Answer pictures, or say in JSON why not."""
        try:
            async with body_of(request, self.limits, self._held) as body:
                answers = await self._answers(await read_request(request, body, self.limits))
        except RefusedError as error:
            return self._refused(error)
        model, _ = self.answering.current()
        response = JSONResponse({"answers": [asdict(answer) for answer in answers], "model": about(model)})
        self.figures.requests.labels("200").inc()
        return response

    async def _answers(self, asked: Asked) -> list[Answer]:
        if self._pending >= self._workers + self.limits.waiting:
            raise RefusedError(503, "busy", f"{self._pending} requests are being answered or wait: try again")
        self._pending += 1
        try:
            loop = asyncio.get_running_loop()
            return [await loop.run_in_executor(self._pool, self._answer, asked, i) for i in range(len(asked.pictures))]
        finally:
            self._pending -= 1

    def _answer(self, asked: Asked, index: int) -> Answer:
        name, data = asked.pictures[index]
        try:
            image = decode_picture(data, name, self.limits.pixels)
        except PictureTooLargeError as error:
            raise RefusedError(413, "too-many-pixels", str(error)) from error
        except InferenceError as error:
            raise RefusedError(422, "not-a-picture", str(error)) from error
        try:
            answer = self.answering.classify(image, asked.top)
        except NoModelError as error:
            raise RefusedError(503, "no-model", str(error)) from error
        except InferenceError as error:
            self.figures.failures.inc()
            log.error("no answer: %s", error)  # noqa: TRY400 - no bug of ours, no traceback
            raise RefusedError(500, "model", "the model could not answer this picture: see the service's log") from error
        self.figures.pictures.inc()
        self.figures.seconds.observe(answer.milliseconds / 1000)
        return answer

    async def ready(self, _: Request) -> Response:
        """Say whether a model is loaded."""
        model, version = self.answering.current()
        if model is None:
            return PlainTextResponse("no model yet\n", 503)
        return PlainTextResponse(f"ready: {model.facts.model}, release {version}\n")

    async def metrics(self, _: Request) -> Response:
        """Say the figures."""
        return PlainTextResponse(self.figures.text(*self.answering.current()), media_type="text/plain; version=0.0.4")

    def _refused(self, error: RefusedError) -> Response:
        self.figures.requests.labels(str(error.status)).inc()
        again = {"retry-after": str(BUSY_S)} if error.status == 503 else {}
        return JSONResponse({"error": {"reason": error.reason, "detail": error.detail}}, error.status, again)


def about(model: Model | None) -> dict[str, object]:
    """Return what an answer says of the model."""
    if model is None:
        return {}
    facts = model.facts
    return {"model": facts.model, "flavour": facts.flavour, "federation": facts.federation, "round": facts.round}


def page(name: str) -> Response:
    """Return one of the pages that ship with the package."""
    text = resources.files("edge_client.inference.serve").joinpath(name).read_text(encoding="utf-8")
    return HTMLResponse(text, headers=HEADERS)
