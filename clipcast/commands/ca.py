"""`clipcast ca init|issue|revoke`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The lab's certificate authority: TLS certificates for broker, coordinator and devices.")

Folder = Annotated[Path, typer.Argument(help="The authority's folder.")]


@app.command()
def init(
    folder: Folder = Path("ca"),
    *,
    name: Annotated[str, typer.Option(help="The authority's name.")] = "clipcast lab",
) -> None:
    """Make an authority: ca.pem goes to everybody, ca.key stays here.

    Example: `clipcast ca init ca`
    """
    from coordinator.broker.authority import Authority

    Authority.create(folder, name)
    typer.echo(f"wrote {folder / 'ca.pem'} and {folder / 'ca.key'}. Next: clipcast ca issue broker {folder} --host HOST")


@app.command()
def issue(
    name: Annotated[str, typer.Argument(help="broker, coordinator, or a device's id.")],
    folder: Folder = Path("ca"),
    *,
    host: Annotated[list[str] | None, typer.Option(help="A server's name or address; give it for each.")] = None,
) -> None:
    """Issue a certificate: with --host for a server, without for a client.

    Example: `clipcast ca issue broker ca --host labserver --host 192.168.1.2`, `clipcast ca issue jetson-1 ca`
    """
    from coordinator.broker.authority import Authority
    from protocol.topics import check_name

    check_name(name, "name")
    certificate = Authority.open(folder).issue(name, host or [])
    typer.echo(f"wrote {certificate} and {certificate.with_suffix('.key')}: copy both, and ca.pem, to where they are used")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Whose certificate is taken back.")],
    folder: Folder = Path("ca"),
) -> None:
    """Take a certificate back: the broker lets it in no more. The name may then be issued anew.

    Example: `clipcast ca revoke jetson-1 ca`. Who is connected stays so: `clipcast device revoke` cuts off within 5 s.
    """
    from coordinator.broker.authority import Authority
    from protocol.topics import check_name

    check_name(name, "name")
    written = Authority.open(folder).revoke(name)
    typer.echo(f"wrote {written}: send the broker SIGHUP. `clipcast device revoke {name}` cuts off who is connected")
