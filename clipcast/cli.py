"""The `clipcast` command: puts the sub-commands together, sets up logging, and turns failures into sentences and codes."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer

from clipcast import __version__
from clipcast.commands import (
    bench,
    broker,
    ca,
    client,
    coordinator,
    demo,
    device,
    doctor,
    export,
    flashing,
    infer,
    packaging,
    plan,
    profiles,
    provisioning,
    release,
    serve,
    simulate,
    watch,
)
from clipcast.exit_codes import BUG, INTERRUPTED, MISSING, code_of

app = typer.Typer(
    help="Federated CLIP on small devices: a coordinator, edge clients, ONNX answers. `clipcast demo` shows it all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(client.app, name="client")
device.app.command("package")(packaging.package)
device.app.command("provision")(provisioning.provision)
device.app.command("wheelhouse")(packaging.wheelhouse)
device.app.command("overlay")(flashing.overlay)
device.app.command("flash-plan")(flashing.flash_plan)
app.add_typer(device.app, name="device")
app.add_typer(release.app, name="release")
app.add_typer(broker.app, name="broker")
app.add_typer(ca.app, name="ca")
app.add_typer(profiles.app, name="profiles")
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("export")(export.export)
app.command("infer")(infer.infer)
app.command("serve")(serve.serve)
app.command("watch")(watch.watch)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("simulate")(simulate.simulate)

EXTRAS = {
    "torch": "client",
    "transformers": "client",
    "peft": "client",
    "bitsandbytes": "client",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "infer",
    "PIL": "infer",
    "starlette": "infer",
    "uvicorn": "infer",
    "cv2": "camera",
    "iotcore": "demo",
    "sqlalchemy": "coordinator",
    "sklearn": "demo",
    "matplotlib": "demo",
    "ray": "ray",
    "dp_accounting": "privacy",
    "prometheus_client": "metrics",
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, logger and message as JSON."""
        entry = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        return json.dumps({**entry, "message": record.getMessage()})


def print_version(value: bool) -> None:
    """Print the version and exit, before a command is asked for."""
    if value:
        typer.echo(f"clipcast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON lines to stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every event.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback does all
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Set up what all commands share."""
    log = logging.StreamHandler()
    log.setFormatter(JsonFormatter() if log_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    for package in ("protocol", "clip_lora", "coordinator", "edge_client", "export", "clipcast"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)


def main() -> Any:
    """Run the command; a failure prints what happened and what to do, and exits with its code."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        code = code_of(error)
        if code == BUG:
            logging.getLogger("clipcast").exception("this is a bug in clipcast")
        message = _missing(error) if code == MISSING else str(error)
        typer.echo(f"error: {message}", err=True)
        sys.exit(code)


def _missing(error: Exception) -> str:
    module = (getattr(error, "name", "") or "").split(".")[0]
    own = EXTRAS.get(module, "demo")
    extra = "demo" if {"demo", "simulate"} & set(sys.argv[1:]) and own not in ("ray", "privacy") else own
    return (
        f"this command needs {module}, which is not installed: pip install 'clipcast[{extra}]', or '.[{extra}]' in a clone"
    )
