"""The install step for real, below another root: twice, cut off, and where something is missing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest

from provisioning.package.deb import Contents, build_package
from provisioning.package.sources import Use
from provisioning.package.wheels import own_wheel as built_wheel
from provisioning.package.wheels import read_wheel
from tests.provisioning.package.wheels import installed_wheels, own_wheel, pip_wheel, wheelhouse, write_index, write_wheel

PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(10, 15)))


def unpack(deb: Path, root: Path) -> Path:
    subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
    return root


def device(root: Path, version: str = "0.1.0", runtime: str = "1.20.0") -> Path:
    """Lay a package with a small wheelhouse into a root, as dpkg or an overlay would."""
    own, wheels = own_wheel(root.parent / "own", version), wheelhouse(root.parent / f"wheels-{runtime}", version=runtime)
    return unpack(build_package(root.parent, "infer", own, wheels), root)


def online(root: Path, use: Use) -> Path:
    """Lay a package without wheels into a root, but with pip's: whether python3-venv is there is not the question here."""
    unpack(build_package(root.parent, use, own_wheel(root.parent / "own")), root)
    (root / "usr/lib/clipcast/wheels" / pip_wheel().name).write_bytes(pip_wheel().read_bytes())
    return root


def environment(path: Path | None = None) -> dict[str, str]:
    """Return what a device's root has, nothing of this machine's pip. Programs in `path` stand before the system's."""
    programs = os.pathsep.join([*([str(path)] if path else []), str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return {**inherited, "PATH": programs, "PIP_CONFIG_FILE": os.devnull}


def install(root: Path, code: int = 0, path: Path | None = None, **more: str) -> str:
    """Run the install step and return what it says."""
    done = subprocess.run(
        [str(root / "usr/lib/clipcast/install")],
        env={**environment(path), **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def says(root: Path) -> str:
    command = [str(root / "opt/clipcast/venv/bin/clipcast"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    states = {str(path): path.lstat() for path in folder.rglob("*")}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in states.items() if not path.endswith("__pycache__")}


def test_it_installs_once_and_another_build_of_the_same_version_takes_its_place(tmp_path: Path) -> None:
    root = device(tmp_path / "root")
    told = os.umask(0o077)  # root's own may be strict: the client is another user
    try:
        assert "done: clipcast 0.1.0 is in" in install(root)
    finally:
        os.umask(told)
    assert says(root) == "clipcast 0.1.0"
    assert (root / "opt/clipcast/venv").readlink() == Path("venv-0.1.0")
    assert (root / "opt/clipcast/venv/bin/clipcast").stat().st_mode & 0o005 == 0o005
    before = seen(root / "opt/clipcast")
    assert "nothing to do" in install(root)
    assert seen(root / "opt/clipcast") == before

    device(root, runtime="1.21.0")
    (root / "usr/lib/clipcast/wheels/onnxruntime-1.20.0-py3-none-any.whl").unlink()  # as dpkg does
    install(root)
    assert list((root / "opt/clipcast/venv/lib").glob("python3*/site-packages/onnxruntime-1.21.0.dist-info"))


def test_whatever_cuts_it_off_the_old_one_works_on_and_the_next_run_ends_it(tmp_path: Path) -> None:
    root = device(tmp_path / "root")
    install(root)
    device(root, "0.2.0")
    wheel = root / "usr/lib/clipcast/wheels/pillow-10.3-py3-none-any.whl"
    wheel.rename(tmp_path / wheel.name)
    assert "the wheels of this package are not enough" in install(root, code=1)
    assert says(root) == "clipcast 0.1.0"
    (tmp_path / wheel.name).rename(wheel)

    dead = "kill -9 $PPID"
    cuts = {"python3": f'{sys.executable} "$@"; case "$*" in *venv*) {dead};; esac', "sync": dead, "ln": dead, "mv": dead}
    for name, text in cuts.items():
        install(root, code=-signal.SIGKILL, path=program(tmp_path / f"cut-{name}", name, text))
        assert says(root) == "clipcast 0.1.0", name
    assert "which is whole" in install(root)
    assert says(root) == "clipcast 0.2.0"


def test_two_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """As where dpkg has started the service, and a person runs it too."""
    root = device(tmp_path / "root")
    (root / "opt/clipcast/lock").touch()
    with (root / "opt/clipcast/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [str(root / "usr/lib/clipcast/install")]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert running.stdout is not None
        assert "waiting for it" in running.stdout.readline()
    rest = running.communicate(timeout=60)[0]
    assert running.returncode == 0, rest
    assert says(root) == "clipcast 0.1.0"


def test_no_python_and_no_room_are_told_with_their_cure(tmp_path: Path) -> None:
    root = device(tmp_path / "root")
    for name in PYTHONS:
        program(tmp_path / "old", name, "exit 1")
    assert "no Python 3.10 or newer" in install(root, code=1, path=tmp_path / "old")
    program(tmp_path / "full", "df", 'printf "Filesystem 1M-blocks Used Available\\n/dev/x 9 8 1\\n"')
    said = install(root, code=1, path=tmp_path / "full")
    assert "has 1 MiB free" in said
    assert "Free some" in said
    assert not list((root / "opt/clipcast").glob("venv*"))


def jetpack(root: Path, release: str, revision: str) -> None:
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/nv_tegra_release").write_text(f"# R{release} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n")


def test_a_jetpack_that_nothing_runs_on_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    root = online(tmp_path / "root", "train")
    jetpack(root, "35", "6.4")
    said = install(root, code=1)
    assert "cannot be used to train on jetpack-5.1" in said
    assert "An Orin takes JetPack 6.2 or 7.2" in said
    jetpack(root, "36", "2.0")
    said = install(root, code=1)
    assert "L4T 36.2.0 is no release that this package knows" in said
    assert "jetpack-6.2: from 36.4 to below 37" in said


def test_on_a_jetson_its_own_index_wins_over_a_newer_version_elsewhere(tmp_path: Path) -> None:
    root = online(tmp_path / "root", "train")
    jetpack(root, "36", "4.3")
    made = tmp_path / "made"
    own = {"torch": "2.9.0", "bitsandbytes": "0.48", "onnxruntime-gpu": "1.23.0"}
    index = write_index(tmp_path / "jetson", *(write_wheel(made, name, version) for name, version in own.items()))
    newer = {"torch": "2.15.0", "bitsandbytes": "0.50", "onnxruntime-gpu": "1.31.0", "onnxruntime": "1.32", "pillow": "11.0"}
    public = write_index(tmp_path / "public", *(write_wheel(made, name, version) for name, version in newer.items()))
    told = root / "usr/lib/clipcast/sources"
    text = told.read_text()
    assert "https://pypi.jetson-ai-lab.io/jp6/cu126 torch bitsandbytes onnxruntime-gpu" in text
    told.write_text(text.replace("https://pypi.jetson-ai-lab.io/jp6/cu126", index))
    install(root, PIP_INDEX_URL=public)
    there = {path.name for path in (root / "opt/clipcast/venv/lib").glob("python3*/site-packages/*.dist-info")}
    expected = {"torch-2.9.0", "bitsandbytes-0.48", "onnxruntime_gpu-1.23.0", "pillow-11.0", "clipcast-0.1.0"}
    assert there == {f"{name}.dist-info" for name in expected}  # and no onnxruntime beside onnxruntime-gpu


def test_without_a_network_it_says_so(tmp_path: Path) -> None:
    root = online(tmp_path / "root", "infer")
    said = install(root, code=1, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert "no way to the package index" in said
    assert not (root / "opt/clipcast/venv").is_symlink()


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed, which builds the wheel")
def test_the_real_wheel_with_real_wheels_answers_without_torch_and_without_a_network(tmp_path: Path) -> None:
    own = built_wheel(None, tmp_path)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    installed_wheels(wheels, *(line for line in requires("clipcast") or () if "extra" not in line), *own.extras["infer"])
    (wheels / pip_wheel().name).write_bytes(pip_wheel().read_bytes())
    root = unpack(build_package(tmp_path, "infer", own.path, wheels), tmp_path / "root")
    install(root, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0")
    assert says(root) == f"clipcast {own.version}"
    check = "import onnxruntime, PIL, edge_client.inference.model, importlib.util as u; print(u.find_spec('torch'))"
    done = subprocess.run(
        [str(root / "opt/clipcast/venv/bin/python"), "-I", "-c", check], capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"
    size = sum(path.lstat().st_size for path in (root / "opt/clipcast").rglob("*")) / 2**20
    assert size < Contents("infer", own, tuple(map(read_wheel, wheels.glob("*.whl")))).room_mib
