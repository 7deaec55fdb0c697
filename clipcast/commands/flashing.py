"""`clipcast device overlay|flash-plan`: boards from the box."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.exit_codes import INTERRUPTED, PROVISION

if TYPE_CHECKING:
    from provisioning.flash_plan import FlashPlan, Step

ROOT = Path("/")


class Storage(str, Enum):
    """What a board boots from."""

    nvme = "nvme"
    sd = "sd"
    emmc = "emmc"


def overlay(
    l4t_dir: Annotated[Path, typer.Option("--l4t-dir", help="NVIDIA's Linux_for_Tegra, with its rootfs unpacked.")],
    package: Annotated[Path, typer.Option(help="The client's package, as `clipcast device package` makes it.")],
    settings: Annotated[Path, typer.Option("--coordinator", help="The coordinator's settings file.")] = Path(
        "coordinator.toml"
    ),
    ca: Annotated[Path, typer.Option("--ca", help="The authority's folder.")] = Path("ca"),
    *,
    token_file: Annotated[
        Path | None, typer.Option(help="A claim for one board, as `clipcast device add ID` prints it.")
    ] = None,
    broker: Annotated[str | None, typer.Option(help="The broker as boards call it, else as the coordinator does.")] = None,
    data: Annotated[str, typer.Option(help="The folder of pictures on the boards.")] = "/srv/pictures",
    massflash: Annotated[bool, typer.Option("--massflash", help="The image is for many boards.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Write; without it, show what would be written.")] = False,
) -> None:
    """Lay client and lab's settings into a board's root filesystem before it is flashed. Shows what it would do.

    Example: `clipcast device overlay --l4t-dir Linux_for_Tegra --package clipcast-client_0.1.0_all.deb --run`
    """
    from protocol.trust.claims import Claim
    from provisioning.linux_for_tegra import Image
    from provisioning.overlay import Package, lay, plan_overlay
    from provisioning.site import Site
    from provisioning.telling import overlay_lines

    image = Image.open(l4t_dir)
    token = None if token_file is None else str(Claim.load(token_file))
    plan = plan_overlay(image, Site.read(settings, ca, broker, data), Package.read(package), token, massflash=massflash)
    typer.echo(f"{image.rootfs}: L4T {image.l4t}")
    _print(overlay_lines(plan))
    if not run:
        typer.echo("nothing was written: --run does it" if plan.changes else "nothing to do: all is there")
        return
    written = len(list(lay(plan)))
    typer.echo(f"wrote {written} of {len(plan.found)} files" if written else "nothing to do: all is there")


def flash_plan(
    profile: Annotated[str, typer.Option(help="The board: a name from `clipcast profiles list`.")],
    jetpack: Annotated[str, typer.Option(help="As NVIDIA numbers it: 6.2, 7.2.1 ...")],
    storage: Annotated[Storage, typer.Option(help="What the board boots from.")],
    *,
    l4t: Annotated[str, typer.Option(help="Another release of that JetPack's L4T, as 36.4.4.")] = "",
    use_super: Annotated[bool, typer.Option("--super", help="With the Super power modes.")] = False,
    massflash: Annotated[int, typer.Option(help="One image for many boards, so many at a time.", min=0)] = 0,
    l4t_dir: Annotated[Path | None, typer.Option("--l4t-dir", help="NVIDIA's Linux_for_Tegra, if there is one.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Ask, and carry out the steps from the flash on.")] = False,
) -> None:
    """Say how a board is flashed: what may hinder it on this machine, and NVIDIA's commands in order. Nothing was tried.

    With --run it goes on from the flash, and ends with that command's exit code where one fails.

    Example: `clipcast device flash-plan --profile jetson-orin-nano-8gb --jetpack 6.2 --storage nvme --super`
    """
    from clipcast.commands.findings import show
    from hardware_profiles.profile import load
    from protocol.settings import SettingsError
    from provisioning.flash_choice import Wanted
    from provisioning.flash_plan import TOOLS, plan_flash
    from provisioning.flash_run import check_tools
    from provisioning.preflight import preflight
    from provisioning.telling import plan_lines

    if run and l4t_dir is None:
        raise SettingsError("--run needs --l4t-dir: the Linux_for_Tegra with the image that is flashed")
    folder = Path(TOOLS) if l4t_dir is None else l4t_dir
    wanted = Wanted(jetpack, storage.value, l4t, use_super, massflash)
    plan = plan_flash(load(profile), wanted, str(folder))
    states = show(preflight(plan.choice, folder, ROOT), "this machine", "looking at this machine", as_json=False)
    _print(plan_lines(plan))
    if not run:
        return
    check_tools(plan, folder)
    if "fail" in states:
        typer.echo("error: this machine is not ready, as the table above says: nothing was flashed", err=True)
        raise typer.Exit(PROVISION)
    question = "Make the image now?" if wanted.massflash else "Flash now? What is on the board is lost"
    if not _yes(question):
        typer.echo("nothing was flashed")
        raise typer.Exit(INTERRUPTED)
    _carry_out(plan)


def _carry_out(plan: FlashPlan) -> None:
    from provisioning.flash_run import run
    from provisioning.telling import step_lines

    for done in run(plan):
        if done.code is None:
            _print(step_lines(done.step, "next"))
            if done.then is not None:
                _await_boards(plan, done.then)
        elif done.code != 0:
            typer.echo(
                f"error: {done.step.line} ended with {done.code}. It is not tried again: read what it printed, put the "
                f"board into recovery mode anew, and run this once more",
                err=True,
            )
            raise typer.Exit(done.code)


def _await_boards(plan: FlashPlan, then: Step) -> None:
    """Ask until the boards of an image for many are there. What was made so far is not lost by a no."""
    from provisioning.preflight import boards

    while _yes("Flash these boards now? What is on them is lost"):
        found = boards(plan.choice, ROOT, plan.choice.wanted.boards)
        typer.echo(f"{found.name}: {found.measured}" + (f". {found.cure}" if found.cure else ""))
        if found.state == "ok":
            return
    typer.echo(f"nothing was flashed. The image is made; what is left is, in {then.folder}: {then.line}")
    raise typer.Exit(INTERRUPTED)


def _yes(question: str) -> bool:
    """Ask; no answer, and Ctrl-C, are a no."""
    try:
        return typer.confirm(f"\n{question}")
    except typer.Abort:
        return False


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)
