"""`clipcast coordinator init|run|key|rounds`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.commands.files import write_new

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from coordinator.model import Model
    from coordinator.records import RoundRecord

app = typer.Typer(help="The lab server: broadcasts class banks and adapters, collects and aggregates updates.")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("coordinator.toml"),
    *,
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "lab",
    classes: Annotated[str, typer.Option(help="Class names, separated by commas.")] = (
        "zero,one,two,three,four,five,six,seven,eight,nine"
    ),
    broker: Annotated[str, typer.Option(help="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")] = "mqtt://localhost:1883",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented settings file that works.

    Example: `clipcast coordinator init --federation lab --classes "cat,dog,fox" --broker mqtt://labserver`
    """
    from coordinator.config import TEMPLATE, CoordinatorConfig

    names = ", ".join(json.dumps(name.strip(), ensure_ascii=False) for name in classes.split(","))
    text = TEMPLATE.format(file=path, federation=federation, classes=names, broker=broker)
    write_new(path, text, CoordinatorConfig, f"clipcast coordinator run {path}", force=force)


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("coordinator.toml"),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print each round's record as a JSON line.")] = False,
) -> None:
    """Run the federation to its last round; a restart continues after the last finished round. Releases go out meanwhile.

    Example: `clipcast coordinator run coordinator.toml`
    """
    from coordinator.config import load
    from coordinator.model_process import ModelProcess
    from coordinator.releases.desk import desk

    config = load(path)
    with admitting(config), desk(config), ModelProcess(config.model) as model:
        for record in conduct(config, model):
            typer.echo(record.model_dump_json() if as_json else _line(record))


def admitting(config: CoordinatorConfig) -> AbstractContextManager[object]:
    """Answer boards that ask to be enrolled meanwhile, if the settings name an authority."""
    if config.authority is None:
        return nullcontext()
    from coordinator.enrolment import registrar

    return registrar(config, config.authority)


def conduct(config: CoordinatorConfig, model: Model) -> Iterator[RoundRecord]:
    """Run a federation to its last round; yield a record after each. Raises whatever keeps it from going on."""
    from protocol.mqtt import MqttBus
    from protocol.topics import Topics

    Topics(config.federation)
    from coordinator.rounds import Federation
    from coordinator.state.devices import Devices
    from coordinator.state.store import Store
    from protocol.coordinator_end import CoordinatorEnd
    from protocol.link import Link

    # The lock before the broker, which would throw out a coordinator at work for one of its name.
    store = Store(config.state, config.journal, config.keep_rounds)
    store.prepare()
    # The broker before the model: a wrong address should not cost the loading of one.
    try:
        bus = MqttBus.open(config.broker, f"{config.federation}:coordinator")
    except BaseException:
        store.close()
        raise
    try:
        devices = Devices(store, config.admission)
        end = CoordinatorEnd(
            config.federation,
            random.Random(),
            uploads_at_once=config.uploads_at_once,
            state=config.state,
            trust=devices,
            seal_updates=config.seal_updates,
        )
        bank = model.bank(config.classes, config.templates)
        federation = Federation(config, bank, Link(bus, end), end, store, devices, model=model)
        if not config.recipe.text.steps:
            model.close()  # it has no more to do
        yield from federation.run()
    finally:
        bus.close()
        store.close()


@app.command()
def key(
    path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("coordinator.toml"),
    *,
    new: Annotated[bool, typer.Option("--new", help="Make another key; the old one signs it and is destroyed.")] = False,
) -> None:
    """Print the coordinator's public key; clients pin it as `coordinator_key`. The first call makes it.

    Example: `clipcast coordinator key coordinator.toml`, `clipcast coordinator key --new`
    """
    from coordinator.config import load
    from protocol.trust.signing import Signer
    from protocol.trust.succession import rotate

    config = load(path)
    if new:
        typer.echo(rotate(config.state, config.federation))
        typer.echo("restart the coordinator: clients follow by themselves, now or when they return", err=True)
    else:
        typer.echo(Signer.open(config.state).public)


@app.command()
def rounds(
    path: Annotated[Path, typer.Argument(help="The settings file.")] = Path("coordinator.toml"),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print each round's whole record as a JSON line.")] = False,
) -> None:
    """Show the rounds so far, and what the open one has; also while the coordinator runs.

    Example: `clipcast coordinator rounds coordinator.toml`
    """
    from coordinator.config import load
    from coordinator.state.store import Store

    config = load(path)
    store = Store(config.state, config.journal, config.keep_rounds)
    records, now = store.records(), store.progress()
    for record in records:
        typer.echo(record.model_dump_json() if as_json else _line(record))
    if as_json:
        return
    if now is not None:
        waits = ", ".join(now.awaited) or "nobody"
        typer.echo(
            f"round {now.round}: open, {len(now.accepted)} accepted, {now.rejected} rejected, no update yet of {waits}"
        )
    elif not records:
        typer.echo(f"no round yet in {config.state}: `clipcast coordinator run {path}` begins the first")


def _line(record: RoundRecord) -> str:
    """Say how a round went."""
    loss = "no loss told" if record.loss is None else f"loss {record.loss:.3f}"
    spent = f", epsilon up to {max(record.epsilon.values()):.2f}" if record.epsilon else ""
    outcome = f"{record.outcome} ({record.problem})" if record.problem else record.outcome
    return (
        f"round {record.round}: {outcome}, {len(record.accepted)} accepted, {len(record.rejected)} rejected, "
        f"{loss}{spent}, {record.seconds:.1f} s, {sum(record.bytes_up.values()) / 1e6:.2f} MB up "
        f"-> adapter {record.adapter_sha256[:12]}"
    )
