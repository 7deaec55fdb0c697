"""`clipcast release create|status|pause|resume|abort|rollback|run`."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcast.commands.release_view import as_record, show, some, where

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from coordinator.releases.orders import Orders
    from coordinator.state.store import Store
    from protocol.messages import TextBank
    from protocol.release.manifests import Health, Smoke
    from protocol.release.rings import Ring

app = typer.Typer(help="Send models out to devices, a few at first: each tries a model out, and goes back if it is worse.")

Settings = Annotated[Path, typer.Argument(help="The coordinator's settings file.")]
SETTINGS = Path("coordinator.toml")
HOUR = 3600.0


@app.command()
def create(
    settings: Settings = SETTINGS,
    *,
    model: Annotated[Path, typer.Option(help="The artefact: an ONNX file made by `clipcast export`.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter on top of it, an .onnx_adapter file.")] = None,
    classes_from: Annotated[
        str, typer.Option(help="Other classes than the artefact's: those of a round, by its number, or `newest`.")
    ] = "",
    picture: Annotated[
        Path | None, typer.Option(help="The picture that devices are tried with; default: a drawing.")
    ] = None,
    profiles: Annotated[str, typer.Option(help="Kinds of devices that it is for, by commas; default: all.")] = "",
    rings: Annotated[str, typer.Option(help="Who gets it one after the other: devices, then shares.")] = "1,10%,100%",
    ring_timeout_s: Annotated[
        float | None, typer.Option(help="So long a silent device is waited for; default: an hour and the health window.")
    ] = None,
    max_failure_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="More failures among those that are done stop it; the first ring allows none."),
    ] = 0.2,
    health_window_s: Annotated[float | None, typer.Option(help="So long a device watches it after the switch.")] = None,
    health_min_answers: Annotated[int | None, typer.Option(help="And so many answers at least.")] = None,
    health_max_error_share: Annotated[float | None, typer.Option(help="More failing answers: it goes back.")] = None,
    health_max_latency_ratio: Annotated[
        float | None, typer.Option(help="Slower than the model before: it goes back.")
    ] = None,
    health_min_agreement: Annotated[
        float | None, typer.Option(help="Fewer answers as the model before: it goes back.")
    ] = None,
    note: Annotated[str, typer.Option(help="A sentence for whoever looks.")] = "",
    version: Annotated[int | None, typer.Option(help="Its number, above all before; default: the next.")] = None,
) -> None:
    """Make a release: keep a copy of its files, try it out here, and announce it to the first ring.

    Example: `clipcast release create coordinator.toml --model model.onnx --picture cat.jpg --rings 1,10%,100%`
    """
    from clipcast.smoke import smoke_of
    from coordinator.releases.orders import Draft
    from edge_client.errors import InferenceError
    from protocol.settings import SettingsError

    config, store = _open(settings)
    told = {
        "window_s": health_window_s,
        "min_answers": health_min_answers,
        "max_error_share": health_max_error_share,
        "max_latency_ratio": health_max_latency_ratio,
        "min_agreement": health_min_agreement,
    }
    health = _health(told)
    timeout = HOUR + health.window_s if ring_timeout_s is None else ring_timeout_s
    if not 0 < timeout < float("inf"):
        raise SettingsError(f"--ring-timeout-s {timeout}: a number of seconds above 0")
    draft = Draft(
        model,
        _rings(rings),
        adapter,
        _bank(store, classes_from) if classes_from else None,
        _profiles(profiles),
        health,
        timeout,
        max_failure_share,
        note,
        version,
    )

    def try_out(artefact: Path, own: Path | None, bank: TextBank | None) -> Smoke:
        try:
            return smoke_of(artefact, own, bank, picture, config.classes)
        except InferenceError as error:  # the operator knows the file by the name that was given
            raise InferenceError(str(error).replace(str(artefact), str(model))) from error

    entry = _orders(config, store).make(draft, try_out)
    typer.echo(f"release {entry.version} is announced: {where(entry)}. The picture is {entry.rollout.release.smoke.label!r}")
    _warn_of_newer(store)
    typer.echo(
        f"Next: clipcast release status {settings}. A desk sends it out: `clipcast coordinator run`, or `release run`"
    )


@app.command()
def status(
    settings: Settings = SETTINGS,
    *,
    devices: Annotated[bool, typer.Option("--devices", help="List each device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show how the newest release stands: its ring, how many devices are in each phase, and which have failed, and why.

    Example: `clipcast release status coordinator.toml`
    """
    from coordinator.releases.summary import summary
    from protocol.release.desk_end import FOLDER
    from protocol.storage.files import is_locked

    config, store = _open(settings)
    found = summary(store.releases, store.registry)
    if as_json:
        typer.echo(json.dumps(None if found is None else as_record(found)))
    elif found is None:
        typer.echo(f"no release yet: `clipcast release create {settings} --model model.onnx` makes the first")
    else:
        show(found, devices=devices)
        _warn_of_newer(store)
        if is_locked(config.state / FOLDER) is False:
            typer.echo("no desk is at work: nothing goes out before `clipcast coordinator run`, or `clipcast release run`")


