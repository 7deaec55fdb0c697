"""`clipcast release` as an operator types it: real processes, a real export, a real Mosquitto, a device that follows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes
from coordinator.text_bank import make_bank
from export.artefact import export_artefact
from export.metadata import Source
from export.parity import Proof
from protocol.link import Link
from protocol.messages import Recipe
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
from tests.clipcast.test_cli import clipcast
from tests.conftest import wait_until
from tests.follower import Follower, Outcome, badly, well

CLASSES = ("a flower", "a temple")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artefact and a picture."""
    folder, recipe = tmp_path_factory.mktemp("files"), Recipe(rank=1)
    Image.fromarray(load_sample_images().images[1]).save(folder / "flower.png")
    adapter = initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", recipe), 0)
    source = Source(make_bank("tiny-clip", CLASSES, ("a photo of {}",)), adapter, recipe, "lab", 0)
    export_artefact(source, Proof([Image.open(folder / "flower.png")]), 32, folder / "model.onnx")
    return folder


class Office:
    """A coordinator's folder, and its `clipcast release`."""

    def __init__(self, folder: Path, url: str, files: Path) -> None:
        self.folder, self.url = folder, url
        self.create = ("create", "--model", str(files / "model.onnx"), "--picture", str(files / "flower.png"))
        (folder / "coordinator.toml").write_text(
            f"federation = 'lab'\nclasses = {json.dumps(CLASSES)}\n[broker]\nurl = '{url}'\nconnect_timeout_s = 2\n"
        )

    def release(self, *arguments: str, code: int = 0) -> str:
        done = clipcast("release", *arguments, cwd=self.folder, code=code)
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    def status(self) -> dict:
        found = json.loads(self.release("status", "--json"))
        assert isinstance(found, dict)
        return found

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        program = [sys.executable, "-m", "clipcast", *command, "coordinator.toml"]
        process = subprocess.Popen(program, cwd=self.folder, stderr=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def device(self, name: str, outcome: Outcome) -> Iterator[Callable[[Callable[[Follower], bool], str], None]]:
        follower = Follower("lab", name, outcome)
        link: Link[object] = Link(MqttBus.open(BrokerSettings(url=self.url), f"lab:{name}:answers"), follower)

        def until(condition: Callable[[Follower], bool], what: str) -> None:
            wait_until(lambda: (link.poll(0.0), condition(follower))[1], 60, what)

        try:
            yield until
        finally:
            link.bus.close()


@pytest.fixture
def office(tmp_path: Path, files: Path, mosquitto: Callable[..., str]) -> Office:
    return Office(tmp_path, mosquitto(), files)


@pytest.mark.parametrize("command", ["create", "status", "pause", "resume", "abort", "rollback", "run"])
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    assert f"clipcast release {command}" in clipcast("release", command, "--help", cwd=tmp_path).stdout.split("Example")[1]


def test_a_release_from_its_making_to_its_end_and_back(office: Office) -> None:
    assert "no release yet" in office.release("status")
    assert office.release("status", "--json") == "null\n"
    said = office.release(*office.create, "--rings", "1,100%", "--note", "the first [one]")
    assert "release 1 is announced: ring 1 of 2, 1 device. The picture is 'a flower'" in said
    assert "release 1 is under way" in office.release(*office.create, code=7)
    assert "no desk is at work: nothing goes out before" in office.release("status")
    with office.running("release", "run") as process, office.device("jetson-1", well) as until:
        until(lambda follower: follower.report.phase == "committed", "the device to commit")
        wait_until(lambda: office.status()["state"] == "complete", 60, "the release to be complete")
        until(lambda follower: follower.release is not None and follower.release.percent == 100, "the last ring")
        assert "another desk is at work" in office.release("run", code=7)
        assert "no desk is at work" not in office.release("status")
        office.release(*office.create, "--rings", "100%", "--version", "5")
        until(lambda follower: follower.report.running == 5, "the second release")
        wait_until(lambda: office.status()["state"] == "complete", 60, "the second to be complete")
        assert "all devices go back to release 1" in office.release("rollback")
        until(lambda follower: follower.report.running == 1, "the device to go back")
        wait_until(lambda: office.status()["committed"] == ["jetson-1"], 60, "the desk to hear it")
        assert office.status()["state"] == "complete"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    found = office.status()
    assert (found["version"], found["rollback"], found["named"], found["rings"]) == (1, True, [], [])
    shown = office.release("status", "--devices")
    assert "release: 1, back from a later one" in shown
    assert "ring: all devices at once" in shown
    assert "devices: 1 committed" in shown
    assert "note: the first [one]" in shown
    assert "jetson-1" in shown
    office.release(*office.create, "--profiles", "jetson-agx-orin-64gb")
    assert "devices: none: it is for jetson-agx-orin-64gb, those known are" in office.release("status")


def test_one_that_stopped_by_itself_says_who_and_why_and_goes_on_when_told(office: Office) -> None:
    with office.running("release", "run"), office.device("jetson-1", badly) as until:
        office.release(*office.create)
        until(lambda follower: follower.report.phase == "rolled-back", "the device to go back")
        wait_until(lambda: office.status()["state"] == "paused", 60, "the release to stop")
        shown = office.release("status")
        assert "state: paused (ring-failed)" in shown
        assert "slow" in shown
        assert "jetson-1" in shown
        assert "goes on: ring 1 of 3, 1 device. No more counted: jetson-1" in office.release("resume")
        assert "release 1 is paused" in office.release("pause")
        assert "release 1 is aborted" in office.release("abort")
    assert office.status()["excused"] == ["jetson-1"]
    for order in ("pause", "resume", "abort"):
        assert "release 1 is aborted: there is nothing to" in office.release(order, code=7)
    assert "no complete release before this one" in office.release("rollback", code=7)


def test_a_coordinators_run_sends_releases_out_too(office: Office) -> None:
    with office.running("coordinator", "run"), office.device("jetson-1", well) as until:
        office.release(*office.create, "--rings", "100%")
        until(lambda follower: follower.report.phase == "committed", "the device to commit")
        wait_until(lambda: office.status()["state"] == "complete", 60, "the release to be complete")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--rings", "10%"), 3, "--rings 10%: the last ring has to be 100%"),
        (("--profiles", "toaster"), 10, "no profile 'toaster'"),
        (("--health-window-s", "0"), 3, "window_s"),
        (("--ring-timeout-s", "0"), 3, "above 0"),
        (("--classes-from", "newest"), 7, "no finished round"),
        (("--picture", "none.png"), 9, "none.png: no such picture"),
        (("--adapter", "none.onnx_adapter"), 3, "none.onnx_adapter cannot be read"),
        (("--model", "coordinator.toml"), 9, "coordinator.toml: onnxruntime cannot load it"),
        (("--note", "x" * 501), 3, "note: "),
    ],
)
def test_what_cannot_be_released_has_its_code_and_leaves_nothing(
    tmp_path: Path, files: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    office = Office(tmp_path, "mqtt://127.0.0.1:9", files)
    assert words in office.release(*office.create, *arguments, code=code)
    assert office.release("status", "--json") == "null\n"
    assert not list(tmp_path.glob("state/releases/blobs/[0-9a-f]*"))


def test_without_a_broker_run_says_so(tmp_path: Path, files: Path) -> None:
    office = Office(tmp_path, "mqtt://127.0.0.1:9", files)
    assert "cannot reach the broker at mqtt://127.0.0.1:9" in office.release("run", code=4)


def test_devices_that_know_newer_versions_than_a_restored_journal_are_told_of(office: Office) -> None:
    with office.running("release", "run"), office.device("jetson-1", well) as until:
        office.release(*office.create, "--rings", "100%", "--version", "7")
        until(lambda follower: follower.report.running == 7, "the device to commit")
        wait_until(lambda: office.status()["state"] == "complete", 60, "the release to be complete")
    for path in (office.folder / "state").glob("journal.db*"):
        path.unlink()  # as if restored from before the first release
    with office.running("release", "run"), office.device("jetson-2", well):
        office.release(*office.create)
        wait_until(lambda: office.status()["ahead"] == {"jetson-1": 7}, 60, "the desk to hear what the broker has kept")
    done = clipcast("release", "status", cwd=office.folder)
    assert "jetson-1 speak of release 7, which this journal does not know" in done.stderr
    assert "clipcast release create --version 8" in done.stderr
