"""`clipcast broker config`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The MQTT broker between coordinator and clients.")


class Kind(str, Enum):
    """The brokers that we write a configuration for."""

    MOSQUITTO = "mosquitto"
    EMQX = "emqx"


@app.command()
def config(
    folder: Annotated[Path, typer.Argument(help="The folder to write to.")] = Path("broker"),
    *,
    kind: Annotated[Kind, typer.Option("--for", help="Which broker.")] = Kind.MOSQUITTO,
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "lab",
    ca: Annotated[Path, typer.Option(help="The authority's folder, with the broker's certificate.")] = Path("ca"),
    server: Annotated[str, typer.Option(help="Name of the broker's certificate there.")] = "broker",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8883,
) -> None:
    """Write the configuration that we recommend: mutual TLS, and access rules by the certificate's name.

    Example: `clipcast broker config broker --federation lab --ca ca`
    """
    from coordinator.authority import CRL
    from coordinator.broker import mosquitto
    from coordinator.emqx import emqx
    from protocol.files import write_atomic
    from protocol.settings import SettingsError

    files = {Kind.MOSQUITTO: mosquitto, Kind.EMQX: emqx}[kind]
    for name, text in files(federation, folder, ca, server, port).items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise SettingsError(f"{path} exists and says something else: move it aside, or name another folder")
        try:
            write_atomic(path, text.encode())
            path.chmod(0o644)
        except OSError as error:
            raise SettingsError(f"{folder} cannot be written: {error}") from error
        typer.echo(f"wrote {path}")
    if not (ca / f"{server}.pem").exists():
        typer.echo(f"its certificate is missing: clipcast ca issue {server} {ca} --host HOST", err=True)
    elif kind is Kind.MOSQUITTO and not (ca / CRL).exists():
        typer.echo(f"{ca / CRL} is missing: restore it, or remove the line `crlfile`", err=True)
