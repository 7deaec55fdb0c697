"""`clipcast export`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from export.flavours import Flavour
    from export.metadata import Source
    from export.parity import Parity, Proof

ALL = "all"


def export(
    settings: Annotated[Path, typer.Argument(help="The coordinator's settings file.")] = Path("coordinator.toml"),
    *,
    data: Annotated[str, typer.Option(help="Pictures to prove the export on: a folder as clients have it, or digits.")] = "",
    out: Annotated[Path, typer.Option(help="The file to write; of several flavours, each adds its name.")] = Path(
        "model.onnx"
    ),
    flavour: Annotated[
        list[str] | None,
        typer.Option(help="fp32 (the default), fp16, int8, int8-qdq, int4, fused, adapter, or all. May be repeated."),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", help="The round whose adapter is exported; default: newest.")
    ] = None,
    client: Annotated[str, typer.Option(help="The device whose own adapter is exported, instead of the global one.")] = "",
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write only the adapter, for a base of flavour adapter that is there.")
    ] = False,
    bits: Annotated[int, typer.Option(help="What clients train against: 4, 8 or 32. For the report.")] = 4,
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures to prove it on.")] = 256,
    licence: Annotated[str, typer.Option(help="The base model's licence, where its card does not name it.")] = "",
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Write it though it differs from torch too much; the file says so.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per file.")] = False,
) -> None:
    """Merge a round's adapter into the full-precision base and write ONNX, if it says what torch says.

    Example: `clipcast export coordinator.toml --data pictures/test --out model.onnx --flavour int8`
    """
    from coordinator.config import load
    from export.artefact import export_artefacts

    config = load(settings)
    flavours = chosen(flavour or ["fp32"])
    source = source_of(config, settings, number, client, licence)
    if adapter_only:
        write_adapter(source, out, as_json=as_json)
        return
    if not data:
        raise typer.BadParameter("--data is needed: pictures to prove the export on, e.g. --data pictures/test, or digits")
    proof = proof_of(data, source, pictures)
    outs = {name: out if len(flavours) == 1 else out.with_stem(f"{out.stem}-{name}") for name in flavours}
    for name, parity in export_artefacts(source, proof, bits, outs, config.model, accept_drift=accept_drift):
        path = outs[name]
        told = {"path": str(path), "flavour": name, "bytes": path.stat().st_size, **asdict(parity)}
        typer.echo(json.dumps(told) if as_json else _line(path, name, parity))
    if not as_json:
        typer.echo(f"Next: clipcast infer {next(iter(outs.values()))} PICTURE...")


def chosen(names: Iterable[str]) -> list[Flavour]:
    """Return the flavours of these names, each once; raises a usage error that lists them."""
    from export.flavours import FLAVOURS

    wanted = dict.fromkeys(part for name in names for part in (FLAVOURS if name == ALL else (name,)))
    unknown = [name for name in wanted if name not in FLAVOURS]
    if unknown:
        raise typer.BadParameter(f"there is no flavour {unknown[0]!r}: choose of {', '.join(FLAVOURS)}, or {ALL}")
    return [name for name in FLAVOURS if name in wanted]


def source_of(config: CoordinatorConfig, settings: Path, number: int | None, client: str, licence: str) -> Source:
    """Return what a federation's round has made, the newest by default; raises FederationError."""
    from clip_lora.algebra import rank_of
    from clip_lora.towers import model_origin
    from coordinator.errors import FederationError
    from coordinator.state.store import FIRST_BANK, Store
    from export.metadata import Source
    from protocol.messages import Recipe

    store = Store(config.state, config.journal, config.keep_rounds)
    records = store.records()
    if not records:
        raise FederationError(f"{config.state} holds no finished round: `clipcast coordinator run {settings}` first")
    number = records[-1].round if number is None else number
    if not 0 <= number <= records[-1].round:
        raise FederationError(f"round {number} has no adapter in {config.state}: there are rounds 0 to {records[-1].round}")
    versions = {record.round: record.bank_version for record in records}
    bank = store.models.bank(versions.get(number, FIRST_BANK))
    adapter = store.models.own(number, client) if client else store.models.adapter(number)
    run = store.run()
    if run is None:
        raise FederationError(f"{config.state} does not say what its adapters are: restore its journal")
    said = run.identity
    shape = Recipe(rank=said.rank, alpha=said.alpha, projections=said.projections, first_block=said.first_block)
    revision, own_licence = model_origin(config.model)
    return Source(
        bank,
        adapter,
        shape.at_rank(rank_of(adapter) or said.rank),
        said.federation,
        number,
        client or None,
        revision,
        licence or own_licence,
    )


def proof_of(data: str, source: Source, count: int) -> Proof:
    """Return at most `count` pictures, evenly from all, with their class where their folder names one; raises DataError."""
    from edge_client.data import find_pictures, readable_pictures
    from export.parity import UNKNOWN, Proof

    found = readable_pictures(find_pictures(data), data)
    step = max(1, -(-len(found) // count))
    places = {name: index for index, name in enumerate(source.bank.classes)}
    taken = found[::step]
    return Proof([picture.load() for picture in taken], [places.get(picture.label, UNKNOWN) for picture in taken])


def write_adapter(source: Source, out: Path, *, as_json: bool) -> None:
    """Write the source's adapter alone."""
    from export.artefact import ADAPTER_SUFFIX, own_adapter
    from protocol.storage.files import write_atomic

    path = out if out.suffix == ADAPTER_SUFFIX else out.with_suffix(ADAPTER_SUFFIX)
    data = own_adapter(source)
    write_atomic(path, data)
    told = {"path": str(path), "bytes": len(data), "round": source.round, "client": source.client}
    typer.echo(json.dumps(told) if as_json else f"wrote {path}: {len(data) / 1e3:.0f} KB, round {source.round}")


def _line(path: Path, flavour: Flavour, parity: Parity) -> str:
    accuracy = "" if parity.accuracy is None else f", accuracy {parity.accuracy:.1%} (torch {parity.torch_accuracy:.1%})"
    return (
        f"wrote {path} ({flavour}, {path.stat().st_size / 1e6:.1f} MB): cosine to torch {parity.cosine_min:.6f} or better "
        f"on {parity.pictures} pictures, same answer on {parity.top1_agreement:.1%}{accuracy}; merged against trained "
        f"{parity.quantised_bits}-bit tower {parity.quantised_cosine_mean:.4f}"
    )
