"""New pictures of a folder, once each and only when whole; frames of a video; answers to a broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_client.errors import InferenceError
from edge_client.inference.answering import Answering
from edge_client.inference.model import Model
from edge_client.inference.pictures import Pixels
from edge_client.inference.watch.camera import Camera, is_camera
from edge_client.inference.watch.folder import Folder
from edge_client.inference.watch.watching import Seen, watch_camera
from export.flavours import Flavour
from protocol.bus import Connected, Delivery, Subscribe
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
from tests.conftest import wait_until
from tests.edge_client.inference.exported import CLASSES

Models = dict[Flavour, Path]


def names(found: list[Path]) -> list[str]:
    return [path.name for path in found]


def test_a_file_is_found_once_when_it_has_stopped_growing(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"x")
    folder = Folder(tmp_path)
    assert folder.ready() == []
    (tmp_path / "new.png").write_bytes(b"a")
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_bytes(b"a")
    (tmp_path / ".hidden.png").write_bytes(b"a")
    assert folder.ready() == []  # it may be growing
    (tmp_path / "new.png").write_bytes(b"ab")
    assert folder.ready() == []  # it was
    assert names(folder.ready()) == ["new.png"]
    assert folder.ready() == []
    (tmp_path / "old.png").write_bytes(b"xy")
    folder.ready()
    assert names(folder.ready()) == ["old.png"]  # written anew
    (tmp_path / "new.png").unlink()
    folder.ready()
    (tmp_path / "new.png").write_bytes(b"ab")
    folder.ready()
    assert names(folder.ready()) == ["new.png"]  # another one of that name


def test_what_is_there_already_is_found_if_asked_for(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    folder = Folder(tmp_path, existing=True)
    assert folder.ready() == []
    assert names(folder.ready()) == ["a.png", "b.png"]
    with pytest.raises(InferenceError, match="cannot be watched"):
        Folder(tmp_path / "none")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["write", "grow", "remove", "look"]), st.integers(0, 2)), max_size=30))
def test_whatever_happens_what_is_found_is_whole_and_found_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list
) -> None:
    place = tmp_path_factory.mktemp("w")
    folder, found = Folder(place), list[tuple[str, int]]()
    for stamp, (step, index) in enumerate(steps, start=1):
        file = place / f"{index}.png"
        if step == "look":
            found += [(path.name, path.stat().st_mtime_ns) for path in folder.ready()]
        elif step == "remove":
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(bytes(stamp) if step == "write" else bytes(stamp * 2))
            os.utime(file, ns=(stamp, stamp))
    for _ in range(2):
        found += [(path.name, path.stat().st_mtime_ns) for path in folder.ready()]
    assert len(found) == len(set(found))
    assert {(path.name, path.stat().st_mtime_ns) for path in place.iterdir()} <= set(found)


class Film:
    """What a camera gives, then that it was unplugged."""

    def __init__(self, frames: list[Pixels]) -> None:
        self._frames = iter(frames)

    def frame(self) -> Pixels:
        frame = next(self._frames, None)
        if frame is None:
            raise InferenceError("no more frames")
        return frame


def test_frames_are_answered_until_there_are_no_more(models: Models, photograph: Pixels) -> None:
    seen: list[Seen] = []
    film = Film([photograph, photograph[::-1]])
    with pytest.raises(InferenceError, match="no more frames"):
        watch_camera(film, "0", Answering(Model.open(models["int8"])), 1, seen.append, threading.Event(), 0.0)  # type: ignore[arg-type]
    assert [one.source for one in seen] == ["0", "0"]
    assert all(one.answer is not None and one.answer.labels[0] in CLASSES for one in seen)


def test_a_camera_is_told_from_a_folder() -> None:
    assert is_camera("0")
    assert is_camera("/dev/video1")
    assert is_camera("nvarguscamerasrc ! video/x-raw(memory:NVMM) ! nvvidconv ! appsink")
    assert not is_camera("/srv/incoming")
    assert not is_camera("video")


def test_opencv_gives_frames_with_red_first(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    for index in range(3):
        red = np.zeros((48, 64, 3), np.uint8)
        red[..., 0] = 200
        Image.fromarray(red).save(tmp_path / f"{index:03}.png")
    assert cv2.__version__
    camera = Camera(str(tmp_path / "%03d.png"))
    assert camera.frame()[0, 0].tolist() == [200, 0, 0]
    camera.frame()
    camera.frame()
    with pytest.raises(InferenceError, match="gives no more frames"):
        camera.frame()
    camera.close()
    with pytest.raises(InferenceError, match="cannot be opened as a camera"):
        Camera(str(tmp_path / "none.mp4"))


def test_the_command_answers_what_comes_and_ends_in_good_order(models: Models, photograph: Pixels, tmp_path: Path) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    command = [sys.executable, "-m", "clipcast", "watch", str(models["int8"]), str(folder), "--json", "--every", "0.05"]
    lines: list[dict[str, object]] = []
    with subprocess.Popen([*command, "--existing"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(map(json.loads, process.stdout)))  # type: ignore[arg-type]
        reader.start()
        Image.fromarray(photograph).save(folder / "a.jpg")
        wait_until(lambda: len(lines) == 1, 30)
        (folder / "b.jpg").write_bytes(b"no picture")
        wait_until(lambda: len(lines) == 2, 30)
        process.send_signal(signal.SIGTERM)
        reader.join()
        assert process.wait(30) == 0
    assert lines[0]["source"] == str(folder / "a.jpg")
    assert lines[0]["labels"][0] in CLASSES  # type: ignore[index]
    assert "cannot be read as a picture" in str(lines[1]["error"])


def test_answers_go_to_a_brokers_topic(models: Models, photograph: Pixels, tmp_path: Path, embedded: str) -> None:
    Image.fromarray(photograph).save(tmp_path / "a.jpg")
    heard: list[dict[str, object]] = []
    bus = MqttBus.open(BrokerSettings(url=embedded), "listener")
    try:
        wait_until(lambda: isinstance(bus.receive(0.1), Connected))
        bus.do(Subscribe("site/door"))
        command = [sys.executable, "-m", "clipcast", "watch", str(models["int8"]), str(tmp_path), "--existing"]
        process = subprocess.Popen([*command, "--mqtt", embedded, "--topic", "site/door", "--every", "0.05"])

        def told() -> bool:
            event = bus.receive(0.1)
            if isinstance(event, Delivery):
                heard.append(json.loads(event.payload))
            return bool(heard)

        wait_until(told, 30)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        bus.close()
    assert heard[0]["source"] == str(tmp_path / "a.jpg")


def test_once_answers_what_is_there_and_ends(models: Models, photograph: Pixels, tmp_path: Path) -> None:
    Image.fromarray(photograph).save(tmp_path / "a.jpg")
    command = [sys.executable, "-m", "clipcast", "watch", str(models["int8"]), str(tmp_path), "--once", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert [json.loads(line)["source"] for line in done.stdout.splitlines()] == [str(tmp_path / "a.jpg")]
    assert done.stderr == ""
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, len(done.stdout.splitlines())) == (9, 2)


def test_what_is_no_broker_is_told(models: Models, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "clipcast",
        "watch",
        str(models["int8"]),
        str(tmp_path),
        "--topic",
        "t",
        "--mqtt",
        "foo",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "write mqtt://HOST[:PORT]" in " ".join(done.stderr.replace("│", " ").split())
