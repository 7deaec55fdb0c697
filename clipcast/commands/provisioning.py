"""`clipcast device provision`: an already flashed board, over ssh."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.exit_codes import WARNINGS

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
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
        lab = _Lab.open(coordinator, ca, package, profile)
        todo = lab.steps(found, name, broker, data)
        for step in todo:
            typer.echo(f"{'would' if check else 'to do'}: {step.why}")
        if check and todo:
            raise typer.Exit(WARNINGS)
        if not todo:
            typer.echo(f"{host} is {name}, and as it should be: nothing to do")
        if check:
            return
        for step in todo:
            typer.echo(f"{step.why} ...")
            lab.do(step, board, found, name)
        raise typer.Exit(board.code(DOCTOR))


@dataclass(frozen=True)
class _Lab:
    """The lab server's side of a provisioning; `profile` may be empty."""

    settings: Path
    config: CoordinatorConfig
    registry: Registry
    authority: Path
    package: bytes
    profile: str

    @classmethod
    def open(cls, coordinator: Path, ca: Path | None, package: Path, profile: str) -> _Lab:
        from clipcast.commands.device import authority_of, open_registry
        from protocol.trust.signing import public_key_of
        from provisioning.errors import ProvisioningError

        registry, config = open_registry(coordinator)
        public_key_of(config.state)  # the first time it makes the coordinator's key, which the board is given
        try:
            data = package.read_bytes()
        except OSError as error:
            raise ProvisioningError(
                f"no package at {package} ({error.strerror}): `clipcast device package` makes one"
            ) from error
        return cls(coordinator, config, registry, authority_of(config, ca), data, profile)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.package).hexdigest()

    def steps(self, found: Found, name: str, broker: str, data: str) -> list[Step]:
        from clipcast.commands.device import check_device_name
        from provisioning.provision import files_of, steps
        from provisioning.site import PICTURES, Site

        check_device_name(name)
        self._check_free(found, name)
        site = Site.read(self.settings, self.authority, broker or None, data or PICTURES)
        return steps(found, name, self.sha256, files_of(site))

    def do(self, step: Step, board: Remote, found: Found, name: str) -> None:
        from provisioning.provision import CLEAN, INSTALL, START

        if step.kind == "package":
            board.run(f"SHA256={self.sha256}\n{INSTALL}", self.package)
        elif step.file is not None:
            board.put(step.file.data, step.file.path, step.file.mode, step.file.owner)
        elif step.kind == "clean":
            board.run(CLEAN)
        elif step.kind == "enrol":
            self._enrol(board, found, name)
        else:
            typer.echo(
                board.run(START).strip()
                or "no service is enabled there: `systemctl enable --now clipcast-serve` on the board"
            )

    def _enrol(self, board: Remote, found: Found, name: str) -> None:
        """Make a claim that holds for an hour, unless the board has one, and answer it here: no coordinator has to run."""
        from coordinator.enrolment import registrar
        from protocol.trust.claims import Claim
        from provisioning.provision import ENROL, TOKEN, TOKEN_MODE

        self._check_free(found, name)  # the installation took minutes
        if not self._has_claim(found, name):
            claim = Claim.make(name)
            self.registry.claim(name, claim.proof, int(time.time() + 3600 * HOURS), self.profile or None)
            board.put(f"{claim}\n".encode(), TOKEN, *TOKEN_MODE)
        with registrar(self.config, self.authority):
            board.run(ENROL)

    def _has_claim(self, found: Found, name: str) -> bool:
        """Whether the board has this name's claim, and may still use it: one that it has used was not heard of there."""
        enrolment = self.registry.enrolment(name)
        if found.proof is None or enrolment is None or found.proof != enrolment.proof:
            return False
        return enrolment.used_by is not None or time.time() < (enrolment.expires or 0)

    def _check_free(self, found: Found, name: str) -> None:
        """Raise ProvisioningError if another board has the name."""
        from provisioning.errors import ProvisioningError

        known = self.registry.devices().get(name)
        if found.enrolled is None and known is not None and not known.revoked and not self._has_claim(found, name):
            raise ProvisioningError(
                f"{name} is another board, unless this one was set up anew: give it another --id, or `clipcast device "
                f"revoke {name}` first, and this one takes its place"
            )