@app.command()
def pause(settings: Settings = SETTINGS) -> None:
    """Let no further device switch to the newest release; who has switched goes on.

    Example: `clipcast release pause coordinator.toml`
    """
    entry = _orders(*_open(settings)).pause()
    typer.echo(f"release {entry.version} is paused: `clipcast release resume` or `abort`")


@app.command()
def resume(settings: Settings = SETTINGS) -> None:
    """Let a paused release go on, also one that stopped by itself: who has failed so far counts no more.

    Example: `clipcast release resume coordinator.toml`
    """
    entry = _orders(*_open(settings)).resume()
    excused = ", ".join(entry.rollout.excused)
    typer.echo(f"release {entry.version} goes on: {where(entry)}" + (f". No more counted: {excused}" if excused else ""))


@app.command()
def abort(settings: Settings = SETTINGS) -> None:
    """End the newest release: who has not committed to it yet goes back to what it had.

    Example: `clipcast release abort coordinator.toml`
    """
    entry = _orders(*_open(settings)).abort()
    typer.echo(f"release {entry.version} is aborted. Who has committed keeps it: `clipcast release rollback` takes all back")


@app.command()
def rollback(
    settings: Settings = SETTINGS,
    *,
    to: Annotated[int | None, typer.Option(help="The version; default: the last complete one before the newest.")] = None,
) -> None:
    """Announce an earlier release to all devices at once; what is under way ends.

    Example: `clipcast release rollback coordinator.toml --to 3`
    """
    from coordinator.releases.orders import COMPLETE, how_it_ended

    config, store = _open(settings)
    entry = _orders(config, store).rollback(to)
    typer.echo(f"all devices go back to release {entry.version}: clipcast release status {settings}")
    first = next(one for one in reversed(store.releases.entries()) if one.version == entry.version)
    if how_it_ended(first) != COMPLETE:
        typer.echo(f"warning: release {entry.version} was never complete ({how_it_ended(first)})", err=True)


@app.command()
def run(settings: Settings = SETTINGS) -> None:
    """Send releases out until stopped. `clipcast coordinator run` does this, too.

    Example: `clipcast release run coordinator.toml`
    """
    from coordinator.config import load
    from coordinator.releases.desk import work

    config, stop = load(settings), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    typer.echo(f"releases of {config.federation} go out. Ctrl-C ends it, and another start goes on", err=True)
    work(config, stop)


def _open(settings: Path) -> tuple[CoordinatorConfig, Store]:
    from coordinator.config import load
    from coordinator.state.store import Store

    config = load(settings)
    return config, Store(config.state, config.journal, config.keep_rounds)


def _orders(config: CoordinatorConfig, store: Store) -> Orders:
    from coordinator.releases.blobs import ReleaseBlobs
    from coordinator.releases.orders import Orders
    from protocol.release.desk_end import FOLDER

    return Orders(config.federation, store.releases, ReleaseBlobs(config.state / FOLDER / "blobs"))


def _health(told: dict[str, float | None]) -> Health:
    from protocol.release.manifests import Health
    from protocol.settings import settings_of

    return settings_of({key: value for key, value in told.items() if value is not None}, Health)


def _rings(text: str) -> tuple[Ring, ...]:
    from protocol.release.rings import parse_rings
    from protocol.settings import SettingsError

    try:
        return parse_rings(text)
    except ValueError as error:
        raise SettingsError(f"--rings {text}: {error}") from error


def _profiles(text: str) -> tuple[str, ...]:
    """Read the profiles' names; raises ProfileError for one that there is none of."""
    from hardware_profiles.profile import load

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        load(name)
    return names


def _bank(store: Store, classes_from: str) -> TextBank:
    """Return the class bank of a round, as `clipcast export` takes it; raises SettingsError, FederationError."""
    from coordinator.errors import FederationError
    from coordinator.state.store import FIRST_BANK
    from protocol.settings import SettingsError

    versions = {record.round: record.bank_version for record in store.records()}
    if not versions:
        raise FederationError(f"{store.folder} holds no finished round, and no classes: leave out --classes-from")
    if classes_from != "newest" and not classes_from.isdecimal():
        raise SettingsError(f"--classes-from {classes_from}: the number of a round, or newest")
    number = max(versions) if classes_from == "newest" else int(classes_from)
    if number > max(versions):
        raise FederationError(f"round {number} is not finished: there are rounds 0 to {max(versions)}")
    return store.models.bank(versions.get(number, FIRST_BANK))


def _warn_of_newer(store: Store) -> None:
    """Say it if devices know versions that the journal does not: then they refuse what comes from here."""
    from coordinator.releases.summary import summary

    found = summary(store.releases, store.registry)
    if found is not None and found.ahead:
        newest = max(found.ahead.values())
        typer.echo(
            f"{some(sorted(found.ahead))} speak of release {newest}, which this journal does not know. If it was restored "
            f"from a backup, devices refuse what is older: `clipcast release create --version {newest + 1}`",
            err=True,
        )
