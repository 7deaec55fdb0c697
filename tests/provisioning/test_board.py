"""A board without a board: from an empty Debian to a device that is enrolled, examined and answers a picture; and back.

The system is a folder with this machine's processor, or (`make test-device`) arm64 under emulation; ssh, sshd, broker,
package, wheels and onnxruntime are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes
from clipcast.exit_codes import PROVISION, UNFIT, WARNINGS
from coordinator.broker.authority import Authority
from coordinator.text_bank import make_bank
from export.artefact import export_artefact
from export.metadata import Source
from export.parity import Proof
from protocol.messages import Recipe
from protocol.trust.claims import Claim
from provisioning.provision import AS_CLIPCAST
from provisioning.site import STATE
from tests.conftest import a_free_port, wait_until
from tests.edge_client.inference.serving import Serving
from tests.faults.lab import Lab, secured_mosquitto
from tests.provisioning.system import System, mounted, require, sshd, unpack

HOST = "labserver"
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
PICTURE = Image.linear_gradient("L").convert("RGB")
CLASSES = ("zero", "one", "two")
Clipcast = Callable[..., str]


@pytest.fixture(scope="module")
def arch(pytestconfig: pytest.Config) -> str:
    return "arm64" if pytestconfig.getoption("--device") else "amd64"


@pytest.fixture
def not_emulated(arch: str) -> None:
    """For what is the same on any machine, and takes minutes under emulation."""
    if arch != "amd64":
        pytest.skip("the same on any machine: `make test` has it")


@pytest.fixture(scope="module")
def system(arch: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    require(arch)
    folder = (
        Path("/var/lib") / f"clipcast-test-{tmp_path_factory.mktemp('board').parent.name}"
    )  # sshd wants root's folders above
    folder.mkdir(mode=0o755)
    try:
        unpack(folder / "root", arch)
        (folder / "root" / "etc" / "hosts").write_text(f"127.0.0.1 localhost {HOST}\n")
        with mounted(folder / "root"), sshd(folder, folder / "root") as config:
            yield System(folder / "root", config)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("lab")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def lab(home: Path) -> Iterator[Lab]:
    authority = Authority.create(home / "ca", "lab")
    authority.issue("broker", [HOST, "127.0.0.1"])
    for name in ("coordinator", "enrol"):
        authority.issue(name)
    with secured_mosquitto(home / "broker", home / "ca") as running:
        clipcast("coordinator", "init", "--classes", ",".join(CLASSES), "--broker", running.url)
        with Path("coordinator.toml").open("a") as settings:
            settings.write('ca_file = "ca/ca.pem"\ncert_file = "ca/coordinator.pem"\nkey_file = "ca/coordinator.key"\n')
        yield running


@pytest.fixture(scope="module")
def package(arch: str, home: Path) -> Path:
    wanted = ("--platform", "linux", "--python", "3.11", "--machine", MACHINES[arch], "--for", "infer")
    clipcast("device", "wheelhouse", "wheels", *wanted)
    clipcast("device", "package", "--out", "dist", "--wheelhouse", "wheels", "--for", "infer")
    (made,) = (home / "dist").glob("clipcast-client_*_all.deb")
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-clip with an adapter that changes nothing, as an ONNX file."""
    recipe, out = Recipe(rank=2), tmp_path_factory.mktemp("export") / "model.onnx"
    adapter = initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", recipe), 0)
    bank = make_bank("tiny-clip", CLASSES, ("a photo of a {}",))
    export_artefact(Source(bank, adapter, recipe, "lab", 1), Proof([PICTURE]), 4, out)
    return out


