"""The command as a user types it: real processes, exit codes, and sentences that say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import distribution, requires
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes
from clipcast import __version__
from clipcast.exit_codes import CODES
from coordinator.text_bank import make_bank
from export.artefact import export_artefact
from export.metadata import Source
from export.parity import Proof
from protocol.messages import Recipe

ROOT = Path(__file__).parents[2]


def clipcast(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipcast", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model and a picture beside it."""
    folder = tmp_path_factory.mktemp("model")
    recipe = Recipe(rank=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    picture.save(folder / "picture.png")
    bank = make_bank("tiny-clip", ("cat", "dog"), ("a photo of a {}",))
    adapter = initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", recipe), 0)
    export_artefact(Source(bank, adapter, recipe, "lab", 0), Proof([picture]), 32, folder / "model.onnx")
    return folder / "model.onnx"


def test_the_version_needs_no_command(tmp_path: Path) -> None:
    assert clipcast("--version", cwd=tmp_path).stdout == f"clipcast {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        *(
            "coordinator init",
            "coordinator run",
            "coordinator rounds",
            "client init",
            "client run",
            "client key",
            "coordinator key",
            "client enrol",
            "device list",
            "device add",
            "device show",
            "device admit",
            "device package",
            "device wheelhouse",
            "device provision",
            "device revoke",
            "device overlay",
            "device flash-plan",
            "ca init",
            "ca issue",
            "ca revoke",
            "broker config",
            "broker check",
            "export",
            "infer",
            "demo",
            "doctor",
            "plan",
        ),
        *("profiles list", "profiles show", "profiles detect"),
    ],
)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    assert f"clipcast {command}" in clipcast(*command.split(), "--help", cwd=tmp_path).stdout.split("Example")[1]


def test_init_writes_settings_that_load_and_keeps_what_is_there(tmp_path: Path) -> None:
    from coordinator.config import load as load_coordinator
    from edge_client.config import load as load_client

    clipcast("coordinator", "init", "--classes", "cat,dog", "--federation", "zoo", cwd=tmp_path)
    clipcast("client", "init", "--id", "jetson-1", "--federation", "zoo", "--data", "pictures", cwd=tmp_path)
    assert load_coordinator(tmp_path / "coordinator.toml").classes == ("cat", "dog")
    client = load_client(tmp_path / "client.toml")
    assert (client.id, client.data) == ("jetson-1", str(tmp_path / "pictures"))
    (tmp_path / "client.toml").write_text("mine")
    assert "exists already" in clipcast("client", "init", cwd=tmp_path, code=2).stderr
    assert (tmp_path / "client.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("files", "arguments", "code", "words"),
    [
        ({}, ["coordinator", "run", "none.toml"], 3, ["none.toml: no such file", "clipcast coordinator init"]),
        (
            {"c.toml": "id = 'a'\nfedration = 'b'\ndata = 'digits'"},
            ["client", "run", "c.toml"],
            3,
            ["'fedration'", "'federation'"],
        ),
        ({"c.toml": "id = 'a b'\nfederation = 'f'\ndata = 'digits'"}, ["client", "run", "c.toml"], 3, ["id"]),
        (
            {"c.toml": "id='a'\nfederation='f'\ndata='digits'\n[broker]\nurl='mqtt://127.0.0.1:9'\nconnect_timeout_s=1"},
            ["client", "run", "c.toml"],
            4,
            ["cannot reach the broker at mqtt://127.0.0.1:9", "refused"],
        ),
        ({}, ["client", "init", "--id", "bad id"], 3, ["id"]),
        ({}, ["profiles", "show", "toaster"], 10, ["no profile 'toaster'", "generic-cpu"]),
        ({}, ["demo", "--partition", "dirichlet:x"], 3, ["dirichlet:ALPHA"]),
        ({}, ["demo", "--data", "nowhere", "--out", "out"], 6, ["nowhere: no such folder"]),
        ({}, ["demo", "--bits", "5"], 3, ["choose 4 or 8"]),
        ({}, ["infer", "none.onnx", "none.png"], 9, ["none.onnx: no such file", "clipcast export"]),
        (
            {"c.toml": "federation='f'\nclasses=['a','b']"},
            ["export", "c.toml", "--data", "digits"],
            7,
            ["no finished round"],
        ),
    ],
)
def test_failures_name_the_cure_and_have_their_code(
    files: dict[str, str], arguments: list[str], code: int, words: list[str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = clipcast(*arguments, cwd=tmp_path, code=code)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_privacy_without_its_package_names_the_extra(tmp_path: Path) -> None:
    recipe = (
        "fedlora+first_block=-1+local_steps=1+privacy.clip=1+privacy.noise_multiplier=1+privacy.delta=1e-5+privacy.epsilon=9"
    )
    options = ["--recipes", recipe, "--clients", "2", "--shots", "4", "--seeds", "1", "--rounds", "1", "--partition", "iid"]
    program = (
        "import sys; sys.modules['dp_accounting'] = None; from clipcast.cli import main; "
        f"sys.argv = ['clipcast', 'simulate', *{options!r}, '--out', {str(tmp_path)!r}]; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 11
    assert "needs dp_accounting, which is not installed: pip install 'clipcast[privacy]'" in run.stderr


def test_every_exit_code_belongs_to_a_class_that_exists_and_is_documented() -> None:
    import importlib

    operations = (ROOT / "docs" / "operations.md").read_text()
    for path, code in CODES.items():
        module, _, name = path.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), name), Exception)
        assert f"| {code} |" in operations


