"""Whether this device can train: torch's build, a real kernel, and layers of 4 and 8 bits, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

from hardware_profiles.detect import Detection
from hardware_profiles.platform import Package
from protocol.findings import Finding, first_line


def examine_training(found: Detection, *, is_client: bool = False) -> Iterator[Finding]:
    """Yield what is found, on the device that training would use. Without torch a device only answers, unless a client's."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield _without_torch(found, error, is_client)
        return
    from clip_lora.towers import as_dtype
    from edge_client.probes import kernel, quantised

    yield Finding("torch", torch.__version__)
    device = found.profile.device
    if device == "cuda":
        yield _architectures(found)
        if problem := kernel("cuda"):
            yield Finding("GPU, a product of matrices", problem, "fail", source(found, "torch"))
            device = "cpu"
        else:
            yield Finding("GPU, a product of matrices", f"right, on {torch.cuda.get_device_name()}")
    if device == "cpu":
        problem = kernel("cpu")
        yield Finding(
            "CPU, a product of matrices", problem or "right", *(("fail", source(found, "torch")) if problem else ())
        )
    dtype = as_dtype(found.profile.dtype if device == found.profile.device else "auto", device)
    for bits in (4, 8):
        problem = quantised(bits, device, dtype)
        wanted = found.profile.bits == bits
        told = problem or f"forward and backward in {str(dtype).removeprefix('torch.')}"
        state = ("fail" if wanted else "warn", source(found, "bitsandbytes")) if problem else ()
        yield Finding(f"{bits}-bit layer on {device}", told, *state)


def _without_torch(found: Detection, error: Exception, is_client: bool) -> Finding:
    trains, cure = found.profile.tier == "train", source(found, "torch")
    if not isinstance(error, ModuleNotFoundError):
        return Finding("torch", f"cannot be loaded: {first_line(error)}", *(("fail", cure) if trains else ()))
    if is_client and trains:
        return Finding("torch", "not installed, and a client trains", "fail", cure)
    return Finding("torch", "not installed: this device answers only" + (f". To train: {cure}" if trains else ""))


def source(found: Detection, package: Package) -> str:
    """Return where a package for this board comes from, in words."""
    if found.platform is None:
        return f"`clipcast profiles show PLATFORM` says where {package} comes from"
    sources = found.platform.sources(package, found.profile.soc)
    if not sources or sources[0].runs == "no":
        return f"no {package} for {found.platform.title} is known to run"
    return sources[0].command() or sources[0].why


def _architectures(found: Detection) -> Finding:
    """Compare what torch was built for with what the GPU is."""
    import torch

    name = "torch's build"
    if torch.version.cuda is None:
        return Finding(name, "without CUDA", "fail", source(found, "torch"))
    if not torch.cuda.is_available():
        return Finding(name, f"for CUDA {torch.version.cuda}, and sees no GPU", "fail", source(found, "torch"))
    major, minor = torch.cuda.get_device_capability()
    built = torch.cuda.get_arch_list()
    told = f"for CUDA {torch.version.cuda}: {', '.join(built)}; the GPU is {major}.{minor}"
    if f"sm_{major}{minor}" in built or any(arch.startswith("compute_") for arch in built):
        return Finding(name, told)
    return Finding(name, told, "warn", f"another one may run all the same, see the next line: {source(found, 'torch')}")
