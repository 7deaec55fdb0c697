"""The real `clipcast serve` as a process, and requests to it."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from edge_client.inference.pictures import Pixels


@dataclass(frozen=True)
class Serving:
    """A service at work."""

    url: str
    process: subprocess.Popen[str]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def post(self, body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of POST /v1/classify."""
        request = urllib.request.Request(self.url + "/v1/classify", body, {"content-type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def json(self, said: object) -> tuple[int, dict[str, Any]]:
        return self.post(json.dumps(said).encode(), "application/json")

    def form(self, *pictures: bytes, top: object = 1) -> tuple[int, dict[str, Any]]:
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\ncontent-disposition: form-data; name="picture"; filename="p{i}"\r\n\r\n'.encode()
            + data
            + b"\r\n"
            for i, data in enumerate(pictures)
        ]
        parts.append(
            f'--{boundary}\r\ncontent-disposition: form-data; name="top"\r\n\r\n{top}\r\n--{boundary}--\r\n'.encode()
        )
        return self.post(b"".join(parts), f"multipart/form-data; boundary={boundary}")

    def memory(self, what: str) -> float:
        """Return VmRSS or VmHWM in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024 / 1e6  # type: ignore[index]


@contextmanager
def serving(model: Path, *options: str, python: str = sys.executable) -> Iterator[Serving]:
    """Start `clipcast serve` on a free port; end it in good order."""
    command = [python, "-m", "clipcast", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("answering on http://"), said
        yield Serving(said.split()[-1], process)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def encoded(image: Pixels, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(out, kind)
    return out.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def answer_many(service: Serving) -> None:
    """Ask fifty times one after the other, then four at a time."""
    pictures = [encoded(np.tile(image, (2, 2, 1))[:480, :640]) for image in load_sample_images().images]
    for turn in range(50):
        assert service.form(pictures[turn % 2])[0] == 200
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda turn: service.form(pictures[turn % 2])[0], range(12))) == {200}
