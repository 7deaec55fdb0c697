"""`clipcast client init|run|key`."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from clipcast.commands.files import write_new

app = typer.Typer(help="An edge client: trains a LoRA adapter on pictures that never leave the device.")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("client.toml"),
    *,
    client_id: Annotated[str, typer.Option("--id", help="Unique name of this device.")] = "device-1",
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "lab",
    data: Annotated[str, typer.Option(help="Folder with one sub-folder of pictures per class, or digits.")] = "digits",
    broker: Annotated[str, typer.Option(help="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")] = "mqtt://localhost:1883",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented settings file that works.

    Example: `clipcast client init --id jetson-1 --federation lab --data pictures --broker mqtt://labserver`
    """
    from edge_client.config import DIGITS, TEMPLATE, ClientConfig

    where = data if data == DIGITS else str(Path(data).expanduser().absolute())
    text = TEMPLATE.format(file=path, id=client_id, federation=federation, data=where, broker=broker)
    write_new(path, text, ClientConfig, f"clipcast client run {path}", force=force)


@app.command()
def run(path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("client.toml")) -> None:
    """Take part in the federation until stopped (Ctrl-C or SIGTERM).

    Example: `clipcast client run client.toml`
    """
    from edge_client.config import load
    from edge_client.outbox import Outbox
    from hardware_profiles.detect import detect
    from hardware_profiles.profile import load as load_profile
    from protocol.client_end import ClientEnd
    from protocol.gate import Pinned
    from protocol.link import Link
    from protocol.mqtt import MqttBus

    config = load(path)
    if config.profile:
        profile, reason = load_profile(config.profile), "named in the settings"
    else:
        found = detect()
        profile, reason = found.profile, found.reason
    typer.echo(f"profile {profile.name}: {reason}", err=True)
    outbox = Outbox(config.state)
    trust = Pinned(config.state / "coordinator.key", config.coordinator_key)
    end = ClientEnd(config.federation, config.id, random.Random(), config.state, trust)
    # The broker first: a wrong address should not cost the loading of torch.
    bus = MqttBus.open(config.broker, f"{config.federation}:{config.id}", end.will())
    from edge_client.device import new_client
    from edge_client.participate import participate

    try:
        trainer, part, status = new_client(config, profile, outbox.load())
    except BaseException:
        bus.close(end.farewell())
        raise
    end.announce(status)
    stop, link = threading.Event(), Link(bus, end)

    def leave(*_: object) -> None:
        stop.set()
        link.wake()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    try:
        participate(link, end, trainer, part, stop, outbox)
    finally:
        outbox.close()


@app.command()
def key(path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("client.toml")) -> None:
    """Print this device's public key, for `clipcast device add` on the coordinator. The first call makes it.

    Example: `clipcast client key client.toml`
    """
    from edge_client.config import load
    from protocol.signing import Signer

    typer.echo(Signer.open(load(path).state).public)
