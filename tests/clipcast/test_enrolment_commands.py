"""The commands by which boards become devices, against a Mosquitto with the configuration that we ship."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipcast.cli import app
from clipcast.exit_codes import NOT_ENROLLED, code_of
from edge_client.config import load
from protocol.bus import Connected
from protocol.mqtt import MqttBus
from tests.faults.lab import Lab, new_authority, secured_mosquitto

CLIENT = """\
federation = "lab"
data = "digits"
state = "{state}"
[broker]
url = "{url}"
ca_file = "../ca/ca.pem"
cert_file = "{state}/device.pem"
key_file = "{state}/device.key"
[enrolment]
cert_file = "../ca/enrol.pem"
key_file = "../ca/enrol.key"
token_file = "claim.token"
"""


def clipcast(*arguments: str | Path) -> tuple[str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout.strip(), done.stderr


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    authority = new_authority(tmp_path / "ca")
    monkeypatch.chdir(tmp_path)
    with secured_mosquitto(tmp_path / "broker", authority.folder) as running:
        clipcast("coordinator", "init", "--classes", "cat,dog", "--broker", running.url)
        with Path("coordinator.toml").open("a") as settings:
            settings.write('ca_file = "ca/ca.pem"\ncert_file = "ca/coordinator.pem"\nkey_file = "ca/coordinator.key"\n')
        yield running


@pytest.fixture
def admitting(lab: Lab, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "clipcast", "device", "admit", "--ca", "ca"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert "boards with a claim of lab are enrolled" in running.stderr.readline()
        yield running
        running.send_signal(signal.SIGTERM)
        running.stderr.read()
        assert running.wait(30) == 0


def board(folder: Path, lab: Lab, token: str) -> Path:
    folder.mkdir()
    (folder / "client.toml").write_text(CLIENT.format(url=lab.url, state=folder / "state"))
    (folder / "claim.token").write_text(token + "\n")
    return folder / "client.toml"


def is_let_in(path: Path, lab: Lab) -> str:
    config = load(path)
    bus = MqttBus.open(config.broker, f"lab:{config.id}")
    assert isinstance(bus.receive(10), Connected)
    bus.close()
    return config.id


def test_from_a_token_to_a_device_that_the_broker_lets_in(
    lab: Lab, tmp_path: Path, admitting: subprocess.Popen[str]
) -> None:
    token, told = clipcast("device", "add", "jetson-1", "--profile", "jetson-orin-nano-8gb")
    assert token.startswith("jetson-1.")
    assert "use this once" in told
    assert clipcast("device", "list")[0].startswith("jetson-1 - claim open until")
    path = board(tmp_path / "board", lab, token)
    assert clipcast("device", "add", "jetson-9", "--out", "nine.token")[0] == ""
    assert Path("nine.token").read_text().startswith("jetson-9.")
    assert Path("nine.token").stat().st_mode & 0o077 == 0
    clipcast("device", "revoke", "jetson-9")
    assert "this device is jetson-1. Next: clipcast client run" in clipcast("client", "enrol", path)[0]
    assert "jetson-1 already: nothing to do" in clipcast("client", "enrol", path)[0]
    assert is_let_in(path, lab) == "jetson-1"
    other = path.with_name("other.toml")
    other.write_text('id = "jetson-2"\n' + path.read_text())
    with pytest.raises(Exception, match="was enrolled as 'jetson-1', `id` says another"):
        load(other)
    key = clipcast("client", "key", path)[0]
    assert clipcast("device", "list")[0] == f"jetson-1 {key} active"
    shown = clipcast("device", "show", "jetson-1")[0].splitlines()
    assert shown == ["state: active", f"key: {key}", "profile: jetson-orin-nano-8gb", "claim: used", "last round: none yet"]

    thief = board(tmp_path / "thief", lab, token)
    with pytest.raises(Exception, match="another board has used the claim of jetson-1") as refused:
        clipcast("client", "enrol", thief)
    assert code_of(refused.value) == NOT_ENROLLED
    assert clipcast("device", "list")[0] == f"jetson-1 {key} active"
    clipcast("device", "revoke", "jetson-1")
    assert clipcast("device", "list")[0] == f"jetson-1 {key} revoked"


def test_nobody_answers_a_token_of_nobody_and_the_board_says_what_to_look_at(
    lab: Lab, tmp_path: Path, admitting: subprocess.Popen[str]
) -> None:
    clipcast("device", "add", "jetson-1")
    path = board(tmp_path / "board", lab, "jetson-1." + "A" * 43)
    with pytest.raises(Exception, match="no answer within 2 s") as unanswered:
        clipcast("client", "enrol", path, "--wait", "2")
    assert code_of(unanswered.value) == NOT_ENROLLED
    assert clipcast("device", "list")[0].startswith("jetson-1 - claim open until")


def test_an_identity_made_offline_is_let_in(lab: Lab, tmp_path: Path) -> None:
    path = board(tmp_path / "board", lab, "")
    with pytest.raises(Exception, match="`clipcast client enrol` gets it one"):
        load(path)
    clipcast("device", "add", "jetson-3", "--offline", tmp_path / "board" / "state", "--ca", "ca")
    assert is_let_in(path, lab) == "jetson-3"
    state = tmp_path / "board" / "state"
    assert all(file.stat().st_mode & 0o077 == 0 for file in (state / "device.key", state / "key.pem"))
    assert not (tmp_path / "ca" / "jetson-3.key").exists()
    assert clipcast("device", "list")[0] == f"jetson-3 {clipcast('client', 'key', path)[0]} active"
    with pytest.raises(Exception, match="name a new folder"):
        clipcast("device", "add", "jetson-3", "--offline", tmp_path / "board" / "state", "--ca", "ca")


def test_a_run_of_the_federation_enrols_boards_too(lab: Lab, tmp_path: Path) -> None:
    settings = Path("coordinator.toml").read_text()
    Path("coordinator.toml").write_text('authority = "ca"\n' + settings)
    token, _ = clipcast("device", "add", "jetson-1")
    path = board(tmp_path / "board", lab, token)
    command = [sys.executable, "-m", "clipcast", "coordinator", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as running:
        try:
            clipcast("client", "enrol", path)
            assert running.poll() is None
        finally:
            running.kill()
    assert json.loads((tmp_path / "board" / "state" / "enrolled").read_text()) == {"id": "jetson-1"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("enrol",), "is no device's name"),
        (("coordinator",), "is no device's name"),
        (("a/b",), "cannot be used in a topic"),
        (("jetson-1", "--profile", "jetson-nano-4gb"), "cannot be a device"),
        (("jetson-1", "--profile", "none"), "none"),
        (("jetson-1", "KEY"), "is not a key"),
        (("jetson-1", "--offline", "x"), "which authority"),
        (("jetson-1", "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "--offline", "x"), "leave out either"),
    ],
)
def test_what_cannot_be_added_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    clipcast("coordinator", "init", "--classes", "cat,dog")
    with pytest.raises(Exception, match=said):
        clipcast("device", "add", *arguments)
    assert clipcast("device", "list")[0] == ""
    assert not (tmp_path / "x").exists()
