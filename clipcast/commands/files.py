"""Writing the settings files that `init` makes."""

from __future__ import annotations

from pathlib import Path

import typer

from clipcast.exit_codes import USAGE


def write_new(path: Path, text: str, next_command: str, *, force: bool) -> None:
    """Write a settings file and say what to do next; an existing file is kept unless forced."""
    if path.exists() and not force:
        typer.echo(f"error: {path} exists already: name another file, or --force to replace it", err=True)
        raise typer.Exit(USAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {path}. Next: {next_command}")