def test_profiles_speak_json(tmp_path: Path) -> None:
    listed = json.loads(clipcast("profiles", "list", "--json", cwd=tmp_path).stdout)
    assert "jetson-orin-nano-8gb" in listed["profiles"]
    assert "jetpack-6.2" in listed["platforms"]
    shown = json.loads(clipcast("profiles", "show", "jetson-orin-nano-8gb", "--json", cwd=tmp_path).stdout)
    assert shown["facts"]["bandwidth"]["verified"] is False
    shown = json.loads(clipcast("profiles", "show", "jetpack-6.2", "--json", cwd=tmp_path).stdout)
    assert shown["facts"]["python"]["value"] == "3.10"
    detected = json.loads(clipcast("profiles", "detect", "--json", cwd=tmp_path).stdout)
    assert detected.keys() == {"profile", "platform", "reason", "certain", "l4t", "power_mode"}


def test_profiles_mark_what_nobody_measured_and_say_where_wheels_come_from(tmp_path: Path) -> None:
    board = clipcast("profiles", "show", "jetson-orin-nano-8gb", cwd=tmp_path).stdout
    assert "68 GB/s (not verified)" in board
    assert "jetson-orin-nano-devkit-super" in board
    platform = clipcast("profiles", "show", "jetpack-6.2", cwd=tmp_path).stdout
    assert "installs and does not run: pip install bitsandbytes" in platform
    assert "runs: pip install --no-deps --index-url https://" in platform
    assert "not supported" in clipcast("profiles", "list", cwd=tmp_path).stdout


def test_infer_prints_label_probability_and_milliseconds(model: Path, tmp_path: Path) -> None:
    picture = str(model.with_name("picture.png"))
    done = clipcast("infer", str(model), picture, "--json", "--top", "2", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert set(answer["labels"]) == {"cat", "dog"}
    assert answer["milliseconds"] > 0
    assert " ms)" in clipcast("infer", str(model), picture, cwd=tmp_path).stdout


def test_infer_leaves_torch_unloaded(model: Path, tmp_path: Path) -> None:
    picture = str(model.with_name("picture.png"))
    code = (
        f"import sys; from clipcast.cli import app; app(['infer', {str(model)!r}, {picture!r}], standalone_mode=False); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'peft', 'paho'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def closure(extra: str) -> set[str]:
    """The installed distributions that `clipcast[extra]` needs, by the packages' own metadata."""
    wanted, todo = set(), [("clipcast", extra)]
    while todo:
        name, wanted_extra = todo.pop()
        for line in requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted_extra}):
                key = canonicalize_name(requirement.name)  # one name, whether written with _ or with -
                if key not in wanted:
                    wanted.add(key)
                    todo.append((key, ""))
    return wanted


