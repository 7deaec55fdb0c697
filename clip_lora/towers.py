"""Load CLIP's towers with transformers, the image tower with a 4- or 8-bit base.

A model is named by `tiny-clip` (ships with clipcast), a folder in transformers' format, or a Hugging Face hub name such as
`openai/clip-vit-base-patch32`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from clip_lora.errors import ModelError
from clip_lora.shapes import Sizes, TowerSize

TINY_CLIP = "tiny-clip"
BITS = (4, 8, 32)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class ModelFacts:
    """What both sides must agree on: exact weights (`digest`, SHA-256 of the file), logit scale, embedding width."""

    name: str
    digest: str
    logit_scale: float
    width: int


def locate(name: str) -> str:
    """Return the folder or hub name behind a model name; raises ModelError for a path that is not there."""
    if name == TINY_CLIP:
        return str(Path(__file__).parent / "tiny_clip")
    if name.startswith((".", "/", "~")) or Path(name).is_dir():
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json: name a folder in transformers' format, or a hub model")
        return str(folder)
    return name


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: how a sum is shared out among threads shows in its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_device() -> str:
    """Return "cuda" if torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_config(name: str) -> CLIPConfig:
    """Return the model's configuration; raises ModelError."""
    with loading(name):
        return CLIPConfig.from_pretrained(locate(name))


def load_sizes(name: str) -> Sizes:
    """Return how large the model's towers are; raises ModelError."""
    config = load_config(name)
    parts = (config.vision_config, config.text_config)
    return Sizes(*(TowerSize(part.num_hidden_layers, part.hidden_size) for part in parts))


def model_facts(name: str) -> ModelFacts:
    """Read what identifies a model; raises ModelError."""
    config = load_config(name)
    with loading(name):
        file = _weights_file(locate(name))
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                logit_scale = tensors.get_tensor("logit_scale").float()
        else:
            logit_scale = CLIPModel.from_pretrained(locate(name), dtype=torch.float32).logit_scale.detach()
    return ModelFacts(name, _digest(file), float(logit_scale.exp()), config.projection_dim)


def model_origin(name: str) -> tuple[str | None, str | None]:
    """Return the commit of a model on its hub, and the licence that its card names; None for what nobody says."""
    revision = getattr(load_config(name), "_commit_hash", None)
    card = cached_file(locate(name), "README.md", _raise_exceptions_for_missing_entries=False)
    text = "" if card is None else Path(card).read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = None if front is None else re.search(r"^license:\s*['\"]?([\w.+-]+)", front[1], re.MULTILINE)
    return revision, None if found is None else found[1]


def load_image_tower(name: str, bits: int, device: str = "cpu", dtype: str = "auto") -> CLIPVisionModelWithProjection:
    """Return the image tower, frozen; raises ModelError.

    bits: 4 (NF4, double quantisation), 8 (LLM.int8) or 32 (not quantised). Linear layers are quantised, embeddings,
    norms and the final projection are not. dtype: what is computed in, as for `as_dtype`. The tower is in train mode,
    deliberately: CLIP has no dropout, and in eval mode bitsandbytes switches 4-bit layers to packed CPU kernels that cannot
    train afterwards, and 8-bit layers to arithmetic that differs from training's.
    """
    if bits not in BITS:
        raise ModelError(f"{bits} bits: choose one of {', '.join(map(str, BITS))}")
    chosen = as_dtype(dtype, device)
    quantised: dict[str, Any] = {}
    if bits != 32:
        config = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=chosen,
        )
        quantised = {"quantization_config": config, "device_map": {"": device}}
    with loading(name):
        tower, report = CLIPVisionModelWithProjection.from_pretrained(
            locate(name), dtype=chosen, attention_dropout=0.0, output_loading_info=True, **quantised
        )
        _check_complete(report)
    if bits == 32:
        tower = tower.to(device)
    return tower.requires_grad_(False).train()


def load_text_tower(name: str, device: str = "cpu") -> tuple[CLIPTextModelWithProjection, Any]:
    """Return the text tower in float32, frozen, with its tokenizer; raises ModelError."""
    with loading(name):
        tower, report = CLIPTextModelWithProjection.from_pretrained(
            locate(name), dtype=torch.float32, output_loading_info=True
        )
        _check_complete(report)
        tokenizer = AutoTokenizer.from_pretrained(locate(name))
        if tokenizer("a")["input_ids"] == tokenizer("b")["input_ids"]:
            raise ModelError(
                f"model {name!r} comes without a usable tokenizer: tokenizer.json and its configuration are needed"
            )
        return tower.to(device).requires_grad_(False).eval(), tokenizer


def as_dtype(name: str, device: str) -> torch.dtype:
    """Return a floating point type by name; `auto` is `compute_dtype`."""
    if name == "auto":
        return compute_dtype(device)
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def compute_dtype(device: str) -> torch.dtype:
    """Return float32 on CPUs; on GPUs bfloat16 where the hardware has it, else float16."""
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _check_complete(report: dict[str, Any]) -> None:
    """Refuse weights that lack a part: transformers would fill it with random numbers."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"the weights lack {len(missing)} tensors that the model needs, first {missing[0]}")


def _weights_file(source: str) -> Path:
    for file in WEIGHT_FILES:
        found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found)
    raise ModelError(f"{source} has none of {', '.join(WEIGHT_FILES)}: sharded models are not supported")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while loading into one ModelError, without transformers' progress bars and reports."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load model {name!r}: {first}. Use 'tiny-clip', a folder in transformers' format, or a hub name "
            f"that this machine can download or has cached"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
