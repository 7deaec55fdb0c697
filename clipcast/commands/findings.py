"""Findings on the terminal: a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from protocol.findings import Finding

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "unknown": "dim"}


def show(findings: Iterator[Finding], title: str, what: str, *, as_json: bool) -> set[str]:
    """Print findings, as JSON or as a table once all are there, with what was measured last meanwhile; return the states."""
    from rich.console import Console
    from rich.table import Table

    found = []
    with Console(stderr=True).status(what) as status:
        for finding in findings:
            found.append(finding)
            status.update(f"{what}: {finding.name} {finding.state}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        table = Table(title=title, title_justify="left")
        for column in ("", "measured", "", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in found:
            state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
            table.add_row(finding.name, finding.measured.replace("[", r"\["), state, finding.cure.replace("[", r"\["))
        Console().print(table)
    return {finding.state for finding in found}
