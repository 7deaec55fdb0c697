"""`clipcast doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipcast.commands.findings import show
from clipcast.exit_codes import UNFIT, WARNINGS


def doctor(
    settings: Annotated[Path | None, typer.Argument(help="A client's settings file: its broker is measured too.")] = None,
    *,
    profile: Annotated[str, typer.Option(help="Instead of the board that is detected.")] = "",
    answers_only: Annotated[bool, typer.Option("--answers-only", help="It trains nothing: torch is not missed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Find what is wrong with this device by doing it: kernels, quantised layers, a model, the broker.

    Ends with 0 if all is well, with 14 if it works but should be mended, with 15 if this device cannot do its part.

    Example: `clipcast doctor`, `clipcast doctor client.toml --json`
    """
    from dataclasses import replace

    from edge_client.allocator import return_freed_memory
    from edge_client.config import load as load_client
    from edge_client.doctor.examination import examine
    from hardware_profiles.detect import detect
    from hardware_profiles.profile import load
    from protocol.settings import Participant

    return_freed_memory()
    client = None if settings is None else load_client(settings)
    found = detect()
    named = profile or (client.profile if client else None)
    if named:
        found = replace(found, profile=load(named), reason="named in the settings" if not profile else "named", certain=True)
    who = None if client is None else Participant(federation=client.federation, id=client.id, broker=client.broker)
    folder = Path.cwd() if client is None else client.state
    states = show(
        examine(found, who, folder, answers_only=answers_only),
        f"{found.profile.title}",
        "examining this device",
        as_json=as_json,
    )
    raise typer.Exit(UNFIT if "fail" in states else WARNINGS if "warn" in states else 0)
