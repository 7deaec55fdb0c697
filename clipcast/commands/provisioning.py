"""`clipcast device provision`: an already flashed board, over ssh."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.exit_codes import WARNINGS

if TYPE_CHECKING:
    from coordinator.state.registry import Registry
    from provisioning.provision import Found, Step
    from provisioning.remote import Remote

HOURS = 1.0


def provision(
    host: Annotated[str, typer.Argument(metavar="USER@HOST", help="As ssh knows it; as root, or with sudo.")],
    *,
    package: Annotated[Path, typer.Option(help="What `clipcast device package` made.")] = Path("clipcast-client.deb"),
    coordinator: Annotated[Path, typer.Option(help="The coordinator's settings file.")] = Path("coordinator.toml"),
    ca: Annotated[Path | None, typer.Option(help="The authority's folder, else `authority` in the settings.")] = None,
    name: Annotated[str, typer.Option("--id", help="The device's id, else its host name.")] = "",
    profile: Annotated[str, typer.Option(help="Its kind, for `device show`.")] = "",
    broker: Annotated[str, typer.Option(help="The broker as boards reach it, if other than in the settings.")] = "",
    data: Annotated[str, typer.Option(help="The folder of pictures on the board.")] = "",
    ssh: Annotated[list[str] | None, typer.Option("--ssh", help="An option for ssh, e.g. --ssh=-p --ssh=2222.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what would be done, and do nothing.")] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Remove all of clipcast, its keys included.")] = False,
) -> None:
    """Make a flashed board a device: install the package, give it its settings, enrol it, run the doctor there.

    A second run changes nothing, and says so. It ends with the doctor's code; --check with 14 if there is something to do.

    Example: `clipcast device provision ubuntu@192.168.1.7 --id jetson-1 --package clipcast-client_0.1.0_all.deb --ca ca`
    """
    from provisioning.provision import DOCTOR, LOOK, UNINSTALL, Found
    from provisioning.remote import Remote

    with Remote.open(host, ssh or ()) as board:
        if uninstall:
            board.run(UNINSTALL)
            typer.echo(
                "nothing of clipcast is left there. `clipcast device revoke ID` and `clipcast ca revoke ID` end its rights"
            )
            return
        found = Found.read(board.run(LOOK))
        name = name or found.enrolled or found.hostname
        todo = _steps(found, name, package, coordinator, ca, broker, data)
        for step in todo:
            typer.echo(f"{'would' if check else 'to do'}: {step.why}")
        if check and todo:
            raise typer.Exit(WARNINGS)
        if not todo:
            typer.echo(f"{host} is {name}, and as it should be: nothing to do")
        if check:
            return
        for step in todo:
            _do(step, board, found, name, package, coordinator, ca, profile)
        raise typer.Exit(board.code(DOCTOR))


def _steps(found: Found, name: str, package: Path, coordinator: Path, ca: Path | None, broker: str, data: str) -> list[Step]:
    from clipcast.commands.device import authority_of, check_device_name, open_registry
    from protocol.trust.signing import public_key_of
    from provisioning.provision import files_of, steps
    from provisioning.site import PICTURES, Site

    check_device_name(name)
    registry, config = open_registry(coordinator)
    _check_free(registry, found, name)
    public_key_of(config.state)  # the first time it makes the coordinator's key, which the board is given
    files = files_of(Site.read(coordinator, authority_of(config, ca), broker or None, data or PICTURES))
    return steps(found, name, hashlib.sha256(_package(package)).hexdigest(), files)


def _do(
    step: Step, board: Remote, found: Found, name: str, package: Path, coordinator: Path, ca: Path | None, profile: str
) -> None:
    from provisioning.provision import CLEAN, INSTALL, START

    typer.echo(f"{step.why} ...")
    if step.kind == "package":
        data = _package(package)
        board.run(f"SHA256={hashlib.sha256(data).hexdigest()}\n{INSTALL}", data)
    elif step.file is not None:
        board.put(step.file.data, step.file.path, step.file.mode, step.file.owner)
    elif step.kind == "clean":
        board.run(CLEAN)
    elif step.kind == "enrol":
        _enrol(board, found, name, coordinator, ca, profile)
    else:
        typer.echo(board.run(START).strip() or "started")


def _enrol(board: Remote, found: Found, name: str, coordinator: Path, ca: Path | None, profile: str) -> None:
    """Make a claim that holds for an hour, unless the board has one, and answer it here: no coordinator has to run."""
    from clipcast.commands.device import authority_of, open_registry
    from coordinator.enrolment import registrar
    from protocol.trust.claims import Claim
    from provisioning.provision import ENROL, TOKEN, TOKEN_MODE

    registry, config = open_registry(coordinator)
    _check_free(registry, found, name)  # the installation took minutes
    if not _has_claim(registry, found, name):
        claim = Claim.make(name)
        registry.claim(name, claim.proof, int(time.time() + 3600 * HOURS), profile or None)
        board.put(f"{claim}\n".encode(), TOKEN, *TOKEN_MODE)
    with registrar(config, authority_of(config, ca)):
        board.run(ENROL)


def _has_claim(registry: Registry, found: Found, name: str) -> bool:
    """Whether the board has this name's claim, and may still use it: one that it has used was not heard of there."""
    enrolment = registry.enrolment(name)
    if found.proof is None or enrolment is None or found.proof != enrolment.proof:
        return False
    return enrolment.used_by is not None or time.time() < (enrolment.expires or 0)


def _check_free(registry: Registry, found: Found, name: str) -> None:
    """Raise ProvisioningError if another board has the name."""
    from provisioning.errors import ProvisioningError

    known = registry.devices().get(name)
    if found.enrolled is None and known is not None and not known.revoked and not _has_claim(registry, found, name):
        raise ProvisioningError(
            f"{name} is another board, unless this one was set up anew: give it another --id, or `clipcast device revoke "
            f"{name}` first, and this one takes its place"
        )


def _package(path: Path) -> bytes:
    from provisioning.errors import ProvisioningError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ProvisioningError(f"no package at {path} ({error.strerror}): `clipcast device package` makes one") from error
