"""`clipcast device list|show|add|admit|revoke`: who may take part."""

from __future__ import annotations

import datetime as dt
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from coordinator.state.registry import Device, Enrolment, Registry

app = typer.Typer(help="The coordinator's devices: who may take part, by name and key, and how boards become devices.")

Settings = Annotated[Path, typer.Option("--coordinator", help="The coordinator's settings file.")]
Authority = Annotated[Path | None, typer.Option("--ca", help="The authority's folder, else `authority` in the settings.")]
Name = Annotated[str, typer.Argument(metavar="ID", help="The device's id.")]
SETTINGS = Path("coordinator.toml")
HOURS = 72.0


@app.command(name="list")
def list_all(settings: Settings = SETTINGS) -> None:
    """Show the known devices: id, key, and whether it was revoked, or is quarantined because two devices used its name.

    Who has a claim and has not used it has no key yet.

    Example: `clipcast device list --coordinator coordinator.toml`
    """
    registry, _ = open_registry(settings)
    devices, enrolments = registry.devices(), registry.enrolments()
    for name in sorted(devices.keys() | {name for name, one in enrolments.items() if one.proof is not None}):
        device, enrolment = devices.get(name), enrolments.get(name)
        typer.echo(f"{name} {device.key if device else '-'} {_state(device, enrolment)}")


@app.command()
def show(name: Name, settings: Settings = SETTINGS) -> None:
    """Show what is known of a device: key, state, profile, claim, certificate, the last round that it took part in.

    Example: `clipcast device show jetson-1`
    """
    registry, _ = open_registry(settings)
    device, enrolment = registry.devices().get(name), registry.enrolment(name)
    if device is None and (enrolment is None or enrolment.proof is None):
        raise _unknown(name)
    lines = {
        "state": _state(device, enrolment),
        "key": device.key if device else "-",
        "profile": (enrolment and enrolment.profile) or "not told",
        "claim": _claim(enrolment),
        "last round": str(registry.last_rounds().get(name, "none yet")),
    }
    for what, value in lines.items():
        typer.echo(f"{what}: {value}")


@app.command(context_settings={"ignore_unknown_options": True})  # a key may begin with a dash
def add(
    name: Name,
    key: Annotated[str, typer.Argument(help="Its public key, if it has one: `clipcast client key` prints it there.")] = "",
    settings: Settings = SETTINGS,
    *,
    profile: Annotated[str, typer.Option(help="Its kind: a name from `clipcast profiles list`.")] = "",
    hours: Annotated[float, typer.Option(help="How long the claim holds.", min=0.01)] = HOURS,
    out: Annotated[Path | None, typer.Option(help="Write the token into this new file, for nobody else to read.")] = None,
    offline: Annotated[Path | None, typer.Option(help="Make keys and certificate here, into this new folder.")] = None,
    ca: Authority = None,
) -> None:
    """Let a device take part: by a claim token that it may use once, with the key that it has, or with keys made here.

    Without a key it prints a token, for `claim.token` on the board: `clipcast client enrol` there makes the keys, and gets
    a certificate. A running coordinator knows within 5 s. A known device keeps its key until the claim is used.

    Example: `clipcast device add jetson-1 --profile jetson-orin-nano-8gb --out claim.token`,
    `clipcast device add jetson-1 KEY`, `clipcast device add jetson-1 --offline jetson-1-identity --ca ca`
    """
    from protocol.settings import SettingsError

    registry, config = open_registry(settings)
    check_device_name(name)
    if key and offline is not None:
        raise SettingsError("--offline makes a key: leave out either KEY or --offline")
    if profile:
        _check_profile(profile)
    if offline is not None:
        _make_identity(name, offline, config, ca, registry, profile or None)
    elif key:
        _take_key(name, key, registry, profile or None)
    else:
        _make_claim(name, hours, registry, profile or None, out)


