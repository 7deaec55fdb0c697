"""What a simulation says: results.json, and a table of mean and standard deviation over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
HEADS = (
    "recipe",
    "global",
    "personal, own classes",
    "personal, all classes",
    "KB up",
    "KB down",
    "s a round",
)
SHARES = ("global_accuracy", "personal_accuracy", "personal_all_classes")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a line of the table for each recipe, in the order of its first run."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    return [_line(recipe, [row for row in rows if row["recipe"] == recipe]) for recipe in recipes]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as Markdown: percent, mean ± standard deviation over seeds; KB and seconds a client and round."""
    lines = [HEADS, ("---",) * len(HEADS), *cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _line(recipe: str, rows: Sequence[Row]) -> tuple[str, ...]:
    shares = [spread([100 * row[key] for row in rows]) for key in SHARES]
    traffic = [f"{mean(row[key] for row in rows) / 1000:.0f}" for key in ("bytes_up", "bytes_down")]
    return (recipe, *shares, *traffic, f"{mean(row['seconds'] for row in rows):.1f}")


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, the latter if there is more than one value."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
