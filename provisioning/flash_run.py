"""Carries a plan out from the flash on. What fails ends it: a flash is never tried again by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from provisioning.errors import ProvisioningError
from provisioning.flash_plan import FlashPlan, Step
from provisioning.linux_for_tegra import Image


@dataclass(frozen=True)
class Done:
    """A step, and its command's exit code; None if hands do it. `then` is the command that waits for these hands."""

    step: Step
    code: int | None
    then: Step | None = None


def check_tools(plan: FlashPlan, folder: Path) -> None:
    """Raise ProvisioningError unless the tools and the image of the planned L4T are in `folder`, and can be run."""
    image = Image.open(folder)
    image.check_runs_client()
    for where, l4t in (("tools", image.tools_l4t), ("rootfs", image.l4t)):
        if l4t and _numbers(l4t) != _numbers(plan.choice.l4t):
            raise ProvisioningError(
                f"the {where} in {folder} are L4T {l4t}, planned is {plan.choice.l4t}: say --l4t {l4t}, or unpack that"
            )
    for step in plan.from_flash:
        program = folder / (step.argv[0] if step.argv else "")
        if step.argv and Path(step.folder) == folder and not os.access(program, os.X_OK):
            raise ProvisioningError(
                f"{program} is not there, or is no program: unpack Jetson_Linux_R*_aarch64.tbz2 once more"
            )
    if os.geteuid() != 0 and shutil.which("sudo") is None:
        raise ProvisioningError("the tools need root, and there is no sudo: run this as root")


def run(plan: FlashPlan) -> Iterator[Done]:
    """Carry the steps out from the flash on, output to this terminal; yield each, and end after one that fails.

    What comes after what hands do is done when the next one is asked for: whoever iterates asks the hands first.
    """
    sudo = ("sudo",) if os.geteuid() != 0 else ()
    steps = plan.from_flash
    for number, step in enumerate(steps):
        if not step.run:
            yield Done(step, None, next((later for later in steps[number:] if later.run), None))
            continue
        try:
            code = subprocess.run([*(sudo if step.root else ()), *step.argv], cwd=step.folder, check=False).returncode
        except OSError as error:
            raise ProvisioningError(f"{step.argv[0]} in {step.folder} cannot be run: {error.strerror}") from error
        yield Done(step, code if code >= 0 else 128 - code)
        if code != 0:
            return


def _numbers(l4t: str) -> tuple[int, ...]:
    """Return a release without zeros at its end: 39.2 is 39.2.0."""
    numbers = [int(part) for part in l4t.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