def test_infer_runs_in_an_environment_with_the_infer_extra_alone(model: Path, tmp_path: Path) -> None:
    """A fresh environment that holds exactly what `pip install clipcast[infer]` names, taken from this one."""
    names = closure("infer")
    assert "onnxruntime" in names
    assert not names & {"torch", "transformers", "peft", "bitsandbytes"}
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    for name in names:
        installed = distribution(name)
        for file in installed.files or []:
            source = Path(str(installed.locate_file(file)))
            if ".." not in file.parts and source.is_file():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(source)
    with tarfile.open(tmp_path / "ours.tar", "w") as archive:
        for package in ("protocol", "clip_lora", "coordinator", "edge_client", "export", "hardware_profiles", "clipcast"):
            archive.add(ROOT / package, package)
    with tarfile.open(tmp_path / "ours.tar") as archive:
        archive.extractall(site, filter="data")
    python = str(tmp_path / "env" / "bin" / "python")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )

    assert "No module named 'torch'" in run("-c", "import torch").stderr
    done = run("-m", "clipcast", "infer", str(model), str(model.with_name("picture.png")), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["labels"][0] in {"cat", "dog"}
    missing = run("-m", "clipcast", "demo")
    assert missing.returncode == 11
    assert "pip install 'clipcast[" in missing.stderr


def test_a_client_leaves_in_good_order_on_sigterm(embedded: str, tmp_path: Path) -> None:
    clipcast("client", "init", "--id", "one", "--broker", embedded, cwd=tmp_path)
    command = [sys.executable, "-m", "clipcast", "client", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        states = Watch(embedded, "lab")
        try:
            states.wait_for("online")
            process.send_signal(signal.SIGTERM)
            states.wait_for("offline")
            assert process.wait(30) == 0
        finally:
            states.close()
            process.kill()


class Watch:
    """Sees clients' statuses."""

    def __init__(self, url: str, federation: str) -> None:
        from protocol.link import Link
        from protocol.mqtt import MqttBus
        from protocol.observer import Observer
        from protocol.settings import BrokerSettings

        self._bus = MqttBus.open(BrokerSettings(url=url), "watch")
        self._link = Link(self._bus, Observer(federation))

    def wait_for(self, state: str) -> None:
        import time

        deadline = time.monotonic() + 60
        while not any(seen.status.state == state for seen in self._link.poll(1.0)):
            assert time.monotonic() < deadline, f"no client became {state}"

    def close(self) -> None:
        self._bus.close()


def test_a_simulation_writes_what_it_says_and_keeps_its_clients_quiet(tmp_path: Path) -> None:
    small = ("--clients", "2", "--rounds", "1", "--shots", "10", "--seeds", "1", "--test-pictures", "20")
    done = clipcast("simulate", "--recipes", "fedlora+local_steps=1,zero-shot", *small, "--out", "runs", cwd=tmp_path)
    rows = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [row["recipe"] for row in rows] == ["fedlora+local_steps=1", "zero-shot"]
    for name in ("results.json", "results.md", "rounds.png", "clients.png"):
        assert f"wrote runs/{name}" in done.stderr
        assert (tmp_path / "runs" / name).stat().st_size > 0
    assert "uploading" not in done.stdout + done.stderr


def test_an_authority_and_a_broker_are_made_in_five_commands(tmp_path: Path) -> None:
    clipcast("ca", "init", "ca", cwd=tmp_path)
    clipcast("ca", "issue", "broker", "ca", "--host", "labserver", "--host", "127.0.0.1", cwd=tmp_path)
    clipcast("ca", "issue", "coordinator", "ca", cwd=tmp_path)
    clipcast("ca", "issue", "jetson-1", "ca", cwd=tmp_path)
    clipcast("broker", "config", "broker", "--federation", "lab", "--ca", "ca", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "broker").iterdir()} == {"mosquitto.conf", "acl"}
    assert str(tmp_path / "ca") in (tmp_path / "broker" / "mosquitto.conf").read_text()
    clipcast("broker", "config", "broker", "--federation", "lab", "--ca", "ca", cwd=tmp_path)  # the same again
    assert (
        "exists and says something else"
        in clipcast("broker", "config", "broker", "--port", "1", cwd=tmp_path, code=3).stderr
    )
    assert "holds an authority already" in clipcast("ca", "init", "ca", cwd=tmp_path, code=3).stderr
    assert "cannot be used in a topic" in clipcast("ca", "issue", "a/b", "ca", cwd=tmp_path, code=3).stderr
    missing = clipcast("broker", "config", "other", "--ca", "elsewhere", cwd=tmp_path).stderr
    assert "clipcast ca issue broker elsewhere --host HOST" in missing
    assert "clipcast device revoke jetson-1" in clipcast("ca", "revoke", "jetson-1", "ca", cwd=tmp_path).stdout
    clipcast("ca", "issue", "jetson-1", "ca", cwd=tmp_path)
    clipcast("broker", "config", "emqx", "--for", "emqx", "--ca", "ca", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "emqx").iterdir()} == {"emqx.conf", "acl.conf"}
    (tmp_path / "ca" / "crl.pem").unlink()
    assert "crl.pem is missing" in clipcast("broker", "config", "broker", "--ca", "ca", cwd=tmp_path).stderr


def test_keys_are_made_once_and_devices_are_let_in_and_cut_off(tmp_path: Path) -> None:
    clipcast("coordinator", "init", "--classes", "cat,dog", cwd=tmp_path)
    clipcast("client", "init", "--id", "ann", cwd=tmp_path)
    key = clipcast("client", "key", cwd=tmp_path).stdout.strip()
    assert clipcast("client", "key", cwd=tmp_path).stdout.strip() == key
    assert clipcast("coordinator", "key", cwd=tmp_path).stdout.strip() not in ("", key)
    assert clipcast("device", "list", cwd=tmp_path).stdout == ""
    clipcast("device", "add", "ann", key, cwd=tmp_path)
    assert clipcast("device", "list", cwd=tmp_path).stdout == f"ann {key} active\n"
    clipcast("device", "revoke", "ann", cwd=tmp_path)
    assert clipcast("device", "list", cwd=tmp_path).stdout == f"ann {key} revoked\n"
    assert "no device 'bob' is known" in clipcast("device", "revoke", "bob", cwd=tmp_path, code=3).stderr
    assert "is not a key" in clipcast("device", "add", "bob", "key", cwd=tmp_path, code=3).stderr
