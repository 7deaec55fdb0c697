"""Plots of a simulation: accuracy over rounds, the clients' models, who listened to whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
LABEL = 44  # characters of a recipe that a plot has room for


def plot_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write rounds.png, clients.png and, where a recipe attends, attention.png; return what was written."""
    import matplotlib as mpl

    mpl.use("Agg")
    written = [plot_rounds(rows, folder / "rounds.png"), plot_clients(rows, folder / "clients.png")]
    attending = [row for row in rows if row["seed"] == 0 and _attention(row)]
    if attending:
        written.append(plot_attention(attending, folder / "attention.png"))
    return written


def plot_rounds(rows: Sequence[Row], path: Path) -> Path:
    """Global accuracy over rounds by recipe: mean over seeds, the band from worst to best seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for recipe in _recipes(rows):
        runs = [row for row in rows if row["recipe"] == recipe]
        shares = 100 * np.array([[r["global_accuracy"] for r in run["rounds"]] for run in runs])
        numbers = [r["round"] for r in runs[0]["rounds"]]
        (line,) = axes.plot(numbers, shares.mean(axis=0), marker="o", label=_short(recipe))
        axes.fill_between(numbers, shares.min(axis=0), shares.max(axis=0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="round", ylabel="accuracy of the global model, %", xticks=numbers)
    axes.legend(fontsize="small")
    return _save(figure, path)


def plot_clients(rows: Sequence[Row], path: Path) -> Path:
    """Each client's own model on its own classes, by recipe: mean over seeds."""
    from matplotlib import pyplot as plt

    recipes = _recipes(rows)
    names = [client["client"] for client in rows[0]["clients"]]
    figure, axes = plt.subplots(figsize=(max(7, 0.7 * len(names)), 4), layout="constrained")
    width = 0.8 / len(recipes)
    for number, recipe in enumerate(recipes):
        runs = [row for row in rows if row["recipe"] == recipe]
        shares = 100 * np.array([[client["own"] for client in run["clients"]] for run in runs]).mean(axis=0)
        axes.bar(np.arange(len(names)) + number * width, shares, width, label=_short(recipe))
    axes.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names, rotation=45, ha="right", fontsize="small")
    axes.set_ylabel("accuracy on own classes, %")
    axes.legend(fontsize="small")
    return _save(figure, path)


def plot_attention(rows: Sequence[Row], path: Path) -> Path:
    """Draw the newest attention of seed 0, one heat map a recipe; the title gives the mean entropy in nats."""
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(1, len(rows), figsize=(4.5 * len(rows), 4), layout="constrained", squeeze=False)
    for axes, row in zip(grid[0], rows, strict=True):
        attention = _attention(row)
        image = axes.imshow(np.array(attention["weights"]), vmin=0, vmax=1, cmap="viridis")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{_short(row['recipe'])}\nentropy {np.mean(attention['entropy']):.2f}", fontsize="small")
        axes.set(xlabel="takes from", ylabel="client")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return _save(figure, path)


def _attention(row: Row) -> Any:
    """Return the newest attention of a run, None without any: aligning and closing rounds have none."""
    return next((r["attention"] for r in reversed(row["rounds"]) if r["attention"]), None)


def _recipes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["recipe"] for row in rows))


def _short(recipe: str) -> str:
    return recipe if len(recipe) <= LABEL else recipe[: LABEL - 3] + "..."


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
