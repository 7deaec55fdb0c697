"""The Debian package `clipcast-client`: its tree of files, and dpkg-deb run on it. The same input gives the same bytes."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from provisioning.errors import ProvisioningError
from provisioning.package.sources import ANSWERS, EXTRAS, TO, Use, sources
from provisioning.package.wheels import Wheel, own_wheel, read_wheel, require_program

FILES = Path(__file__).parent / "files"
WHEN = 1580601600  # of all files: 2020-02-02, the date that hatchling gives to those in a wheel
UNITS = ("clipcast-setup.service", "clipcast-enrol.service", "clipcast-client.service", "clipcast-serve.service")
# Where each file goes, and its mode.
PLACES = {
    "clipcast": ("usr/bin/clipcast", 0o755),
    "install": ("usr/lib/clipcast/install", 0o755),
    "sysusers.conf": ("usr/lib/sysusers.d/clipcast.conf", 0o644),
    "client.toml": ("etc/clipcast/client.toml", 0o644),
    **{unit: (f"lib/systemd/system/{unit}", 0o644) for unit in UNITS},
    **{script: (f"DEBIAN/{script}", 0o755) for script in ("postinst", "prerm", "postrm")},
}
# What two units have in common: systemd reads it as a part of each.
SHARED = {f"lib/systemd/system/clipcast-{unit}.service.d/10-device.conf": "device.conf" for unit in ("client", "serve")}
LIB = "usr/lib/clipcast"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# What is unpacked and downloaded where the package brings no wheels, roughly: torch for CUDA and its libraries, or none.
ROOM_MIB: dict[Use, int] = {"train": 8000, "infer": 700}


@dataclass(frozen=True)
class Contents:
    """What goes into a package: clipcast's wheel, the wheels of a wheelhouse if it has one, and what the device is for."""

    use: Use
    own: Wheel
    others: tuple[Wheel, ...]

    @property
    def version(self) -> str:
        """The Debian version: one before a release sorts before it."""
        return re.sub(r"\.?(a|b|rc|dev)(?=\d)", r"~\1", self.own.version)

    @property
    def room_mib(self) -> int:
        """What the installed environment takes, in MiB, with a margin."""
        return (
            ROOM_MIB[self.use]
            if not self.others
            else math.ceil(100 + 1.3 * sum(wheel.unpacked_mib for wheel in self.others))
        )

    def depends(self) -> str:
        """Return what Debian packages are needed: python3-venv only where the package does not bring pip."""
        python = " | ".join(("python3 (>= 3.10)", *(f"python{version}" for version in PYTHONS)))
        needed = [python, "systemd | systemd-standalone-sysusers | passwd"]
        if not any(wheel.name == "pip" for wheel in self.others):
            needed.append(" | ".join(("python3-venv", *(f"python{version}-venv" for version in PYTHONS))))
        if not self.others:
            needed.append("ca-certificates")
        return ", ".join(needed)


