"""With what onnxruntime computes: the providers that a profile prefers, of which only those count that execute here."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_client.errors import InferenceError
from hardware_profiles.profile import Profile
from protocol.findings import first_line

log = logging.getLogger(__name__)

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
WORKSPACE_BYTES = 512 * 1024 * 1024  # TensorRT's while it builds an engine, on boards that share their memory
# y = x x for 2 x 2 matrices, opset 13: onnx itself is not installed on devices. A test makes it again.
GRAPH = bytes.fromhex(
    "08073a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c080112080a0208020a02080262130a"
    "0179120e0a0c080112080a0208020a02080242040a00100d"
)


@dataclass(frozen=True)
class Runtime:
    """How a model is run: providers, best first, CPU threads (0: onnxruntime decides), and where built engines are kept."""

    providers: tuple[str, ...] = (CPU,)
    threads: int = 0
    cache: Path | None = None
    skipped: tuple[str, ...] = ()


def runtime_for(profile: Profile, provider: str = "", threads: int = 0, cache: Path | None = None) -> Runtime:
    """Return the runtime of a board: what its profile prefers and what executes here; the CPU always comes last.

    `provider` and `threads` override the profile. What is skipped is said in the log, with the reason, once. Raises
    InferenceError if a `provider` that was asked for does not execute.
    """
    wanted = (provider,) if provider else tuple(profile.onnx_providers)
    working, skipped = [], []
    for name in dict.fromkeys(wanted):
        problem = "" if name == CPU else executes(name)
        if problem and provider:
            raise InferenceError(f"{name} does not execute here: {problem}. `clipcast doctor` says more")
        if problem:
            log.warning("%s is not used: %s", name, problem)
            skipped.append(f"{name}: {problem}")
        else:
            working.append(name)
    chosen = tuple(dict.fromkeys((*working, CPU)))
    return Runtime(chosen, threads or profile.threads, cache, tuple(skipped))


def executes(provider: str) -> str:
    """Run a product of matrices with a provider; return what went wrong, or nothing."""
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


def with_options(runtime: Runtime, model: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return the providers with their options; TensorRT's engines are kept by the SHA-256 of the `model`."""
    return [(name, _options(name, runtime.cache, model)) for name in runtime.providers]


def _options(name: str, cache: Path | None, model: bytes) -> dict[str, Any]:
    if name != TENSORRT:
        return {}
    # No shapes beforehand: they name inputs of the part that TensorRT takes, and which part that is it decides itself.
    options: dict[str, Any] = {
        "trt_fp16_enable": True,
        "trt_layer_norm_fp32_fallback": True,
        "trt_max_workspace_size": WORKSPACE_BYTES,
    }
    if cache is not None:
        folder = engine_folder(cache, hashlib.sha256(model).hexdigest())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # machine code that will be run
        options |= {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }
    return options


def engine_folder(cache: Path, digest: str) -> Path:
    """Return where engines for a model are kept: another model, runtime, TensorRT or device has another folder."""
    about = [digest, onnxruntime.__version__, _tensorrt_version(), _device()]
    return cache / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _tensorrt_version() -> str:
    """Return which TensorRT library would be loaded, by its file's name; empty where there is none."""
    places = ("/usr/lib/aarch64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/local/lib")
    return " ".join(sorted(path.name for place in places for path in Path(place).glob("libnvinfer.so.*")))


def _device(tree: Path = Path("/proc/device-tree/compatible"), nvidia: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Return what the GPU is, as far as files tell: a Jetson's device tree, or the driver's list of cards."""
    try:
        return tree.read_bytes().decode("ascii", "replace")
    except OSError:
        cards = sorted(nvidia.glob("*/information"))
        return "".join(line for card in cards for line in card.read_text().splitlines() if line.startswith("Model"))
