"""Class names -> prompts -> unit text embeddings: the only user of the text tower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clip_lora.towers import default_device, load_text_tower, model_facts, one_thread
from protocol.messages import FloatArray, TextBank


def mean_embedding(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings of prompts (C, templates, D) -> unit mean over templates of the unit embeddings, (C, D), float64."""
    mean = torch.nn.functional.normalize(embeds.double(), dim=-1).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def make_bank(model: str, classes: Sequence[str], templates: Sequence[str], version: int = 1) -> TextBank:
    """Return the class bank of a model; raises ModelError.

    t_c is the unit mean over templates of the unit embeddings of the prompts, (C, D).
    """
    facts = model_facts(model)
    device = default_device()
    tower, tokenizer = load_text_tower(model, device)
    rows: list[FloatArray] = []
    with one_thread(), torch.no_grad():
        for name in classes:
            prompts = tokenizer([t.format(name) for t in templates], padding=True, truncation=True, return_tensors="pt")
            embeds = tower(**prompts.to(device)).text_embeds
            rows.append(mean_embedding(embeds[None])[0].float().cpu().numpy())
    return TextBank(version, tuple(classes), tuple(templates), np.stack(rows), facts.logit_scale, facts.name, facts.digest)
