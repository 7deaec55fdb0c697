"""Writing the settings files that `init` makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from clipcast.exit_codes import USAGE

if TYPE_CHECKING:
    from pydantic import BaseModel


def write_new(path: Path, text: str, schema: type[BaseModel], next_command: str, *, force: bool) -> None:
    """Write a settings file that loads and say what to do next; an existing file is kept unless forced.

    Raises SettingsError, writing nothing, if the options do not make usable settings.
    """
    from protocol.settings import SettingsError, parse_settings

    parse_settings(text, path, schema)
    if path.exists() and not force:
        typer.echo(f"error: {path} exists already: name another file, or --force to replace it", err=True)
        raise typer.Exit(USAGE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error}") from error
    typer.echo(f"wrote {path}. Next: {next_command}")
