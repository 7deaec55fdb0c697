"""The real service over real HTTP: answers, refusals, figures, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edge_client.inference.pictures import Pixels
from edge_client.inference.serve.server import CONNECTIONS
from export.flavours import Flavour
from tests.conftest import wait_until
from tests.edge_client.inference.exported import CLASSES
from tests.edge_client.inference.serving import Serving, answer_many, encoded, serving, text
from tests.edge_client.inference.test_pictures import bomb

Models = dict[Flavour, Path]


@pytest.fixture(scope="module")
def service(models: Models) -> Iterator[Serving]:
    with serving(models["int8"]) as started:
        yield started


def raw(service: Serving) -> socket.socket:
    parts = urlsplit(service.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def test_a_form_and_json_are_answered_alike(service: Serving, photograph: Pixels) -> None:
    data = encoded(photograph)
    status, by_form = service.form(data, data, top=3)
    assert status == 200
    status, by_json = service.json({"pictures": [text(data)], "top": 3})
    assert status == 200
    assert len(by_form["answers"]) == 2
    (answer,) = by_json["answers"]
    assert answer["labels"] == by_form["answers"][0]["labels"] == by_form["answers"][1]["labels"]
    assert len(answer["labels"]) == 3
    assert set(answer["labels"]) < set(CLASSES)
    assert answer["version"] == 0
    assert by_json["model"] == {"model": "tiny-clip", "flavour": "int8", "federation": "lab", "round": 3}


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ([], 422, "malformed"),
        ("x", 422, "malformed"),
        ({}, 422, "malformed"),
        ({"pictures": "x"}, 422, "malformed"),
        ({"pictures": []}, 422, "no-picture"),
        ({"pictures": ["not base64!"]}, 422, "malformed"),
        ({"pictures": [7]}, 422, "malformed"),
        ({"pictures": [""]}, 422, "not-a-picture"),
        ({"pictures": [text(b"GIF89a")]}, 422, "not-a-picture"),
        ({"pictures": [text(bomb(12000, 9000))]}, 413, "too-many-pixels"),
        ({"pictures": [text(bomb(60000, 60000))]}, 413, "too-many-pixels"),
        ({"pictures": [text(b"x")] * 1000}, 413, "too-many-pictures"),
        ({"pictures": [text(b"x")], "top": 0}, 422, "malformed"),
        ({"pictures": [text(b"x")], "top": True}, 422, "malformed"),
        ({"pictures": [text(b"x")], "else": 1}, 422, "malformed"),
    ],
)
def test_json_that_is_refused_says_why(service: Serving, said: object, status: int, reason: str) -> None:
    code, told = service.json(said)
    assert (code, told["error"]["reason"]) == (status, reason)
    assert told["error"]["detail"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (b"{", "application/json", 400, "malformed"),
        (b"[" * 1_000, "application/json", 400, "malformed"),
        (b"[" * 200_000, "application/json", 413, "too-large"),
        (b"\xff\xfe", "application/json", 400, "malformed"),
        (b"", "application/json", 400, "malformed"),
        (b"x", "text/plain", 415, "content-type"),
        (b"x", "multipart/form-data", 400, "malformed"),
        (b"x", "multipart/form-data; boundary=b", 400, "malformed"),
        (b"--b\r\n\r\n", "multipart/form-data; boundary=b", 400, "malformed"),
        (bytes(17_000_000), "application/json", 413, "too-large"),
    ],
)
def test_bodies_that_are_refused_say_why(service: Serving, body: bytes, kind: str, status: int, reason: str) -> None:
    code, told = service.post(body, kind)
    assert (code, told["error"]["reason"]) == (status, reason)


def test_a_text_of_millions_of_values_costs_neither_memory_nor_time(service: Serving) -> None:
    before = service.memory("VmHWM")
    for body in (b'{"pictures":["' + b'","' * 5_000_000 + b'"]}', b'{"pictures":[],"x":[' + b"[]," * 5_000_000 + b"[]]}"):
        code, told = service.post(body, "application/json")
        assert (code, told["error"]["reason"]) == (413, "too-large")
    assert service.memory("VmHWM") - before < 150  # MB: each body has 15


@pytest.mark.parametrize("charset", ["undefined", "utf-7", "unicode_escape", "no-such"])
def test_a_form_in_a_strange_charset_is_answered_or_refused_and_counted(service: Serving, charset: str) -> None:
    body = b'--b\r\ncontent-disposition: form-data; name="picture"; filename="\\ud800+2AA-"\r\n\r\nx\r\n--b--\r\n'
    code, told = service.post(body, f"multipart/form-data; charset={charset}; boundary=b")
    assert (code, told["error"]["reason"]) in [(400, "malformed"), (422, "not-a-picture")]


def test_who_connects_and_asks_nothing_keeps_nobody_out_for_long(models: Models, photograph: Pixels, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys\nfrom edge_client.inference.serve import server\nserver.HEAD_S = 1.0\n"
        "sys.argv = sys.argv[2:]\nfrom clipcast.cli import app\napp()\n"
    )
    python.chmod(0o755)
    with serving(models["int8"], python=str(python)) as service, ExitStack() as open_ones:
        for head in (b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nG"):
            for _ in range(CONNECTIONS):
                open_ones.enter_context(raw(service)).sendall(head)
            wait_until(lambda: healthy(service), what="the silent ones to be hung up on")
        data = encoded(photograph)
        assert service.form(*[data] * 16)[0] == 200  # whose answer takes longer than that


def healthy(service: Serving) -> bool:
    with suppress(OSError):
        return service.get("/healthz") == "ok\n"
    return False


def test_a_form_with_too_many_files_or_a_foreign_top_is_refused(service: Serving) -> None:
    assert service.form(*[b"x"] * 17)[1]["error"]["reason"] == "too-many-pictures"
    assert service.form(*[b"x"] * 30)[0] in (400, 413)
    assert service.form(b"x", top="many")[1]["error"]["detail"].startswith("top is 'many'")
    assert service.form()[1]["error"]["reason"] == "no-picture"


def test_a_body_without_a_length_is_cut_off_at_the_limit(service: Serving) -> None:
    with raw(service) as link:
        link.sendall(
            b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        piece = b"100000\r\n" + bytes(0x100000) + b"\r\n"
        sent = 0
        try:
            while sent < 64:
                link.sendall(piece)
                sent += 1
            link.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # it has hung up, which is as good
        assert b"413" in link.recv(200) or sent < 64


def test_who_hangs_up_in_the_middle_costs_nothing(service: Serving, photograph: Pixels) -> None:
    for _ in range(50):
        with raw(service) as link:
            link.sendall(
                b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
            )
    assert service.form(encoded(photograph))[0] == 200


def test_health_readiness_description_and_figures(service: Serving, photograph: Pixels) -> None:
    assert service.get("/healthz") == "ok\n"
    assert service.get("/readyz") == "ready: tiny-clip, release 0\n"
    described = json.loads(service.get("/openapi.json"))
    assert described["openapi"].startswith("3.1")
    assert set(described["paths"]) == {"/v1/classify", "/healthz", "/readyz", "/metrics"}
    before = figure(service, "clipcast_pictures_total")
    service.form(encoded(photograph))
    assert figure(service, "clipcast_pictures_total") == before + 1
    assert 5e7 < figure(service, "clipcast_resident_bytes") < 1e9
    assert 'clipcast_model{flavour="int8",model="tiny-clip",round="3"} 1.0' in service.get("/metrics")


def figure(service: Serving, name: str) -> float:
    return next(float(line.split()[1]) for line in service.get("/metrics").splitlines() if line.startswith(f"{name} "))


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/v1/classify/..%2f..%2fetc", "/none"])
def test_nothing_else_is_given_out(service: Serving, path: str) -> None:
    with raw(service) as link:
        link.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert link.recv(100).startswith(b"HTTP/1.1 404")


def test_requests_beyond_those_that_may_wait_are_told_to_come_again(models: Models, photograph: Pixels) -> None:
    with serving(models["fp32"]) as busy:
        data = encoded(photograph)
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(busy.form(*[data] * 16)[0])

        threads = [threading.Thread(target=ask) for _ in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 503}
        assert busy.form(data)[0] == 200


def test_it_finishes_what_is_under_way_before_it_ends(models: Models, photograph: Pixels) -> None:
    with serving(models["int8"]) as ending:
        results: list[int] = []
        data = encoded(photograph)
        threads = [threading.Thread(target=lambda: results.append(ending.form(*[data] * 16)[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: figure(ending, "clipcast_pictures_total") >= 1)
        ending.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert results == [200] * 4
        assert ending.process.wait(timeout=30) == 0


def test_serving_tiny_clip_in_int8_takes_at_most_120_mb(models: Models) -> None:
    with serving(models["int8"]) as service:
        answer_many(service)
        assert service.memory("VmRSS") <= 120
