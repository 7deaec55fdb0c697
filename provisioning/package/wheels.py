"""Wheel files: this project's own, found or built, and what one says of itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

from provisioning.errors import ProvisioningError

CHECKOUT = Path(__file__).parents[2]
OF_EXTRA = re.compile(r"^([^;]+);\s*extra == ['\"]([^'\"]+)['\"]\s*$")


@dataclass(frozen=True)
class Wheel:
    """A wheel's name, version, what its extras require (without markers), and its size when unpacked, in MiB."""

    path: Path
    name: str
    version: str
    extras: dict[str, tuple[str, ...]]
    unpacked_mib: float


def read_wheel(path: Path) -> Wheel:
    """Read what a wheel says of itself; raises ProvisioningError."""
    try:
        with zipfile.ZipFile(path) as archive:
            (metadata,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            said = HeaderParser().parsestr(archive.read(metadata).decode())
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ProvisioningError(f"{path} cannot be read as a wheel: {error}. Build or download it again") from error
    extras: dict[str, tuple[str, ...]] = dict.fromkeys(said.get_all("Provides-Extra", []), ())
    for line in said.get_all("Requires-Dist", []):
        if found := OF_EXTRA.match(line):
            extras[found[2]] = (*extras.get(found[2], ()), found[1].strip().replace(" ", ""))
    return Wheel(path, said["Name"], said["Version"], extras, size / 2**20)


def own_wheel(named: Path | None, scratch: Path) -> Wheel:
    """Return this project's wheel: the file named, or else one built from the checkout into `scratch`.

    Raises ProvisioningError if it is another project's, or if there is neither a file nor a checkout.
    """
    wheel = read_wheel(named if named is not None else _build(scratch))
    if wheel.name != "clipcast":
        raise ProvisioningError(f"{wheel.path} is a wheel of {wheel.name}: name clipcast's own with --wheel")
    return wheel


def _build(scratch: Path) -> Path:
    if not (CHECKOUT / "pyproject.toml").exists():
        raise ProvisioningError(
            "this clipcast is installed, and no checkout to build a wheel from: name one with --wheel. "
            "`pip wheel --no-deps .` builds it in a clone"
        )
    require_pip()
    # In a folder of its own: the build may not touch the checkout, which need not be writable.
    offline = ["--no-build-isolation"] if find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *offline, "--wheel-dir", str(scratch), str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProvisioningError(
            f"the wheel cannot be built in {CHECKOUT}:\n{done.stderr.strip()}\nBuild it, and name it with --wheel"
        )
    (built,) = scratch.glob("clipcast-*.whl")
    return built


def require_pip() -> None:
    """Raise ProvisioningError if this Python has no pip."""
    if find_spec("pip") is None:
        raise ProvisioningError(f"{sys.executable} has no pip: `{sys.executable} -m ensurepip` installs it")


def require_program(name: str, package: str) -> str:
    """Return a program's path; raises ProvisioningError naming the Debian package that has it."""
    path = shutil.which(name)
    if path is None:
        raise ProvisioningError(f"{name} is not installed: on Debian or Ubuntu `sudo apt-get install {package}`")
    return path
