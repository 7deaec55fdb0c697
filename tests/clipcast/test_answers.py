"""`clipcast infer` and `clipcast bench` as their users run them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from export.artefact import export_artefacts
from export.flavours import Flavour
from export.metadata import Source
from export.parity import Proof
from tests.edge_client.inference.serving import serving
from tests.export.making import RECIPE, bank_of, photographs, trained_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and pictures/, two of one size and one of another."""
    folder = tmp_path_factory.mktemp("home")
    source = Source(bank_of("tiny-clip", ("cat", "dog", "ship")), trained_adapter("tiny-clip"), RECIPE, "lab", 3)
    wanted: tuple[Flavour, ...] = ("int8", "adapter")
    list(export_artefacts(source, Proof(photographs()), 32, {name: folder / f"{name}.onnx" for name in wanted}))
    (folder / "pictures" / "more").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "more/c.png")):
        photographs()[0 if index < 2 else 3].save(folder / "pictures" / name)
    return folder


def clipcast(*arguments: str, cwd: Path, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipcast", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False, input=stdin)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_files_folders_and_names_on_stdin_are_answered_in_order(home: Path) -> None:
    lines = clipcast("infer", "int8.onnx", "pictures/b.png", "pictures", cwd=home).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"pictures/{name}" for name in ("b.png", "a.png", "b.png", "more/c.png")
    ]
    piped = clipcast("infer", "int8.onnx", "-", cwd=home, stdin="pictures/a.png\n\npictures/more\n").stdout.splitlines()
    assert [line.split(":")[0] for line in piped] == ["pictures/a.png", "pictures/more/c.png"]
    assert clipcast("infer", "int8.onnx", "-", cwd=home).stdout == ""
    assert clipcast("infer", "int8.onnx", "-", cwd=home, stdin="pictures/a.png\r\n").stdout.startswith("pictures/a.png: ")


def test_what_is_no_list_of_names_is_told(home: Path) -> None:
    told = clipcast("infer", "int8.onnx", "-", cwd=home, stdin="pictures/a.png\0pictures/b.png\0", code=9).stderr
    assert "is no name of a file: names are given one a line" in told
    told = clipcast("infer", "int8.onnx", "-", cwd=home, stdin="\x89PNG\x1a\n\0\0IHDR\n", code=9).stderr
    assert "bug" not in told


def test_json_csv_and_a_table_say_the_same(home: Path) -> None:
    said = [
        json.loads(line)
        for line in clipcast("infer", "int8.onnx", "pictures", "--json", "--top", "2", cwd=home).stdout.splitlines()
    ]
    rows = list(
        csv.DictReader(clipcast("infer", "int8.onnx", "pictures", "--csv", "--top", "2", cwd=home).stdout.splitlines())
    )
    assert [row["label"] for row in rows] == [label for one in said for label in one["labels"]]
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    table = clipcast("infer", "int8.onnx", "pictures", "--top", "2", cwd=home).stdout.splitlines()
    assert table[1].split()[0] == said[0]["labels"][0]
    assert len(table) == 9


def test_batches_answer_as_single_pictures_do(home: Path) -> None:
    def labels(*options: str) -> list[str]:
        lines = clipcast("infer", "int8.onnx", "pictures", "--json", *options, cwd=home).stdout.splitlines()
        return [json.loads(line)["labels"][0] for line in lines]

    assert labels("--batch", "8") == labels()


def test_an_adapter_is_taken_from_a_file(home: Path) -> None:
    with_it = clipcast("infer", "adapter.onnx", "pictures/a.png", "--adapter", "adapter.onnx_adapter", "--json", cwd=home)
    without = clipcast("infer", "adapter.onnx", "pictures/a.png", "--json", cwd=home)
    assert json.loads(with_it.stdout)["probabilities"] != json.loads(without.stdout)["probabilities"]
    told = clipcast("infer", "int8.onnx", "pictures/a.png", "--adapter", "adapter.onnx_adapter", cwd=home, code=9).stderr
    assert "error: a file of flavour int8 takes no adapter" in told
    told = clipcast("infer", "adapter.onnx", "pictures/a.png", "--adapter", "none", cwd=home, code=9).stderr
    assert told == "error: none: no such adapter\n"


def test_what_cannot_be_read_is_told_and_the_rest_is_answered(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "pictures", tmp_path / "pictures")
    for name, data in (("aa", b"\x89PNG"), ("ab", b""), ("ac", b"no picture")):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(data)
    done = clipcast("infer", str(home / "int8.onnx"), "pictures", "none.png", cwd=tmp_path, code=9)
    assert len(done.stdout.splitlines()) == 3
    assert "error: pictures/aa.png cannot be read as a picture" in done.stderr
    assert "error: pictures/ab.png cannot be read as a picture: it is empty" in done.stderr
    assert "error: pictures/ac.png cannot be read as a picture: it is none of JPEG, PNG," in done.stderr
    assert "error: none.png: no such picture" in done.stderr
    assert "error: 4 of 7 pictures could not be answered" in done.stderr


def test_speed_is_measured_with_memory_beside_it(home: Path) -> None:
    lines = clipcast("bench", "int8.onnx", "--batch", "1,4", "--seconds", "0.2", "--json", cwd=home).stdout.splitlines()
    one, four = map(json.loads, lines)
    assert (one["batch"], four["batch"]) == (1, 4)
    assert one["answers"] >= 10
    assert 0 < one["p50_ms"] <= one["p99_ms"]
    assert one["peak_mb"] > 20
    assert one["flavour"] == "int8"
    said = clipcast("bench", "int8.onnx", "--batch", "1", "--seconds", "0.2", "--picture", "pictures/a.png", cwd=home).stdout
    assert said.splitlines()[0] == "int8.onnx: int8, CPUExecutionProvider, 240 x 33 pixels"
    said = clipcast(
        "bench", "adapter.onnx", "--adapter", "adapter.onnx_adapter", "--batch", "1", "--seconds", "0.2", cwd=home
    ).stdout
    assert said.startswith("adapter.onnx: adapter, ")
    told = clipcast("bench", "int8.onnx", "--batch", "0", cwd=home, code=2).stderr
    assert "whole numbers from 1 to 1024" in " ".join(told.replace("│", " ").split())


@pytest.mark.slow
def test_an_environment_with_only_the_extra_infer_answers_without_torch(home: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, f"{ROOT}[infer]"], check=True, timeout=400, cwd=tmp_path)
    find = (
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'peft', 'cv2') if u.find_spec(n)])"
    )
    assert subprocess.run([python, "-c", find], capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "[]\n"
    command = [python, "-m", "clipcast", "infer", str(home / "int8.onnx"), str(home / "pictures"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60)
    here = clipcast("infer", "int8.onnx", "pictures", "--json", cwd=home).stdout
    assert [json.loads(line)["labels"] for line in done.stdout.splitlines()] == [
        json.loads(line)["labels"] for line in here.splitlines()
    ]
    with serving(home / "int8.onnx", python=python) as service:
        assert service.form((home / "pictures" / "a.png").read_bytes())[0] == 200
    watch = [python, "-m", "clipcast", "watch", str(home / "int8.onnx"), "0"]
    told = subprocess.run(watch, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert told.returncode == 11
    assert "pip install 'clipcast[camera]'" in told.stderr
