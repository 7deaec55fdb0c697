"""Whether onnxruntime's providers execute: that one is listed, or chosen for a session, proves nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata

from protocol.findings import Finding, first_line

UNINSTALL = "`pip uninstall onnxruntime onnxruntime-gpu`: each overwrites the other's files"


def examine_answering(wanted: Sequence[str], cure: str, *, trains: bool = False) -> Iterator[Finding]:
    """Run a model with each wanted provider; `cure` says where an onnxruntime for this board comes from.

    Who `trains` need not answer; a device that does neither is of no use.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        told = "not installed: this device trains only" if trains else "not installed: this device cannot answer"
        yield Finding("onnxruntime", f"{told}. To answer: {cure}") if trains else Finding("onnxruntime", told, "fail", cure)
        return
    except (ImportError, OSError) as error:
        yield Finding("onnxruntime", f"cannot be loaded: {first_line(error)}", "warn" if trains else "fail", cure)
        return
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) > 1:
        yield Finding("onnxruntime", "two packages, one module", "fail", f"{UNINSTALL}, then {cure}")
    else:
        yield Finding("onnxruntime", f"{(both or ['onnxruntime'])[0]} {onnxruntime.__version__}")
    from edge_client.inference.providers import executes

    for provider in wanted:
        problem = executes(provider)
        better = provider != wanted[-1]
        yield Finding(provider, problem or "executes", *((("warn" if better else "fail"), cure) if problem else ()))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