def clipcast(*arguments: str | Path, code: int = 0) -> str:
    """Run the command as its user does; return all that it prints."""
    command = [sys.executable, "-m", "clipcast", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def provision(system: System, lab: Lab, package: Path) -> Clipcast:
    ours = ("--package", package, "--ca", "ca", "--id", "jetson-1", "--broker", lab.url.replace("127.0.0.1", HOST))
    over = ("--ssh=-F", f"--ssh={system.config}")

    def run(*options: str, code: int = 0) -> str:
        return clipcast("device", "provision", "board", *ours, *over, *options, code=code)

    return run


def test_a_bare_board_becomes_a_device_that_answers(system: System, provision: Clipcast, arch: str, model: Path) -> None:
    told = provision("--check", code=WARNINGS)
    assert "would: the package is not there" in told
    assert "would: it is nobody yet" in told
    assert clipcast("device", "list") == ""
    assert not (system.root / "etc" / "clipcast").exists()

    told = provision()
    assert "it is nobody yet: let it ask for the certificate of jetson-1" in told
    assert json.loads((system.root / "var/lib/clipcast/enrolled").read_text()) == {"id": "jetson-1"}
    assert not (system.root / "etc/clipcast/claim.token").exists()
    assert clipcast("device", "list").endswith(" active\n")

    shutil.copy(model, system.root / "var/lib/clipcast/model.onnx")
    PICTURE.save(system.root / "var/lib/clipcast/picture.png")
    answered = system.run("clipcast infer /var/lib/clipcast/model.onnx /var/lib/clipcast/picture.png --top 1")
    assert answered.returncode == 0, answered.stderr
    assert "picture.png" in answered.stdout
    found = system.run("/opt/clipcast/venv/bin/python -c 'import platform, onnxruntime; print(platform.machine())'")
    assert found.stdout.strip() == MACHINES[arch]


def is_ready(service: Serving) -> bool:
    with contextlib.suppress(OSError):  # not listening yet, or 503
        return bool(service.get("/readyz"))
    return False


def test_it_answers_with_what_the_coordinator_releases(system: System, provision: Clipcast, home: Path, model: Path) -> None:
    """What the package's unit runs, as its user: from no model at all to a release that the board has committed to."""
    PICTURE.save(home / "smoke.png")
    health = ("--health-window-s", "1", "--health-min-answers", "1")
    clipcast("release", "create", "--model", model, "--picture", "smoke.png", *health)
    port = a_free_port()
    (line,) = [
        line.removeprefix("ExecStart=").replace("$OPTIONS", f"--port {port}")
        for line in (system.root / "lib/systemd/system/clipcast-serve.service").read_text().splitlines()
        if line.startswith("ExecStart=")
    ]
    serve = ["chroot", str(system.root), "/bin/sh", "-c", f"cd {STATE} && exec {AS_CLIPCAST} {line}"]
    desk = [sys.executable, "-m", "clipcast", "release", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(serve, text=True) as board, subprocess.Popen(desk, env=environment) as running:
        try:
            service = Serving(f"http://127.0.0.1:{port}", board)
            wait_until(lambda: is_ready(service), 300, "a model to be released to the board")
            code, said = service.form((home / "smoke.png").read_bytes())
            assert (code, said["answers"][0]["labels"][0]) in [(200, name) for name in CLASSES]
            wait_until(lambda: "devices: 1 committed" in clipcast("release", "status"), 120, "the board to commit")
        finally:
            for process in (board, running):
                process.terminate()
        assert (board.wait(60), running.wait(60)) == (0, 0)


def test_a_second_run_changes_nothing_and_says_so(system: System, provision: Clipcast) -> None:
    def state() -> dict[str, int]:
        folders = (system.root / "etc/clipcast", system.root / "opt/clipcast", system.root / "usr/lib/clipcast")
        return {
            str(path): path.lstat().st_mtime_ns
            for folder in folders
            for path in folder.rglob("*")
            if ".pyc" not in path.name
        }

    before = state()
    assert "board is jetson-1, and as it should be: nothing to do" in provision("--check")
    assert "nothing to do" in provision()
    assert {path: at for path, at in state().items() if before.get(path) != at} == {}


@pytest.mark.usefixtures("not_emulated")
def test_what_was_changed_there_is_put_right_and_nothing_else(system: System, provision: Clipcast) -> None:
    settings = system.root / "etc/clipcast/client.toml"
    wanted = settings.read_text()
    settings.write_text(wanted + "bits = 8\n")
    told = provision()
    assert [line for line in told.splitlines() if line.startswith("to do")] == [
        "to do: /etc/clipcast/client.toml differs: write it",
        "to do: start its service",
    ]
    assert settings.read_text() == wanted


@pytest.mark.usefixtures("not_emulated")
def test_a_board_that_was_cut_off_before_its_stamp_asks_again_and_stays_the_same(
    system: System, provision: Clipcast, home: Path
) -> None:
    """As the claim lies there while it asks: keys and certificate are made, the stamp is not."""
    state, before = system.root / "var/lib/clipcast", clipcast("device", "list")
    (state / "enrolled").unlink()
    assert "jetson-1 is another board" in provision("--check", code=PROVISION)
    token = Claim.make("jetson-1")
    with sqlite3.connect(home / "state/journal.db") as journal:  # the claim that was used, by a secret that we know
        journal.execute("UPDATE enrolments SET proof = ?", (token.proof,))
    journal.close()
    (system.root / "etc/clipcast/claim.token").write_text(f"{token}\n")
    assert "let it ask for the certificate of jetson-1" in provision()
    assert json.loads((state / "enrolled").read_text()) == {"id": "jetson-1"}
    assert clipcast("device", "list") == before


@pytest.mark.usefixtures("not_emulated")
def test_the_board_does_not_become_another_one(system: System, provision: Clipcast) -> None:
    assert "this board is jetson-1 already, not jetson-2" in provision("--id", "jetson-2", code=PROVISION)


@pytest.mark.usefixtures("not_emulated")
def test_a_doctor_that_finds_the_broker_away_says_so_in_its_code(system: System, provision: Clipcast, lab: Lab) -> None:
    settings = system.root / "etc/clipcast/client.toml"
    wanted = settings.read_text()
    settings.write_text(wanted.replace(HOST, "nowhere.invalid"))
    found = system.run("cd /var/lib/clipcast && clipcast doctor /etc/clipcast/client.toml --answers-only --json")
    settings.write_text(wanted)
    assert found.returncode == UNFIT
    failed = [finding for finding in json.loads(found.stdout) if finding["state"] == "fail"]
    assert [finding["name"] for finding in failed] == ["connection"]
    assert "nowhere.invalid" in failed[0]["measured"]


def test_nothing_is_left_after_an_uninstall(system: System, provision: Clipcast) -> None:
    assert "clipcast device revoke" in provision("--uninstall")
    for path in ("etc/clipcast", "var/lib/clipcast", "opt/clipcast", "usr/lib/clipcast", "usr/bin/clipcast"):
        assert not (system.root / path).exists(), path
    assert system.run("dpkg-query -W clipcast-client").returncode != 0
    assert "jetson-1 is another board, unless this one was set up anew" in provision("--check", code=PROVISION)
