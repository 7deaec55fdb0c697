"""A folder with every wheel that a device needs, collected on another machine: pip's own is among them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hardware_profiles.platform import Platform, load
from provisioning.errors import ProvisioningError
from provisioning.package import pip_elsewhere
from provisioning.package.sources import ANSWERS, Source, Use, sources
from provisioning.package.wheels import Wheel, own_wheel, require_pip

# The C library of each Ubuntu, which decides what wheels may be built for; the oldest for a Linux that is none of these.
GLIBC = {"18.04": 27, "20.04": 31, "22.04": 35, "24.04": 39}
OLDEST_GLIBC = 17  # manylinux2014, the oldest that wheels for arm64 are built for
OTHER_LINUX = 35


@dataclass(frozen=True)
class Target:
    """The machine that the wheels are for."""

    machine: str
    python: str
    glibc: int

    def arguments(self) -> list[str]:
        """Return what tells pip of it."""
        newest_first = [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc, OLDEST_GLIBC - 1, -1)]
        tags = [*newest_first, f"manylinux2014_{self.machine}", f"linux_{self.machine}"]
        version = ["--python-version", self.python, "--implementation", "cp", "--only-binary=:all:"]
        return [*version, *(part for tag in tags for part in ("--platform", tag))]


def collect(folder: Path, platform: str, python: str | None, machine: str, use: Use, wheel: Path | None) -> dict[str, str]:
    """Download into `folder` what `use` needs on a platform; return what could not be had, with the reason.

    What must come from an index of its own is looked for in the folder first, so that it can be put there by hand. While
    one of those is missing the rest is not tried: pip would take another build of it, which cannot run.
    Raises ProvisioningError or ProfileError if nothing can be tried.
    """
    require_pip()
    found = load(platform)
    target = Target(machine, python or _python_of(found), _glibc_of(found))
    if not re.fullmatch(r"3\.\d{1,2}", target.python):
        raise ProvisioningError(f"{target.python!r} is no Python such as 3.11: name one with --python")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        own = own_wheel(wheel, Path(scratch))
        answering = own.extras.get(ANSWERS, ())
        source = next(source for source in sources(use, answering) if source.platform.name == platform)
        if source.refuse:
            raise ProvisioningError(f"clipcast cannot train on {platform}: {found.advice}")
        fetched = Path(scratch) / "own"
        missing = {**_pip_itself(folder, target), **_own(folder, fetched, target, source)}
        return missing or _rest(folder, fetched, target, source, own)


def _python_of(platform: Platform) -> str:
    said = str(platform.facts["python"].value)
    return said if re.fullmatch(r"3\.\d{1,2}", said) else f"3.{sys.version_info.minor}"


def _glibc_of(platform: Platform) -> int:
    ubuntu = platform.facts.get("ubuntu")
    return GLIBC[str(ubuntu.value)] if ubuntu else OTHER_LINUX


def _pip_itself(folder: Path, target: Target) -> dict[str, str]:
    return _each(folder, target, ["pip"], ["--no-deps"])


def _own(folder: Path, fetched: Path, target: Target, source: Source) -> dict[str, str]:
    """Bring what must come from an index of its own into `fetched`, from the folder or from there."""
    fetched.mkdir()
    missing: dict[str, str] = {}
    for index, packages in source.own.items():
        there = _each(fetched, target, list(packages), ["--no-deps", "--no-index", "--find-links", str(folder)])
        reasons = _each(fetched, target, list(there), ["--no-deps", "--index-url", index])
        missing |= {package: f"{reason} ({index})" for package, reason in reasons.items()}
    for wheel in fetched.glob("*.whl"):
        shutil.copyfile(wheel, folder / wheel.name)
    return missing


def _rest(folder: Path, fetched: Path, target: Target, source: Source, own: Wheel) -> dict[str, str]:
    """Bring what pip adds to it. Named by its file, a wheel has no rival: the public index may have the same version."""
    indexes = [part for index in source.own for part in ("--extra-index-url", index)]
    options = [*indexes, "--find-links", str(folder)]
    extras = f"[{','.join(source.extras)}]" if source.extras else ""
    given = [str(path) for path in sorted(fetched.glob("*.whl"))]
    wanted = [f"{own.path}{extras}", *given, *source.require]
    reason = _download(folder, target, wanted, options)
    if reason is None:
        return {}
    parts = [part for extra in source.extras for part in own.extras.get(extra, ())]
    missing = _each(folder, target, [str(own.path), *parts, *source.require], [*options, "--no-deps"])
    return missing or {"all of it together": reason}


def _each(folder: Path, target: Target, wanted: list[str], options: list[str]) -> dict[str, str]:
    reasons = {requirement: _download(folder, target, [requirement], options) for requirement in dict.fromkeys(wanted)}
    return {requirement: reason for requirement, reason in reasons.items() if reason is not None}


def _download(folder: Path, target: Target, wanted: list[str], options: list[str]) -> str | None:
    """Run pip, whose progress is shown; return None, or why it failed."""
    launcher = [sys.executable, pip_elsewhere.__file__, target.machine, target.python]
    command = [*launcher, "download", "--dest", str(folder), *target.arguments(), *options, *wanted]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return None
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else done.stderr.strip()[-500:]