def build_package(out: Path, use: Use, wheel: Path | None = None, wheelhouse: Path | None = None) -> Path:
    """Write the package below `out`, and return its path; raises ProvisioningError."""
    program = require_program("dpkg-deb", "dpkg")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        contents = Contents(use, own_wheel(wheel, scratch), _wheels_in(wheelhouse))
        if wheelhouse is not None:
            _check_use(contents, wheelhouse)
        tree = scratch / "tree"
        lay_out(contents, tree)
        path = out / f"clipcast-client_{contents.version}_all.deb"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProvisioningError(f"{out} cannot be made: {error}. Name another folder with --out") from error
        # Wheels are packed already: packing gigabytes again takes minutes and saves nothing.
        command = [program, "--root-owner-group", "-Znone", "--build", str(tree), str(path)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(WHEN)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise ProvisioningError(f"dpkg-deb cannot write {path}: {done.stderr.strip()}")
    return path


def lay_out(contents: Contents, tree: Path) -> None:
    """Write the package's files below `tree`, with their modes, all of one date."""
    for name, (place, mode) in PLACES.items():
        _write(tree / place, (FILES / name).read_bytes(), mode)
    for place, name in SHARED.items():
        _write(tree / place, (FILES / name).read_bytes(), 0o644)
    for wheel in (contents.own, *contents.others):
        target = tree / LIB / "wheels" / wheel.path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel.path, target)
        target.chmod(0o644)
    (tree / "opt/clipcast").mkdir(parents=True)
    told = "".join(
        f"{line}\n" for source in sources(contents.use, contents.own.extras.get(ANSWERS, ())) for line in source.lines()
    )
    _write(tree / LIB / "sources", told.encode(), 0o644)
    _write(tree / LIB / "build", _build_file(contents, tree).encode(), 0o644)
    _write(tree / "DEBIAN/conffiles", b"/etc/clipcast/client.toml\n", 0o644)
    _write(tree / "DEBIAN/md5sums", _md5sums(tree).encode(), 0o644)
    _write(tree / "DEBIAN/control", _control(contents, tree).encode(), 0o644)
    for path in (tree, *tree.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (WHEN, WHEN))


def _wheels_in(wheelhouse: Path | None) -> tuple[Wheel, ...]:
    if wheelhouse is None:
        return ()
    found = tuple(read_wheel(path) for path in sorted(wheelhouse.glob("*.whl")) if not path.name.startswith("clipcast-"))
    if not found:
        raise ProvisioningError(f"{wheelhouse} holds no wheels: `clipcast device wheelhouse {wheelhouse}` collects them")
    return found


def _check_use(contents: Contents, wheelhouse: Path) -> None:
    """Raise ProvisioningError if wheels lack what the use needs at the least: nobody is there to see the device fail."""
    names = {_name(wheel.name) for wheel in contents.others}
    needed = [_name(need) for extra in EXTRAS[contents.use] or (ANSWERS,) for need in contents.own.extras.get(extra, ())]
    there = names | ({"onnxruntime"} if "onnxruntime-gpu" in names else set())
    missing = sorted(set(needed) - there)
    if missing:
        raise ProvisioningError(
            f"{wheelhouse} lacks {', '.join(missing)}, which a device needs {TO[contents.use]}: collect it with "
            f"`clipcast device wheelhouse {wheelhouse} --for {contents.use}`, or name another use with --for"
        )


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _build_file(contents: Contents, tree: Path) -> str:
    """Return what the install step needs to know. `build` is a hash over all that decides what it installs."""
    digest = hashlib.sha256()
    for path in sorted((tree / LIB).rglob("*")):
        if path.is_file():
            digest.update(f"{path.name}\0{_hash(path, 'sha256')}\0".encode())
    lines = {
        "version": contents.own.version,
        "build": digest.hexdigest(),
        "for": TO[contents.use],
        "room_mib": contents.room_mib,
        "wheel": contents.own.path.name,
        "wheelhouse": "yes" if contents.others else "no",
    }
    return "".join(f"{key} {value}\n" for key, value in lines.items())


def _installed(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if path.is_file() and "DEBIAN" not in path.parts)


def _md5sums(tree: Path) -> str:
    return "".join(f"{_hash(path, 'md5')}  {path.relative_to(tree)}\n" for path in _installed(tree))


def _control(contents: Contents, tree: Path) -> str:
    size = sum(math.ceil(path.stat().st_size / 1024) for path in _installed(tree))
    wheels = "All wheels are in it: no network is needed." if contents.others else "The wheels come from package indexes."
    return (
        (FILES / "control")
        .read_text(encoding="utf-8")
        .format(
            version=contents.version,
            size_kib=size,
            depends=contents.depends(),
            use=TO[contents.use],
            wheels=wheels,
        )
    )


def _hash(path: Path, name: str) -> str:
    digest = hashlib.new(name)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
