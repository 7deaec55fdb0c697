"""A simulation, told in order: pictures and model once, recipes x seeds, results, table, plots."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from queue import Empty
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from clipcast.simulate.plots import plot_all
from clipcast.simulate.report import HEADS, cells, markdown
from clipcast.simulate.run import Bench, Row
from clipcast.simulate.settings import SimulateSettings
from coordinator.recipe import parse_recipe
from protocol.settings import SettingsError
from protocol.storage.files import write_atomic

POLL_S = 0.5
_worker: dict[str, Any] = {}


def simulate(settings: SimulateSettings, *, as_json: bool = False) -> list[Row]:
    """Run every recipe on every seed; write results.json, results.md and plots below `settings.out`."""
    started = time.monotonic()
    console = Console(stderr=True)
    tasks = [(recipe, seed) for recipe in settings.recipes for seed in range(settings.seeds)]
    rows: list[Row] = []
    try:  # now, not after hours of work
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {settings.out}: no folder can be made there ({error}): name another") from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("loading", total=sum(rounds_of(settings, recipe) for recipe, _ in tasks))
        for event in _runs(settings, tasks):
            if isinstance(event, dict):
                rows.append(event)
                rows.sort(key=lambda row: tasks.index((row["recipe"], row["seed"])))
                _write_rows(settings, rows)  # what is done stays, whatever comes of the next run
                bar.console.print(
                    f"{event['recipe']} seed {event['seed']}: global {event['global_accuracy']:.1%}, "
                    f"personal {event['personal_accuracy']:.1%}",
                    soft_wrap=True,
                )
            else:
                bar.update(task, advance=1, description=f"{event} rounds")
    write_atomic(settings.out / "results.md", (headline(settings) + "\n\n" + markdown(rows)).encode())
    written = [settings.out / "results.json", settings.out / "results.md", *plot_all(rows, settings.out)]
    if as_json:
        print(json.dumps(rows))  # noqa: T201 - the command's output
    else:
        table = Table(*HEADS, title=headline(settings), title_justify="left")
        for line in cells(rows):
            table.add_row(*line)
        Console().print(table)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f} s")
    return rows


def _write_rows(settings: SimulateSettings, rows: list[Row]) -> None:
    write_atomic(settings.out / "results.json", (json.dumps(rows, indent=1) + "\n").encode())


def rounds_of(settings: SimulateSettings, recipe: str) -> int:
    """Return how many rounds a recipe has, its aligning and its closing round included."""
    return settings.rounds + parse_recipe(recipe).rounds_after


def headline(settings: SimulateSettings) -> str:
    """Return what was simulated, on which machine and when, in a line."""
    shots = "all pictures" if settings.shots is None else f"{settings.shots} pictures a class over all clients"
    return (
        f"{settings.data}: {settings.model}, {settings.bits}-bit, {settings.clients} clients, {settings.partition}, "
        f"{shots}, rounds: {settings.rounds}, seeds: {settings.seeds}, {settings.split} pictures. {platform.machine()}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def _runs(settings: SimulateSettings, tasks: list[tuple[str, int]]) -> Iterator[str | Row]:
    """Yield a recipe's name after each of its rounds, and its row at its end."""
    if settings.jobs == 1:
        torch.set_num_threads(settings.threads)
        bench = Bench.open(settings)
        for recipe, seed in tasks:
            yield from bench.run(recipe, seed)
        return
    context = multiprocessing.get_context("spawn")
    with multiprocessing.Manager() as manager:
        rounds = manager.Queue()
        with ProcessPoolExecutor(settings.jobs, context, _open_bench, (settings, rounds)) as pool:
            pending: set[Future[Row]] = {pool.submit(_run_in_worker, recipe, seed) for recipe, seed in tasks}
            while pending:
                with contextlib.suppress(Empty):
                    yield rounds.get(timeout=POLL_S)
                for done in [future for future in pending if future.done()]:
                    pending.remove(done)
                    yield done.result()
            while not rounds.empty():
                yield rounds.get()


def _open_bench(settings: SimulateSettings, rounds: Any) -> None:
    torch.set_num_threads(settings.threads)
    _worker.update(bench=Bench.open(settings), rounds=rounds)


def _run_in_worker(recipe: str, seed: int) -> Row:
    for event in _worker["bench"].run(recipe, seed):
        if isinstance(event, dict):
            return event
        _worker["rounds"].put(event)
    raise AssertionError("a run ends with its row")
