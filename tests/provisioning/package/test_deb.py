"""What is in the package, whether two builds are the same, and what systemd thinks of its units."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_client.config import ClientConfig
from protocol.settings import parse_settings
from provisioning.errors import ProvisioningError
from provisioning.overlay import UNIT as FIRSTBOOT
from provisioning.package.deb import FILES, SHARED, UNITS, build_package
from provisioning.package.wheels import read_wheel
from tests.provisioning.package.wheels import own_wheel, pip_wheel, wheelhouse, write_wheel

ROOT = Path(__file__).parents[3]
WORST = 4.0  # exposure, as systemd-analyze counts it: 10 is a service without any protection


def run(*command: object, code: int = 0, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deb")
    return build_package(folder, "infer", own_wheel(folder), wheelhouse(folder / "wheelhouse"))


@pytest.fixture(scope="module")
def tree(deb: Path) -> Path:
    run("dpkg-deb", "-x", deb, deb.parent / "tree")
    return deb.parent / "tree"


def field(deb: Path, name: str) -> str:
    return run("dpkg-deb", "-f", deb, name).strip()


def test_everything_is_in_it_and_belongs_to_root(deb: Path) -> None:
    assert deb.name == "clipcast-client_0.1.0_all.deb"
    listed = {line.split()[-1]: line.split()[:2] for line in run("dpkg-deb", "-c", deb).splitlines()}
    assert {owner for _, owner in listed.values()} == {"root/root"}
    files = {path: mode for path, (mode, _) in listed.items() if not path.endswith("/")}
    assert files == {
        "./usr/bin/clipcast": "-rwxr-xr-x",
        "./usr/lib/clipcast/install": "-rwxr-xr-x",
        "./usr/lib/clipcast/build": "-rw-r--r--",
        "./usr/lib/clipcast/sources": "-rw-r--r--",
        "./usr/lib/clipcast/wheels/clipcast-0.1.0-py3-none-any.whl": "-rw-r--r--",
        "./usr/lib/clipcast/wheels/onnxruntime-1.20.0-py3-none-any.whl": "-rw-r--r--",
        "./usr/lib/clipcast/wheels/pillow-10.3-py3-none-any.whl": "-rw-r--r--",
        f"./usr/lib/clipcast/wheels/{pip_wheel().name}": "-rw-r--r--",
        "./usr/lib/sysusers.d/clipcast.conf": "-rw-r--r--",
        "./etc/clipcast/client.toml": "-rw-r--r--",
        **{f"./lib/systemd/system/{unit}": "-rw-r--r--" for unit in UNITS},
        **{f"./{place}": "-rw-r--r--" for place in SHARED},
    }
    folders = {path: mode for path, (mode, _) in listed.items() if path.endswith("/")}
    assert "./opt/clipcast/" in folders
    assert set(folders.values()) == {"drwxr-xr-x"}


def test_what_dpkg_is_told_is_true(deb: Path, tree: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "-e", deb, tmp_path / "control")
    assert (tmp_path / "control/conffiles").read_text() == "/etc/clipcast/client.toml\n"
    run("md5sum", "--check", "--strict", tmp_path / "control/md5sums", cwd=tree)
    assert len((tmp_path / "control/md5sums").read_text().splitlines()) == sum(path.is_file() for path in tree.rglob("*"))
    assert field(deb, "Depends").startswith("python3 (>= 3.10) | ")


def test_it_asks_for_venv_and_certificates_only_where_it_brings_no_pip_and_no_wheels(deb: Path, tmp_path: Path) -> None:
    bare = build_package(tmp_path, "train", own_wheel(tmp_path))
    assert "python3-venv" in field(bare, "Depends")
    assert "ca-certificates" in field(bare, "Depends")
    assert "venv" not in field(deb, "Depends")
    assert "ca-certificates" not in field(deb, "Depends")


def test_the_same_input_gives_the_same_bytes(deb: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)  # another user's umask and another day must not show
    try:
        again = build_package(tmp_path, "infer", own_wheel(tmp_path), wheelhouse(tmp_path / "wheelhouse"))
    finally:
        os.umask(before)
    os.utime(tmp_path / "wheelhouse" / "pillow-10.3-py3-none-any.whl", (1, 1))
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(deb.read_bytes()).digest()
    other = build_package(tmp_path, "infer", own_wheel(tmp_path), wheelhouse(tmp_path / "wheelhouse", version="1.21.0"))
    assert other.read_bytes() != deb.read_bytes()


def test_a_version_before_the_release_sorts_before_it(tmp_path: Path) -> None:
    early = build_package(tmp_path, "infer", own_wheel(tmp_path, "0.2.0rc1"))
    assert early.name == "clipcast-client_0.2.0~rc1_all.deb"
    run("dpkg", "--compare-versions", field(early, "Version"), "lt", "0.2.0")


def test_the_settings_load_once_they_are_filled_in(tree: Path) -> None:
    path = tree / "etc/clipcast/client.toml"
    told = path.read_text()
    for key in ("id", "federation", "data", "[broker]", "url", "ca_file"):
        told = told.replace(f"# {key}", key)
    config = parse_settings(told, Path("/etc/clipcast/client.toml"), ClientConfig)
    assert str(config.state) == "/var/lib/clipcast"
    assert config.broker.url == "mqtts://labserver"


def test_the_wrapper_says_what_to_do_before_there_is_anything_to_run(tree: Path) -> None:
    assert "sudo /usr/lib/clipcast/install" in run(tree / "usr/bin/clipcast", "--version", code=11)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed: apt-get install systemd")
class TestUnits:
    def test_they_are_well_formed(self, tree: Path) -> None:
        units = tree / "lib/systemd/system"
        for program in ("usr/bin/clipcast", "usr/lib/clipcast/install"):  # what they run, where systemd looks for it
            text = "".join((units / unit).read_text() for unit in UNITS)
            assert f"/{program}" in text
        checked = tree.parent / "checked"
        shutil.copytree(units, checked)
        for unit in UNITS:
            text = (units / unit).read_text().replace("/usr/bin/clipcast", "/bin/true")
            (checked / unit).write_text(text.replace("/usr/lib/clipcast/install", "/bin/true"))
        # The one that a flashed image carries beside the package.
        text = (FILES.parents[1] / "firstboot" / FIRSTBOOT).read_text()
        (checked / FIRSTBOOT).write_text(text.replace("/usr/lib/clipcast-firstboot/install", "/bin/true"))
        assert run("systemd-analyze", "verify", *(checked / unit for unit in (*UNITS, FIRSTBOOT))) == ""

    @pytest.mark.parametrize("unit", UNITS)
    def test_little_is_exposed(self, tree: Path, unit: str) -> None:
        path = tree / "lib/systemd/system" / unit
        run("systemd-analyze", "security", "--offline=true", f"--threshold={int(WORST * 10)}", path)


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed, which builds the wheel")
def test_the_wheel_of_this_checkout_holds_the_files_beside_the_code(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (built,) = tmp_path.glob("clipcast-*.whl")
    with zipfile.ZipFile(built) as archive:
        inside = {name for name in archive.namelist() if name.startswith("provisioning/package/files/")}
    assert inside == {f"provisioning/package/files/{path.name}" for path in FILES.iterdir()}
    assert any(one.startswith("onnxruntime") for one in read_wheel(built).extras["infer"])


def test_what_cannot_be_packed_is_refused_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_wheel(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProvisioningError, match="holds no wheels: `clipcast device wheelhouse"):
        build_package(tmp_path, "infer", own, tmp_path / "empty")
    with pytest.raises(ProvisioningError, match="is a wheel of pillow: name clipcast"):
        build_package(tmp_path, "infer", write_wheel(tmp_path, "pillow", "10.3"))
    with pytest.raises(ProvisioningError, match="lacks bitsandbytes, torch, which a device needs to train"):
        build_package(tmp_path, "train", own, wheelhouse(tmp_path / "to-answer"))
    (tmp_path / "clipcast-9-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ProvisioningError, match="cannot be read as a wheel"):
        build_package(tmp_path, "infer", tmp_path / "clipcast-9-py3-none-any.whl")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProvisioningError, match=r"dpkg-deb is not installed.*apt-get install dpkg"):
        build_package(tmp_path, "infer", own)
