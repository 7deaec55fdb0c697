"""All that can be wrong with a device, in the order in which one would mend it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from edge_client.doctor.answering import examine_answering
from edge_client.doctor.board import examine_board
from edge_client.doctor.training import examine_training, source
from edge_client.monitor.monitor import Monitor
from hardware_profiles.detect import Detection
from hardware_profiles.platform import Package
from protocol.broker.check import brief
from protocol.findings import Finding
from protocol.settings import Participant


def examine(
    found: Detection, client: Participant | None, folder: Path, root: Path = Path("/"), *, answers_only: bool = False
) -> Iterator[Finding]:
    """Yield what is found on this device; with a client's settings also of its broker. `folder` is its state's place.

    A client is expected to train, unless it `answers_only`.
    """
    is_client = client is not None and not answers_only
    yield from examine_board(found, Monitor().read(), folder, datetime.now(timezone.utc), root, is_client=is_client)
    trains = found.profile.tier == "train" and find_spec("torch") is not None
    yield from examine_training(found, is_client=is_client)
    providers = found.profile.onnx_providers
    package: Package = "onnxruntime-gpu" if providers[0] != "CPUExecutionProvider" else "onnxruntime"
    yield from examine_answering(providers, source(found, package), trains=trains)
    if client is not None:
        yield from brief(client.broker, client.federation, client.id)
