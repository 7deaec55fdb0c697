"""The quantised image tower with a LoRA adapter: pictures -> unit features. Its frozen part runs once per picture."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from numpy.typing import NDArray

from clip_lora.lora import PeftModel, attach
from clip_lora.preprocess import Preprocessing, load_preprocessing
from clip_lora.towers import load_image_tower, load_sizes, model_facts
from edge_client.data import Dataset
from edge_client.frozen import Hidden, HiddenStore
from protocol.messages import FloatArray, Recipe

EVAL_BATCH = 64


class ImageEncoder:
    """A quantised image tower with a LoRA adapter, and its preprocessing. Made once per process.

    If the recipe adapts blocks from `first_block` > 0 on, what comes out of the blocks below is kept in `store`. There is
    no augmentation: a picture has exactly one view, hence one entry. Encoders may share a store.
    """

    def __init__(
        self,
        model: str,
        bits: int,
        device: str,
        recipe: Recipe,
        store: HiddenStore | None = None,
        dtype: str = "auto",
    ) -> None:
        self.name = model
        self.device = device
        self.preprocessing: Preprocessing = load_preprocessing(model)
        self.model: PeftModel = attach(load_image_tower(model, bits, device, dtype), load_sizes(model), "vision", recipe)
        self.first_block = recipe.first_block
        self.checkpointing = False  # compute blocks again on the way back: less memory, a third more time, the same bits
        self.store = HiddenStore() if store is None else store
        # The name stands for the preprocessing beside the weights; digesting them is not worth it if nothing is frozen.
        digest = model_facts(model).digest if self.first_block else ""
        self._origin: tuple[Hashable, ...] = (model, digest, bits, device, dtype, self.first_block)

    def encode(self, data: Dataset, indices: Sequence[int]) -> torch.Tensor:
        """Pictures of a dataset by index -> unit features (N, D), float32."""
        if self.first_block == 0:
            return self.features(data.pixels(indices))
        keys = [(self._origin, key) for key in data.keys(indices)]
        kept = self.store.get(keys, lambda position: self._hidden_of(data, indices[position]))
        return self.head(torch.from_numpy(kept).to(self.device, self.model.dtype))

    def features(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Uint8 pictures (N, H, W, 3) -> unit features (N, D), float32, through the whole tower."""
        return self.head(self.hidden(pixels))

    @torch.no_grad()
    def hidden(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Uint8 pictures (N, H, W, 3) -> what enters block `first_block`, (N, tokens, width), the tower's dtype."""
        vision = self._tower.vision_model
        hidden: torch.Tensor = vision.pre_layrnorm(vision.embeddings(self._normalised(pixels)))
        for block in vision.encoder.layers[: self.first_block]:
            hidden = block(hidden, None)
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return unit features (N, D), float32, of what enters block `first_block`, (N, tokens, width); with gradients."""
        vision = self._tower.vision_model
        *blocks, last = vision.encoder.layers[self.first_block :]
        for block in blocks:
            hidden = self._run(block, hidden)
        embeds = self._tower.visual_projection(vision.post_layernorm(_class_token(last, hidden))).float()
        return torch.nn.functional.normalize(embeds, dim=-1)

    def _run(self, block: Any, hidden: torch.Tensor) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, hidden, None, use_reentrant=False)
        return block(hidden, None)

    @property
    def _tower(self) -> Any:
        """CLIPVisionModelWithProjection inside peft's wrapper, LoRA layers in place; its parts are called in its order."""
        return self.model.get_base_model()

    def _hidden_of(self, data: Dataset, index: int) -> Hidden:
        """Return one picture's, (tokens, width). float32 holds both half dtypes exactly, and numpy has no bfloat16.

        Alone: kernels may choose another order of sums for another batch size, and on GPUs an 8-bit layer picks the columns
        that it does not quantise over the whole batch. What is kept must not depend on the picture's company.
        """
        array: Hidden = self.hidden(data.pixels([index], keep=False))[0].float().cpu().numpy()
        return array

    def _normalised(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """(N, H, W, 3) -> (N, 3, H, W) in the base's dtype: half precision on a GPU, where the factors stay float32."""
        batch = self.preprocessing.normalise(torch.from_numpy(pixels).to(self.device))
        return batch.to(self.model.dtype)


def encode(
    encoder: ImageEncoder, data: Dataset, indices: Sequence[int] | None = None, at_once: int = EVAL_BATCH
) -> FloatArray:
    """Return the unit features of the pictures named, default all, (N, D); `at_once` of them take memory at a time."""
    chosen = range(len(data)) if indices is None else indices
    starts = range(0, len(chosen), at_once)
    with torch.no_grad():
        parts = [encoder.encode(data, chosen[start : start + at_once]).cpu().numpy() for start in starts]
    return np.concatenate(parts)


def _class_token(last: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the class token (N, width) behind the last block, given what enters that, (N, tokens, width).

    It alone is pooled: of the other tokens only keys and values count. Their query, output and MLP, most of a block's work,
    would be thrown away.
    """
    attention, normed = last.self_attn, last.layer_norm1(hidden)
    of_heads = (len(hidden), -1, attention.num_heads, attention.head_dim)
    projected = attention.q_proj(normed[:, :1]), attention.k_proj(normed), attention.v_proj(normed)
    query, key, value = (states.view(of_heads).transpose(1, 2) for states in projected)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    token = hidden[:, :1] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    result: torch.Tensor = (token + last.mlp(last.layer_norm2(token)))[:, 0]
    return result
