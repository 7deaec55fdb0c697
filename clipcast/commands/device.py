"""`clipcast device list|add|revoke`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The coordinator's devices: who may take part, by name and key.")

Settings = Annotated[Path, typer.Option("--coordinator", help="The coordinator's settings file.")]
Name = Annotated[str, typer.Argument(metavar="ID", help="The device's id.")]
SETTINGS = Path("coordinator.toml")


@app.command(name="list")
def show(settings: Settings = SETTINGS) -> None:
    """Show the known devices: id, key, and whether it was revoked, or is quarantined because two devices used its name.

    Example: `clipcast device list --coordinator coordinator.toml`
    """
    from coordinator.config import load
    from coordinator.state.store import Store

    config = load(settings)
    for name, device in Store(config.state, config.journal).registry.devices().items():
        state = "revoked" if device.revoked else "quarantined" if device.quarantined else "active"
        typer.echo(f"{name} {device.key} {state}")


@app.command(context_settings={"ignore_unknown_options": True})  # a key may begin with a dash
def add(
    name: Name,
    key: Annotated[str, typer.Argument(help="Its public key, as `clipcast client key` prints it there.")],
    settings: Settings = SETTINGS,
) -> None:
    """Let a device take part, or give a known one another key. A running coordinator knows within 5 s.

    Example: `clipcast device add jetson-1 KEY`
    """
    from coordinator.config import load
    from coordinator.state.store import Store
    from protocol.settings import SettingsError
    from protocol.topics import check_name
    from protocol.trust.signing import public_key

    config = load(settings)
    check_name(name, "device")
    try:
        public_key(key)
    except ValueError as error:
        raise SettingsError(f"{error}: `clipcast client key` prints it on the device") from error
    Store(config.state, config.journal).registry.add(name, key)
    typer.echo(f"{name} may take part with key {key}")


@app.command()
def revoke(name: Name, settings: Settings = SETTINGS) -> None:
    """Cut a device off. A running coordinator does so within 5 s; `add` lets it in again.

    Example: `clipcast device revoke jetson-1`
    """
    from coordinator.config import load
    from coordinator.state.store import Store
    from protocol.settings import SettingsError

    config = load(settings)
    if not Store(config.state, config.journal).registry.revoke(name):
        raise SettingsError(f"no device {name!r} is known: `clipcast device list` shows them")
    typer.echo(f"{name} is cut off")
