"""An embedded MQTT broker (iotcore, which is rumqttd in a wheel) with limits that fit clipcast's messages."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

# Its own default refuses payloads above 20 KB; a chunk has 64 KiB.
CONFIG = """\
id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 1000
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "clipcast"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 200
dynamic_filters = true
"""


@contextlib.contextmanager
def embedded_broker(folder: Path, port: int | None = None) -> Iterator[str]:
    """Run a broker on `port`, else on a free one of this machine; yield its URL. Its configuration is in `folder`."""
    from iotcore import Broker

    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    config = folder / "broker.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG.format(port=port))
    with Broker(config_path=str(config)):
        yield f"mqtt://127.0.0.1:{port}"
