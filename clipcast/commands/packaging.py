"""`clipcast device package` and `clipcast device wheelhouse`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from clipcast.exit_codes import PROVISION


class Use(str, Enum):
    """What a device is for."""

    train = "train"
    infer = "infer"


For = Annotated[Use, typer.Option("--for", help="What the device is for: train (and answer), or infer (answer only).")]


def package(
    *,
    out: Annotated[Path, typer.Option(help="Folder to write the package to.")] = Path(),
    wheel: Annotated[Path | None, typer.Option(help="clipcast's wheel; without it, one is built from the checkout.")] = None,
    wheelhouse: Annotated[Path | None, typer.Option(help="A folder of wheels to install from, without a network.")] = None,
    use: For = Use.train,
) -> None:
    """Make the Debian package of a client. Needs dpkg-deb; the package is for every processor that its wheels are for.

    Example: `clipcast device package --out dist`, `clipcast device package --wheelhouse wheels --for infer`
    """
    from provisioning.package.deb import build_package

    made = build_package(out, use.value, wheel, wheelhouse)
    typer.echo(f"wrote {made}. Next, on the device: sudo apt-get install ./{made.name}")


def wheelhouse(
    folder: Annotated[Path, typer.Argument(help="Where the wheels go; what is there already is kept.")],
    *,
    platform: Annotated[str, typer.Option(help="linux, or a JetPack that `clipcast profiles list` names.")],
    python: Annotated[str | None, typer.Option(help="The device's Python, as 3.11; a JetPack has its own.")] = None,
    machine: Annotated[str, typer.Option(help="The device's processor, as `uname -m` prints it.")] = "aarch64",
    use: For = Use.train,
    wheel: Annotated[Path | None, typer.Option(help="clipcast's wheel; without it, one is built from the checkout.")] = None,
) -> None:
    """Collect the wheels that a device needs, so that it can be installed without a network.

    Example: `clipcast device wheelhouse wheels --platform linux --python 3.11 --for infer`
    """
    from provisioning.package.wheelhouse import collect

    missing = collect(folder, platform, python, machine, use.value, wheel)
    for name, reason in missing.items():
        typer.echo(f"{name} could not be had: {reason}", err=True)
    if missing:
        typer.echo(f"{folder} is not whole: put what is missing there, from wherever it can be had", err=True)
        raise typer.Exit(PROVISION)
    typer.echo(f"{folder} is whole. Next: clipcast device package --wheelhouse {folder} --for {use.value}")
