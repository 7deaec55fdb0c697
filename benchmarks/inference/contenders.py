"""Who is compared: each is a function from decoded pictures to labels, made in a process of its own.

All get the same pictures, the same number of threads, and weights of the same shape. What they have of preprocessing is
their own: transformers' and open_clip's work with Pillow, clipcast's is part of the graph.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pictures = Sequence[NDArray[np.uint8]]
Answers = Callable[[Pictures], list[int]]


def transformers_eager(folder: Path, threads: int) -> Answers:
    """Return transformers' image tower in float32, in torch's eager mode, behind transformers' own image processor."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    torch.set_num_threads(threads)
    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    tower = CLIPVisionModelWithProjection.from_pretrained(folder / "clip", dtype=torch.float32).eval()
    classes = torch.from_numpy(np.load(folder / "classes.npy"))

    @torch.inference_mode()
    def answer(pictures: Pictures) -> list[int]:
        pixels = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
        embeds = torch.nn.functional.normalize(tower(pixel_values=pixels).image_embeds, dim=-1)
        return list((embeds @ classes.T).argmax(dim=1).tolist())

    return answer


def open_clip(folder: Path, threads: int) -> Answers:
    """Return open_clip's ViT-B-32 (`pip install open_clip_torch`) with random weights behind its own transforms."""
    import torch

    lib = _torchvision_without_operators()
    import open_clip

    torch.set_num_threads(threads)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    model.eval()
    classes = torch.from_numpy(np.load(folder / "classes.npy"))

    @torch.inference_mode()
    def answer(pictures: Pictures, _lib: Any = lib) -> list[int]:
        pixels = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
        return list((model.encode_image(pixels, normalize=True) @ classes.T).argmax(dim=1).tolist())

    return answer


def plain_onnx(folder: Path, threads: int) -> Answers:
    """Return the encoder alone in ONNX Runtime, float32, behind transformers' image processor."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    encode = encoder_alone(folder, threads)

    def answer(pictures: Pictures) -> list[int]:
        return encode(processor([Image.fromarray(p) for p in pictures], return_tensors="np")["pixel_values"])

    return answer


def ready_pixels(folder: Path, threads: int) -> Answers:
    """Return the encoder alone in ONNX Runtime, float32, on pixels that were prepared before."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    encode, known = encoder_alone(folder, threads), {}

    def answer(pictures: Pictures) -> list[int]:
        key = tuple(id(picture) for picture in pictures)
        if key not in known:  # in the warm-up
            known[key] = processor([Image.fromarray(p) for p in pictures], return_tensors="np")["pixel_values"]
        return encode(known[key])

    return answer


def encoder_alone(folder: Path, threads: int) -> Callable[[NDArray[np.float32]], list[int]]:
    """Return the encoder of encoder.onnx: pixel values (N, 3, H, W) -> classes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "encoder.onnx", options, providers=["CPUExecutionProvider"])
    classes = np.load(folder / "classes.npy")
    name = session.get_inputs()[0].name

    def encode(pixels: NDArray[np.float32]) -> list[int]:
        (embeds,) = session.run(None, {name: pixels})
        return list((embeds @ classes.T).argmax(axis=1).tolist())

    return encode


def clipcast_artefact(flavour: str) -> Callable[[Path, int], Answers]:
    """Return what makes an artefact of clipcast's ready, as `clipcast serve` has it."""

    def make(folder: Path, threads: int) -> Answers:
        from edge_client.inference.model import Model
        from edge_client.inference.providers import Runtime

        model = Model.open(folder / f"{flavour}.onnx", Runtime(threads=threads))

        def answer(pictures: Pictures) -> list[int]:
            return list(model.run(np.stack(pictures)).probabilities.argmax(axis=1).tolist())

        return answer

    return make


CONTENDERS: dict[str, Callable[[Path, int], Answers]] = {
    "transformers": transformers_eager,
    "open_clip": open_clip,
    "plain-onnx": plain_onnx,
    "ready-pixels": ready_pixels,
    "clipcast-fp32": clipcast_artefact("fp32"),
    "clipcast-int8": clipcast_artefact("int8"),
}


def _torchvision_without_operators() -> Any:
    """Let torchvision's wheel be imported beside a torch for CPUs: open_clip uses its transforms, none of its operators.

    The wheel's compiled part wants CUDA; without it the import stops at the first operator that is described but missing.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    lib = torch.library.Library("torchvision", "DEF")
    for quoted, registered in sorted(set(re.findall(r'torchvision::(\w+)"|register_meta\("(\w+)"', text))):
        lib.define(f"{quoted or registered}(Tensor t) -> Tensor")
    return lib