@app.command()
def admit(settings: Settings = SETTINGS, *, ca: Authority = None) -> None:
    """Answer boards that ask to be enrolled, until stopped. A run whose settings name `authority` does this, too.

    Example: `clipcast device admit --coordinator coordinator.toml --ca ca`
    """
    from coordinator.config import load
    from coordinator.enrolment import registrar

    config = load(settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with registrar(config, authority_of(config, ca)):
        typer.echo(f"boards with a claim of {config.federation} are enrolled. Ctrl-C ends it", err=True)
        stop.wait()


@app.command()
def revoke(name: Name, settings: Settings = SETTINGS) -> None:
    """Cut a device off, and void its claim. A running coordinator does so within 5 s; `add` lets it in again.

    Example: `clipcast device revoke jetson-1`
    """
    registry, _ = open_registry(settings)
    if not registry.revoke(name):
        raise _unknown(name)
    typer.echo(f"{name} is cut off. `clipcast ca revoke {name}` takes its certificate back, if it has one")


def check_device_name(name: str) -> None:
    """Raise WireError or SettingsError for what cannot be a device's name."""
    from protocol.envelope import RESERVED
    from protocol.settings import SettingsError
    from protocol.topics import check_name

    if check_name(name, "device") in RESERVED:
        raise SettingsError(f"{name!r} is no device's name: give it another")


def open_registry(settings: Path) -> tuple[Registry, CoordinatorConfig]:
    """Return the devices of the coordinator with these settings, and the settings."""
    from coordinator.config import load
    from coordinator.state.store import Store

    config = load(settings)
    return Store(config.state, config.journal).registry, config


def _unknown(name: str) -> Exception:
    from protocol.settings import SettingsError

    return SettingsError(f"no device {name!r} is known: `clipcast device list` shows them")


def authority_of(config: CoordinatorConfig, ca: Path | None) -> Path:
    """Return the authority's folder: `ca`, else what the settings name; raises SettingsError."""
    from protocol.settings import SettingsError

    folder = ca or config.authority
    if folder is None:
        raise SettingsError("which authority? Name its folder with --ca, or as `authority` in the coordinator's settings")
    return folder


def _check_profile(name: str) -> None:
    from hardware_profiles.facts import ProfileError
    from hardware_profiles.profile import load

    profile = load(name)
    if profile.tier == "unsupported":
        raise ProfileError(f"{profile.title} cannot be a device: {profile.advice}")


def _take_key(name: str, key: str, registry: Registry, profile: str | None) -> None:
    from protocol.settings import SettingsError
    from protocol.trust.signing import public_key

    try:
        public_key(key)
    except ValueError as error:
        raise SettingsError(f"{error}: `clipcast client key` prints it on the device") from error
    registry.add(name, key, profile)
    typer.echo(f"{name} may take part with key {key}")


def _make_claim(name: str, hours: float, registry: Registry, profile: str | None, out: Path | None) -> None:
    """Print the token alone on stdout, or write it: it stands nowhere else."""
    from protocol.settings import SettingsError
    from protocol.trust.claims import Claim

    known, claim, expires = registry.devices().get(name), Claim.make(name), time.time() + 3600 * hours
    registry.claim(name, claim.proof, int(expires), profile)
    if out is None:
        typer.echo(str(claim))
    else:
        try:
            with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"{claim}\n")
        except OSError as error:
            raise SettingsError(
                f"{out} cannot be written ({error.strerror}): name a new file, a claim made anew counts"
            ) from error
    also = f" {name} is known: whoever uses the claim takes its place." if known else ""
    typer.echo(
        f"one board may use this once, until {_date(expires)}.{also} The broker's rules hold for it as they are: they go by "
        f"the name in its certificate",
        err=True,
    )


def _make_identity(
    name: str, folder: Path, config: CoordinatorConfig, ca: Path | None, registry: Registry, profile: str | None
) -> None:
    from coordinator.broker.authority import Authority as Issuer
    from coordinator.identity import write_identity
    from protocol.trust.signing import public_key_of

    issuer = Issuer.open(authority_of(config, ca))
    key = write_identity(folder, name, issuer, public_key_of(config.state))
    registry.add(name, key, profile)
    typer.echo(
        f"{name} may take part with key {key}. Copy {folder} to its state folder, and delete it here: it holds its keys"
    )


def _state(device: Device | None, enrolment: Enrolment | None) -> str:
    if device is None:
        return f"claim {_claim(enrolment)}"
    return "revoked" if device.revoked else "quarantined" if device.quarantined else "active"


def _claim(enrolment: Enrolment | None) -> str:
    if enrolment is None or enrolment.proof is None or enrolment.expires is None:
        return "none"
    if enrolment.used_by is not None:
        return "used"
    return f"{'expired' if time.time() >= enrolment.expires else 'open until'} {_date(enrolment.expires)}"


def _date(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
