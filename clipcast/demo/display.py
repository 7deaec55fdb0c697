"""The live table, the closing table and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

Row = dict[str, Any]
HEADS = ("round", "clients", "loss", "held-out accuracy", "KB up per client", "KB down per client", "seconds")


class LiveTable:
    """Rounds as they happen, and what each client is doing. Without a terminal, one line per round."""

    def __init__(self, console: Console, title: str, rounds: int) -> None:
        self._console = console
        self._title = title
        self._rounds = rounds
        self._rows: list[tuple[str, ...]] = []
        self._phases: dict[str, str] = {}
        self._note = "starting"
        self._live = Live(self._table(), console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.update(self._table())
            self._live.stop()

    def phase(self, client: str, phase: str) -> None:
        """Show what a client is doing."""
        self._phases[client] = phase
        self._refresh()

    def note(self, text: str) -> None:
        """Show what is going on besides the rounds."""
        self._note = text
        if not self._console.is_terminal:
            self._console.print(text, soft_wrap=True)
        self._refresh()

    def round(self, row: Row, clients: int) -> None:
        """Show a finished round."""
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        cells = (
            f"{row['round']}/{self._rounds}",
            f"{row['accepted']} accepted, {row['rejected']} rejected",
            loss,
            f"{row['accuracy']:.1%}",
            f"{row['bytes_up'] / clients / 1000:.0f}",
            f"{row['bytes_down'] / clients / 1000:.0f}",
            f"{row['seconds']:.1f}",
        )
        self._rows.append(cells)
        if not self._console.is_terminal:
            self._console.print(
                "  ".join(f"{head}: {cell}" for head, cell in zip(HEADS, cells, strict=True)), soft_wrap=True
            )
        self._refresh()

    def _refresh(self) -> None:
        if self._console.is_terminal:
            self._live.update(self._table())

    def _table(self) -> Table:
        phases = ", ".join(f"{client} {phase}" for client, phase in sorted(self._phases.items()))
        table = Table(*HEADS, title=self._title, caption=f"{self._note}\n{phases}", caption_justify="left")
        for cells in self._rows:
            table.add_row(*cells)
        return table


def show_report(console: Console, report: Row) -> None:
    """Print the closing table."""
    rounds, onnx, alone = report["rounds"], report["onnx"], report["local_only"]
    clients = report["settings"]["clients"]
    table = Table("what", "result", title="Held-out accuracy, the same pictures for all", title_justify="left")
    table.add_row("zero-shot", f"{report['zero_shot']:.1%}")
    for number, share in enumerate(alone["clients"], 1):
        table.add_row(f"client-{number} alone", f"{share:.1%}")
    table.add_row("alone, mean", f"{alone['mean']:.1%}")
    table.add_row("federated", f"[bold]{report['federated']:.1%}[/bold]")
    table.add_row("federated, ONNX", f"{onnx['accuracy']:.1%}")
    table.add_section()
    count = max(len(rounds), 1)
    table.add_row("KB up per client and round", f"{sum(r['bytes_up'] for r in rounds) / count / clients / 1000:.0f}")
    table.add_row("KB down per client and round", f"{sum(r['bytes_down'] for r in rounds) / count / clients / 1000:.0f}")
    table.add_row("seconds per round", f"{sum(r['seconds'] for r in rounds) / count:.1f}")
    table.add_row("ONNX against torch", f"cosine {onnx['cosine']:.6f} at worst, same answer on {onnx['top1_agreement']:.1%}")
    table.add_row("ONNX speed", f"{onnx['ms_per_image']:.1f} ms a picture")
    table.add_row("seconds in all", f"{report['seconds']:.0f}")
    console.print(table)


def plot_rounds(report: Row, path: Path) -> None:
    """Write accuracy and loss over rounds as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rounds = report["rounds"]
    numbers = [0, *(row["round"] for row in rounds)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(numbers, [report["zero_shot"], *(row["accuracy"] for row in rounds)], marker="o", label="federated")
    left.axhline(report["local_only"]["mean"], linestyle="--", color="tab:orange", label="each alone, mean")
    left.axhline(report["zero_shot"], linestyle=":", color="tab:grey", label="zero-shot")
    left.set(xlabel="round", ylabel="held-out accuracy", ylim=(0, 1), title=report["settings"]["partition"])
    left.legend(loc="lower right")
    trained = [row for row in rounds if row["loss"] is not None]
    right.plot([row["round"] for row in trained], [row["loss"] for row in trained], marker="o", color="tab:red")
    right.set(xlabel="round", ylabel="clients' training loss", title=f"{report['settings']['bits']}-bit base")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
