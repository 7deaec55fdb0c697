"""The service's description in OpenAPI 3.1: what `/openapi.json` says and `/docs` shows."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from edge_client.inference.serve.limits import Limits

ERROR = {"$ref": "#/components/schemas/Error"}


def describe(limits: Limits) -> dict[str, Any]:
    """Return the description."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "clipcast", "version": metadata.version("clipcast"), "description": "What is on a picture?"},
        "paths": {
            "/v1/classify": {"post": _classify(limits)},
            "/healthz": {"get": _text("The process lives.")},
            "/readyz": {"get": {**_text("A model is loaded and answers."), "responses": _responses(_ok("Ready."), 503)}},
            "/metrics": {"get": _text("Figures for Prometheus.")},
        },
        "components": {"schemas": {"Answers": _answers(), "Error": _error()}},
    }


def _classify(limits: Limits) -> dict[str, Any]:
    picture = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}
    top = {"type": "integer", "minimum": 1, "default": 1, "description": "How many classes to name."}
    form = {"picture": {"type": "array", "items": {"type": "string", "format": "binary"}}, "top": top}
    body = {"pictures": {"type": "array", "items": picture, "minItems": 1, "maxItems": limits.pictures}, "top": top}
    return {
        "summary": "Say what is on pictures.",
        "description": (
            f"At most {limits.pictures} pictures in {limits.body_bytes} bytes, each of at most {limits.pixels} pixels: "
            "JPEG, PNG, WebP, BMP, GIF, TIFF or PPM."
        ),
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": {"type": "object", "required": ["picture"], "properties": form}},
                "application/json": {"schema": {"type": "object", "required": ["pictures"], "properties": body}},
            },
        },
        "responses": _responses(
            {
                "description": "An answer to each picture, in their order.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answers"}}},
            },
            *(400, 408, 413, 415, 422, 503),
        ),
    }


def _answers() -> dict[str, Any]:
    answer = {
        "type": "object",
        "required": ["labels", "probabilities", "milliseconds", "version"],
        "properties": {
            "labels": {"type": "array", "items": {"type": "string"}, "description": "The best classes, best first."},
            "probabilities": {"type": "array", "items": {"type": "number"}},
            "milliseconds": {"type": "number", "description": "From decoded picture to answer."},
            "version": {"type": "integer", "description": "The release that answered, 0 if none."},
        },
    }
    facts = {"model": "string", "flavour": "string", "federation": "string", "round": "integer"}
    model = {"type": "object", "properties": {name: {"type": kind} for name, kind in facts.items()}}
    return {"type": "object", "properties": {"answers": {"type": "array", "items": answer}, "model": model}}


def _error() -> dict[str, Any]:
    inside = {"reason": {"type": "string", "description": "One word."}, "detail": {"type": "string"}}
    return {"type": "object", "properties": {"error": {"type": "object", "properties": inside}}}


def _text(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _ok(summary)}}


def _ok(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}


def _responses(good: dict[str, Any], *refusals: int) -> dict[str, Any]:
    refused = {"description": "Refused: `reason` says why.", "content": {"application/json": {"schema": ERROR}}}
    return {"200": good, **{str(status): refused for status in refusals}}
