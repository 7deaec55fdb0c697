"""`clipcast export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def export(
    settings: Annotated[Path, typer.Argument(help="The coordinator's settings file.")] = Path("coordinator.toml"),
    *,
    data: Annotated[str, typer.Option(help="Pictures to prove the export on: a folder as clients have it, or digits.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.onnx"),
    number: Annotated[
        int | None, typer.Option("--round", help="The round whose adapter is exported; default: newest.")
    ] = None,
    bits: Annotated[int, typer.Option(help="What clients train against: 4, 8 or 32. For the report.")] = 4,
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures to prove it on.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the parity report as JSON.")] = False,
) -> None:
    """Merge a round's global adapter into the full-precision base and write ONNX, if it says what torch says.

    Example: `clipcast export coordinator.toml --data pictures/test --out model.onnx`
    """
    from coordinator.config import load
    from coordinator.errors import FederationError
    from coordinator.state.store import FIRST_BANK, Store
    from edge_client.data import find_pictures, readable_pictures
    from export.artefact import Source, export_artefact

    config = load(settings)
    store = Store(config.state, config.journal, config.keep_rounds)
    records = store.records()
    if not records:
        raise FederationError(f"{config.state} holds no finished round: `clipcast coordinator run {settings}` first")
    number = records[-1].round if number is None else number
    if not 0 <= number <= records[-1].round:
        raise FederationError(f"round {number} has no adapter in {config.state}: there are rounds 0 to {records[-1].round}")
    found = readable_pictures(find_pictures(data), data)
    chosen = [picture.load() for picture in found[:: max(1, len(found) // pictures)][:pictures]]
    versions = {record.round: record.bank_version for record in records}
    bank = store.bank(versions.get(number, FIRST_BANK))
    adapter = store.adapter(number)
    run = store.run()
    if run is None:
        raise FederationError(f"{config.state} does not say what its adapters are: restore its journal")
    source = Source(bank, adapter, run.identity, run.identity.federation, number)
    parity = export_artefact(source, chosen, bits, out, config.model)
    if as_json:
        typer.echo(json.dumps({"path": str(out), **asdict(parity)}))
        return
    typer.echo(
        f"wrote {out}: cosine to torch {parity.cosine_min:.6f} or better on {parity.pictures} pictures, same answer on "
        f"{parity.top1_agreement:.1%}; merged against trained {parity.quantised_bits}-bit "
        f"tower {parity.quantised_cosine_mean:.4f}"
    )
    typer.echo(f"Next: clipcast infer {out} PICTURE...")
