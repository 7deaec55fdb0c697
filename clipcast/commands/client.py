"""`clipcast client init|enrol|run|key`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.commands.files import write_new

if TYPE_CHECKING:
    from edge_client.config import ClientConfig
    from edge_client.enrolment import NewcomerConfig
    from edge_client.monitor.guard import Guard
    from edge_client.participation import Participation
    from edge_client.trainer import Trainer
    from edge_client.work import Work
    from protocol.client_end import ClientEnd
    from protocol.messages import Status
    from protocol.trust.claims import Claim

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
    from edge_client.allocator import return_freed_memory
    from edge_client.config import load
    from edge_client.monitor.guard import Guard
    from edge_client.monitor.monitor import Monitor
    from hardware_profiles.detect import detect
    from hardware_profiles.profile import load as load_profile
    from protocol.messages import Board

    return_freed_memory()
    config = load(path)
    found = detect()
    profile = load_profile(config.profile) if config.profile else found.profile
    typer.echo(f"profile {profile.name}: {'named in the settings' if config.profile else found.reason}", err=True)
    profile.check_trains()
    about = Board(platform=found.platform.name if found.platform else None, l4t=found.board.l4t or None)

    guard = Guard(profile.thermal, Monitor().read, about)

    def prepare(done: Work | None) -> tuple[Trainer, Participation, Status]:
        from edge_client.device import new_client

        return new_client(config, profile, done, guard.report)

    take_part(config, prepare, guard)


def take_part(
    config: ClientConfig,
    prepare: Callable[[Work | None], tuple[Trainer, Participation, Status]],
    guard: Guard | None = None,
) -> None:
    """Take part until stopped. `prepare` makes what trains, once the broker has taken us in, from what the outbox holds."""
    from edge_client.outbox import Outbox
    from protocol.client_end import ClientEnd
    from protocol.link import Link
    from protocol.mqtt import MqttBus
    from protocol.trust.gate import Pinned

    outbox = Outbox(config.state)
    trust = Pinned(config.state / "coordinator.key", config.coordinator_key)
    end = ClientEnd(config.federation, config.id, random.Random(), config.state, trust)
    try:
        with metrics(config.metrics, guard, end):
            # The broker first: a wrong address should not cost the loading of torch.
            bus = MqttBus.open(config.broker, f"{config.federation}:{config.id}", end.will())
            from edge_client.participate import participate

            try:
                trainer, part, status = prepare(outbox.load())
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
            participate(link, end, trainer, part, stop, outbox, guard)
    finally:
        outbox.close()


@contextlib.contextmanager
def metrics(address: str | None, guard: Guard | None, end: ClientEnd) -> Iterator[None]:
    """Answer Prometheus meanwhile, if the settings ask for it."""
    if address is None or guard is None:
        yield
        return
    from edge_client.monitor.prometheus import serve_metrics

    close = serve_metrics(address, guard.board, lambda: end.status)
    try:
        yield
    finally:
        close()


@app.command()
def enrol(
    path: Annotated[Path, typer.Argument(help="The settings file; its section [enrolment] names the claim.")] = Path(
        "client.toml"
    ),
    *,
    wait: Annotated[float, typer.Option(help="Seconds to wait for an answer.", min=1)] = 120.0,
) -> None:
    """Become a device: make the keys here, prove the claim, get a certificate. Again is harmless.

    Example: `clipcast client enrol /etc/clipcast/client.toml`
    """
    from edge_client.enrolment import enrolled_id, load, locked
    from protocol.settings import SettingsError

    config = load(path)
    known = enrolled_id(config.state)
    if known is not None:
        typer.echo(f"this device is {known} already: nothing to do. Remove {config.state / 'enrolled'} to enrol it anew")
        return
    if os.geteuid() == 0 and config.state.exists() and config.state.stat().st_uid != 0:
        raise SettingsError(f"{config.state} belongs to another user, who could not read what root writes: run it as that")
    claim = config.claim()
    with locked(config.state):
        _ask(config, claim, wait)
    typer.echo(f"this device is {claim.id}. Next: clipcast client run {path}")


def _ask(config: NewcomerConfig, claim: Claim, wait: float) -> None:
    from edge_client.enrolment import Newcomer
    from edge_client.enrolment import enrol as ask
    from protocol.mqtt import MqttBus

    newcomer = Newcomer(config.federation, claim, config.state, config.coordinator_key)
    bus = MqttBus.open(config.door(), f"{config.federation}:enrol:{newcomer.nonce}")
    try:
        ask(bus, newcomer, wait)
    finally:
        bus.close()


@app.command()
def key(
    path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("client.toml"),
    *,
    new: Annotated[bool, typer.Option("--new", help="Make another key in its place.")] = False,
) -> None:
    """Print this device's public key, for `clipcast device add` on the coordinator. The first call makes it.

    Example: `clipcast client key client.toml`, `clipcast client key --new`
    """
    from edge_client.config import load
    from protocol.trust.signing import Signer, new_key

    config = load(path)
    if new:
        new_key(config.state / "key.pem")
        typer.echo(f"clipcast device add {config.id} KEY on the coordinator, then restart this client", err=True)
    typer.echo(Signer.open(config.state).public)
