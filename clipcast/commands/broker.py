"""`clipcast broker config|check`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from clipcast.commands.findings import show
from clipcast.exit_codes import BROKER, WARNINGS

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
    from coordinator.broker.authority import CRL
    from coordinator.broker.emqx import emqx
    from coordinator.broker.mosquitto import mosquitto
    from protocol.settings import SettingsError
    from protocol.storage.files import write_atomic

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
    if kind is Kind.MOSQUITTO:
        typer.echo(
            f"Next: mosquitto -c {folder / 'mosquitto.conf'}. Started by root it drops to the user mosquitto, who must be "
            f"able to read the broker's key: chown mosquitto {ca / f'{server}.key'}"
        )
    if not (ca / f"{server}.pem").exists():
        typer.echo(f"its certificate is missing: clipcast ca issue {server} {ca} --host HOST", err=True)
    elif kind is Kind.MOSQUITTO and not (ca / CRL).exists():
        typer.echo(f"{ca / CRL} is missing: restore it, or remove the line `crlfile`", err=True)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="A coordinator's or client's settings file, or mqtt[s]://HOST[:PORT].")],
    *,
    federation: Annotated[str, typer.Option(help="With an address: name of the federation.")] = "lab",
    identity: Annotated[
        str, typer.Option("--id", help="With an address: as whom; coordinator, or a device's id.")
    ] = "coordinator",
    username: Annotated[str | None, typer.Option(help="With an address.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="With an address.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="With an address: the broker's authority.")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="With an address: our certificate.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="With an address: its key.")] = None,
    tls_version: Annotated[str, typer.Option(help="With an address: the oldest TLS that is spoken.")] = "1.3",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Measure a broker: what it carries, how fast, and whom it lets do what. It leaves nothing behind.

    Ends with 0 if all is well, with 14 if it works but should be mended, with 4 if it cannot carry a federation.

    Example: `clipcast broker check coordinator.toml`, `clipcast broker check mqtt://labserver`
    """
    from protocol.broker.check import check as findings_of
    from protocol.settings import Participant, load_settings, settings_of
    from protocol.topics import check_name

    if "://" in target:
        own = {"username": username, "password_file": password_file, "ca_file": ca_file, "cert_file": cert_file}
        broker = {"url": target, **own, "key_file": key_file, "tls_version": tls_version}
        who = settings_of({"federation": federation, "id": identity, "broker": broker}, Participant)
    else:
        who = load_settings(Path(target), Participant, "clipcast coordinator init")
    check_name(who.federation, "federation")
    check_name(who.id, "id")
    title = f"{who.broker.url} as {who.id} of {who.federation}"
    states = show(findings_of(who.broker, who.federation, who.id), title, f"measuring {who.broker.url}", as_json=as_json)
    raise typer.Exit(BROKER if "fail" in states else WARNINGS if "warn" in states else 0)
