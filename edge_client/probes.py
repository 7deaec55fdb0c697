"""What this machine can really do: operations that are run, on the device that training would use.

An import, a version or a list of providers proves nothing: on record are wheels that import and fail at the first kernel.
"""

from __future__ import annotations

import gc
import warnings

import torch

from protocol.findings import first_line

WIDTH = 64  # of a layer: bitsandbytes quantises blocks of 64 weights


def kernel(device: str) -> str:
    """Multiply two matrices on a device, forward and backward; return what went wrong, or nothing."""
    try:
        weight = torch.full((WIDTH, WIDTH), 0.5, device=device, requires_grad=True)
        (torch.ones(2, WIDTH, device=device) @ weight).sum().backward()  # type: ignore[no-untyped-call]
        if weight.grad is None or float(weight.grad.sum()) != 2.0 * WIDTH * WIDTH:
            return f"a matrix product on {device} has a wrong gradient"
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return first_line(error)
    return ""


def quantised(bits: int, device: str, dtype: torch.dtype) -> str:
    """Run a layer of 4 or 8 bits on a device, forward and backward; return what went wrong, or nothing."""
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        return f"bitsandbytes cannot be loaded: {first_line(error)}"
    try:
        with torch.random.fork_rng(devices=[]):  # new layers draw random weights; a probe must not move the training's
            torch.manual_seed(0)
            weight = torch.randn(WIDTH, WIDTH)
            if bits == 4:
                layer = bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=dtype, quant_type="nf4")
            else:
                layer = bitsandbytes.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight})
        layer, wanted = layer.to(device), weight.sum(0)
        x = torch.ones(1, WIDTH, device=device, dtype=dtype, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a cast, at every call
            layer(x).float().sum().backward()
        if x.grad is None or float((x.grad.float().cpu()[0] - wanted).abs().max()) > 0.5 * float(wanted.abs().max()):
            return f"the gradient through a {bits}-bit layer on {device} is wrong"
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError, OSError) as error:
        return first_line(error)
    return ""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a Jetson that comes under names of its own."""
    words = ("out of memory", "NVML_SUCCESS", "NvMap", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def release_memory() -> None:
    """Give back what torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
