"""`clipcast demo` as a user runs it, small: real processes over a real broker, and a report that holds together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcast.demo.pictures import lay_out
from clipcast.demo.settings import DemoSettings
from edge_client.data import DIGIT_NAMES, find_pictures
from edge_client.errors import DataError


def paint(folder: Path, count: int) -> None:
    """Write `count` pictures of each of three colours, one sub-folder per colour."""
    rng = np.random.default_rng(count)
    for channel, label in enumerate(("red", "green", "blue")):
        for number in range(count):
            pixels = rng.integers(0, 80, (40, 50, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            file = folder / label / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def run_demo(out: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", "clipcast", "demo", "--out", str(out), "--clients", "2", "--rounds", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote" in done.stdout
    report: dict = json.loads((out / "report.json").read_text())
    return report


def check_report(report: dict, out: Path) -> None:
    assert set(report) >= {"zero_shot", "local_only", "federated", "rounds", "onnx", "settings"}
    assert len(report["local_only"]["clients"]) == 2
    assert report["local_only"]["mean"] == pytest.approx(np.mean(report["local_only"]["clients"]))
    only, aligning = report["rounds"]
    assert aligning["loss"] is None
    assert (only["accepted"], only["rejected"]) == (2, 0)
    assert only["bytes_up"] > 140_000
    assert only["bytes_down"] > 140_000
    assert only["accuracy"] == report["federated"]
    assert report["onnx"]["cosine"] >= 0.999
    assert report["onnx"]["ms_per_image"] > 0
    assert Path(report["onnx"]["path"]) == out / "model.onnx"
    for name in ("model.onnx", "rounds.png"):
        assert (out / name).stat().st_size > 1000


def test_a_folder_of_classes_over_the_embedded_broker(tmp_path: Path) -> None:
    paint(tmp_path / "photos", 20)
    out = tmp_path / "out"
    report = run_demo(out, "--data", str(tmp_path / "photos"))
    check_report(report, out)
    again = run_demo(out, "--data", str(tmp_path / "photos"))  # with new keys, over the folder of the first
    assert again["federated"] == report["federated"]
    assert report["settings"]["held_out_pictures"] == 12


def test_a_folder_with_train_and_test_at_8_bits_over_an_outside_broker(
    mosquitto: Callable[..., str], tmp_path: Path
) -> None:
    paint(tmp_path / "photos" / "train", 16)
    paint(tmp_path / "photos" / "test", 6)
    out = tmp_path / "out"
    report = run_demo(out, "--data", str(tmp_path / "photos"), "--partition", "iid", "--bits", "8", "--broker", mosquitto())
    check_report(report, out)
    assert report["settings"]["classes"] == ["blue", "green", "red"]
    assert report["settings"]["held_out_pictures"] == 18
    assert report["settings"]["bits"] == 8


def test_digits_are_laid_out_as_folders_none_lost_none_shared(tmp_path: Path) -> None:
    settings = DemoSettings.checked(3, 1, 4, "digits", "dirichlet:0.3", 0, tmp_path, None)
    layout = lay_out(settings)
    assert layout.classes == DIGIT_NAMES
    names = [file.name for home in (*layout.clients, layout.held_out) for file in home.rglob("*.png")]
    assert len(names) == len(set(names)) == len(find_pictures("digits"))
    assert layout.held_out_pictures == len(list(layout.held_out.rglob("*.png"))) == 359


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    settings = DemoSettings.checked(2, 1, 4, str(tmp_path / "photos"), "iid", 0, tmp_path / "out", None)
    with pytest.raises(DataError, match="holds no pictures"):
        lay_out(settings)


def test_a_folder_that_is_not_an_earlier_demos_is_left_alone(tmp_path: Path) -> None:
    paint(tmp_path / "pictures", 12)
    command = [sys.executable, "-m", "clipcast", "demo", "--data", str(tmp_path / "pictures"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 3
    assert "not an earlier demo's" in done.stderr
    assert len(list((tmp_path / "pictures").rglob("*.jpg"))) == 36


def test_equal_names_in_two_folders_are_two_pictures(tmp_path: Path) -> None:
    for part in ("a", "b"):
        paint(tmp_path / "raw", 20)
        for label in ("red", "green", "blue"):
            (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "raw" / label).rename(tmp_path / "photos" / label / part)
    settings = DemoSettings.checked(2, 1, 4, str(tmp_path / "photos"), "iid", 0, tmp_path / "out", None)
    layout = lay_out(settings)
    assert (
        len(list((tmp_path / "out" / "pictures").rglob("*.jpg"))) == 120 == layout.train_pictures + layout.held_out_pictures
    )
