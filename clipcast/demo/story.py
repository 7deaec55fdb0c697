"""The demo, told in order: pictures, broker, federation, baselines, export, answers, report."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from clipcast.demo.baselines import Alone, Evaluator, all_alone
from clipcast.demo.broker import embedded_broker
from clipcast.demo.display import LiveTable, plot_rounds, show_report
from clipcast.demo.pictures import Layout, lay_out
from clipcast.demo.processes import Process, running, write_settings
from clipcast.demo.settings import DemoSettings
from clipcast.exit_codes import INTERRUPTED
from coordinator.records import RoundRecord
from coordinator.state.store import FIRST_BANK, Store
from edge_client.inference.answering import Answering
from edge_client.inference.model import Model
from edge_client.inference.pictures import read_picture
from export.artefact import export_artefact
from export.metadata import Source
from export.parity import Proof
from protocol.events import ClientSeen
from protocol.link import Link
from protocol.mqtt import MqttBus
from protocol.observer import Observer
from protocol.settings import BrokerSettings, SettingsError
from protocol.storage.files import write_atomic

POLL_S = 0.5
PARITY_PICTURES = 64
MARK = ".clipcast-demo"
Report = dict[str, Any]


def run(settings: DemoSettings, *, as_json: bool = False) -> Report:
    """Run the demo, write its files below `settings.out`, return and show the report."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))  # so that the processes below are stopped as well
    console = Console(stderr=as_json)
    _clear(settings)
    layout = lay_out(settings)
    console.print(
        f"{layout.train_pictures} pictures of {len(layout.classes)} classes for {settings.clients} clients "
        f"({settings.partition}), {layout.held_out_pictures} held out. Everything is written to {settings.out}",
        soft_wrap=True,
    )
    store = Store(settings.out / "state")
    title = f"Federation of {settings.clients} clients, {settings.bits}-bit tiny-clip"
    with LiveTable(console, title, settings.last_round) as table:
        if settings.broker is None:
            with embedded_broker(settings.out) as url:
                rounds, evaluator = _federate(settings, layout, store, url, table)
        else:
            rounds, evaluator = _federate(settings, layout, store, settings.broker, table)
        table.note("each client alone, the same number of steps")
        first, start = store.models.bank(FIRST_BANK), store.models.adapter(0)
        zero_shot = evaluator.accuracy(start, first)
        alone = all_alone(
            [
                Alone(
                    home,
                    layout.held_out,
                    first,
                    start,
                    settings.recipe,
                    settings.bits,
                    settings.rounds,
                    settings.seed,
                )
                for home in layout.clients
            ]
        )
        table.note("export to ONNX and answers on the held-out pictures")
        onnx = _export_and_answer(settings, layout, store)
        table.note("done")
    report: Report = {
        "zero_shot": zero_shot,
        "local_only": {"clients": alone, "mean": sum(alone) / len(alone)},
        "federated": rounds[-1]["accuracy"] if rounds else zero_shot,
        "rounds": rounds,
        "onnx": onnx,
        "settings": _describe(settings, layout),
        "seconds": time.monotonic() - started,
    }
    write_atomic(settings.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    plot_rounds(report, settings.out / "rounds.png")
    if as_json:
        print(json.dumps(report))  # noqa: T201 - the command's output
    show_report(console, report)
    for name in ("report.json", "rounds.png", "model.onnx"):
        console.print(f"wrote {settings.out / name}", soft_wrap=True)
    picture = next(iter(sorted(layout.held_out.rglob("*.*"))))
    console.print(f"Next: {_command()} infer {settings.out / 'model.onnx'} {picture}", soft_wrap=True)
    return report


def _federate(
    settings: DemoSettings, layout: Layout, store: Store, url: str, table: LiveTable
) -> tuple[list[Report], Evaluator]:
    """Run coordinator and clients to the end; evaluate each global adapter as it appears."""
    coordinator, clients = write_settings(settings, layout, url)
    commands = [("coordinator", ("coordinator", "run", str(coordinator)))]
    commands += [(path.stem, ("client", "run", str(path))) for path in clients]
    rounds: list[Report] = []
    with running(commands, settings.out / "logs") as processes:
        bus = MqttBus.open(BrokerSettings(url=url), f"{settings.federation}:observer")
        try:
            table.note("loading models")
            _await_first_state(store, processes, Link(bus, Observer(settings.federation)), table)
            evaluator = Evaluator.load(store.models.bank(FIRST_BANK), settings.bits, settings.recipe, layout.held_out)
            table.note("rounds are running")
            for record in _records(settings.last_round, store, processes, Link(bus, Observer(settings.federation)), table):
                accuracy = evaluator.accuracy(store.models.adapter(record.round), store.models.bank(record.bank_version))
                rounds.append(_row(record, accuracy))
                table.round(rounds[-1], settings.clients)
        finally:
            bus.close()
    return rounds, evaluator


def _command() -> str:
    """Return how to call clipcast from here: by its name if the shell finds it."""
    return "clipcast" if shutil.which("clipcast") else str(Path(sys.executable).with_name("clipcast"))


def _await_first_state(store: Store, processes: list[Process], link: Link[ClientSeen], table: LiveTable) -> None:
    """Wait until the coordinator has saved its class bank and the initial adapter; its failure ends the wait."""
    while store.models.knowledge() is None:
        _watch(processes, link, table)


def _records(
    rounds: int, store: Store, processes: list[Process], link: Link[ClientSeen], table: LiveTable
) -> Iterator[RoundRecord]:
    """Yield each round's record as it appears; the coordinator bounds the wait, and its failure ends it."""
    done = 0
    while done < rounds:
        for record in store.records()[done:]:
            done += 1
            yield record
        if done < rounds:
            _watch(processes, link, table)


def _watch(processes: list[Process], link: Link[ClientSeen], table: LiveTable) -> None:
    for process in processes:
        process.check()
    for seen in link.poll(POLL_S):
        table.phase(seen.client, seen.status.phase)


def _row(record: RoundRecord, accuracy: float) -> Report:
    return {
        "round": record.round,
        "outcome": record.outcome,
        "accuracy": accuracy,
        "loss": record.loss,
        "seconds": record.seconds,
        "bytes_up": sum(record.bytes_up.values()),
        "bytes_down": sum(record.bytes_down.values()),
        "accepted": len(record.accepted),
        "rejected": len(record.rejected),
    }


def _export_and_answer(settings: DemoSettings, layout: Layout, store: Store) -> Report:
    """Export the last global adapter and classify the held-out pictures with onnxruntime."""
    last = store.records()[-1]
    number, bank, adapter = last.round, store.models.bank(last.bank_version), store.models.adapter(last.round)
    files = sorted(file for file in layout.held_out.rglob("*.*") if file.parent.parent == layout.held_out)
    chosen = [_open(file) for file in files[:: max(1, len(files) // PARITY_PICTURES)]]
    path = settings.out / "model.onnx"
    source = Source(bank, adapter, settings.recipe, settings.federation, number)
    parity = export_artefact(source, Proof(chosen), settings.bits, path)
    answering = Answering(Model.open(path))
    answers = [(file.parent.name, answering.classify(read_picture(file))) for file in files]
    return {
        "path": str(path),
        "cosine": parity.cosine_min,
        "top1_agreement": parity.top1_agreement,
        "ms_per_image": sum(answer.milliseconds for _, answer in answers) / len(answers),
        "accuracy": sum(label == answer.labels[0] for label, answer in answers) / len(answers),
        "parity": asdict(parity),
    }


def _open(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        rgb: Image.Image = picture.convert("RGB")
        return rgb


def _describe(settings: DemoSettings, layout: Layout) -> Report:
    described = {key: value for key, value in asdict(settings).items() if key != "recipe"}
    return {
        **described,
        "out": str(settings.out),
        "recipe": settings.recipe.model_dump(mode="json"),
        "model": "tiny-clip",
        "classes": list(layout.classes),
        "train_pictures": layout.train_pictures,
        "held_out_pictures": layout.held_out_pictures,
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
    }


def _clear(settings: DemoSettings) -> None:
    """Empty the folder of an earlier demo; any other folder that holds something is refused, and left alone."""
    out = settings.out
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SettingsError(f"--out {out} holds files that are not an earlier demo's: name a new or empty folder")
    if out in (Path(settings.data).absolute(), *Path(settings.data).absolute().parents):
        raise SettingsError(f"--data {settings.data} lies inside --out {out}, which the demo empties: name another --out")
    for name in ("pictures", "state", "clients", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
