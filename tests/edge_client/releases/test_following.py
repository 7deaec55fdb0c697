"""What keeps a device from hearing of releases keeps it from answering only where it has nothing to answer with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from edge_client.config import ClientConfig
from edge_client.inference.pictures import Pixels
from edge_client.inference.providers import Runtime
from edge_client.releases.following import following
from export.flavours import Flavour
from protocol.errors import KeyFileError
from protocol.release.follower_end import FOLDER
from protocol.settings import BrokerSettings
from tests.conftest import a_free_port, wait_until


@pytest.fixture
def config(tmp_path: Path) -> ClientConfig:
    """A device whose broker is away, and whose numbers cannot be written, as on a full disk."""
    (tmp_path / FOLDER / "sequence").mkdir(parents=True)
    url = f"mqtt://127.0.0.1:{a_free_port()}"
    return ClientConfig(
        id="one", federation="lab", data=str(tmp_path), state=tmp_path, broker=BrokerSettings(url=url, connect_timeout_s=0.5)
    )


def test_it_answers_and_goes_on_trying(
    config: ClientConfig,
    models: dict[Flavour, Path],
    photograph: Pixels,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_client.releases.following.AGAIN_S", 0.05)
    with (
        caplog.at_level(logging.WARNING),
        following(config, "generic-cpu", models["int8"], None, Runtime()) as answering,
    ):
        assert answering.classify(photograph).version == 0
        wait_until(lambda: "no releases for now" in caplog.text and "sequence" in caplog.text)
        (config.state / FOLDER / "sequence").rmdir()
        wait_until(lambda: "cannot reach the broker" in caplog.text)


def test_without_a_model_it_says_what_is_wrong(config: ClientConfig) -> None:
    with (
        pytest.raises(KeyFileError, match="sequence cannot be read"),
        following(config, "generic-cpu", None, None, Runtime()),
    ):
        pass
