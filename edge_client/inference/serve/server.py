"""Runs the service on a socket until it is told to stop; requests under way are finished."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from edge_client.errors import InferenceError

GRACE_S = 30
KEEP_ALIVE_S = 5
CONNECTIONS = 256


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Raises InferenceError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise InferenceError(f"cannot listen on {host}:{port}: {error}. Name another with --host and --port") from error


def address(listening: socket.socket) -> str:
    """Return where it listens, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Starlette, listening: socket.socket, started: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT. `started` is called before the first request."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=CONNECTIONS,
    )
    # uvicorn raises the signal again when all is finished: then what is around this is to end in good order, too.
    signal.signal(signal.SIGTERM, lambda *_: None)
    started()
    uvicorn.Server(config).run(sockets=[listening])
