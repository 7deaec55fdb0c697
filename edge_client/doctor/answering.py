"""Whether onnxruntime's providers execute: that one is listed, or chosen for a session, proves nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from protocol.findings import Finding, first_line

UNINSTALL = "`pip uninstall onnxruntime onnxruntime-gpu`: each overwrites the other's files"
# y = x x for 2 x 2 matrices, opset 13: onnx itself is not installed on devices. A test makes it again.
GRAPH = bytes.fromhex(
    "08073a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c080112080a0208020a02080262130a"
    "0179120e0a0c080112080a0208020a02080242040a00100d"
)


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
    for provider in wanted:
        problem = executes(provider)
        better = provider != wanted[-1]
        yield Finding(provider, problem or "executes", *((("warn" if better else "fail"), cure) if problem else ()))


def executes(provider: str) -> str:
    """Run a product of matrices with a provider; return what went wrong, or nothing."""
    import numpy as np
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without it"
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(GRAPH, options, providers=[provider])
            (product,) = session.run(None, {"x": np.full((2, 2), 2.0, np.float32)})
            events = json.loads(Path(session.end_profiling()).read_text())
        except Exception as error:  # noqa: BLE001 - onnxruntime's own kinds, and whatever its libraries raise
            return first_line(error)
    ran = {event["args"]["provider"] for event in events if event.get("args", {}).get("provider")}
    if provider not in ran:
        return f"listed, but {', '.join(sorted(ran)) or 'nothing'} executes instead"
    return "" if (product == 8.0).all() else "its answer is wrong"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
