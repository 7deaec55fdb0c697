"""The server's half of the model: a text tower with LoRA, trained on what came up (docs/method.md, step 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clip_lora.lora import adapter_state, attach, load_adapter
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import default_device, load_sizes, load_text_tower, one_thread
from coordinator.recipe import TextTraining
from coordinator.text_bank import mean_embedding
from coordinator.text_samples import TextLoss, TextSamples
from protocol.codec import decode_adapter, encode_adapter
from protocol.messages import Adapter, FloatArray, TextBank


class TextSide:
    """A text tower with a LoRA adapter, and the prompts of the federation's classes."""

    def __init__(self, bank: TextBank, how: TextTraining, seed: int) -> None:
        self._bank = bank
        self._how = how
        self._device = default_device()
        tower, tokenizer = load_text_tower(bank.model, self._device)
        config = load_sizes(bank.model)
        self.shapes = adapter_shapes(config, "text", how)
        self._model = attach(tower, config, "text", how)
        # Train mode as loaded: CLIP has no dropout.
        self._prompts = [
            tokenizer([t.format(name) for t in bank.templates], padding=True, truncation=True, return_tensors="pt")
            for name in bank.classes
        ]
        everything = [template.format(name) for name in bank.classes for template in bank.templates]
        self._all = tokenizer(everything, padding=True, truncation=True, return_tensors="pt").to(self._device)
        self._initial = initial_adapter(self.shapes, seed)
        self.load(self._initial)

    def teach(self, samples: TextSamples, start: Adapter | None, version: int) -> tuple[TextBank, Adapter, TextLoss]:
        """Train from an adapter, or anew; return the bank of this version, the adapter as it is stored, and how it went."""
        self.restart(start)
        loss = self.train(samples)
        adapter = decode_adapter(encode_adapter(self.adapter()))
        self.load(adapter)
        return self.bank(version), adapter, loss

    def load(self, adapter: Adapter) -> None:
        """Set the adapter; raises ModelError unless it fits."""
        load_adapter(self._model, adapter)

    def restart(self, adapter: Adapter | None) -> None:
        """Go on from an adapter, or begin anew."""
        self.load(self._initial if adapter is None else adapter)

    def adapter(self) -> Adapter:
        """Return the adapter."""
        return adapter_state(self._model)

    def bank(self, version: int) -> TextBank:
        """Return the class bank as the text side now sees the classes."""
        rows: list[FloatArray] = []
        with one_thread(), torch.no_grad():
            for prompts in self._prompts:
                embeds = self._model(**prompts.to(self._device)).text_embeds
                rows.append(mean_embedding(embeds[None])[0].float().cpu().numpy())
        fields = {**self._bank.__dict__, "version": version, "embeddings": np.stack(rows)}
        return TextBank(**fields)

    def train(self, samples: TextSamples) -> TextLoss:
        """Take `steps` AdamW steps on the text LoRA alone to minimise the weighted CE of softmax_c(s z.t_c).

        All samples are in every step: they are few and small, the text tower's passes over the prompts are what costs.
        """
        features = torch.from_numpy(samples.features).to(self._device)
        labels = torch.from_numpy(samples.labels.astype(np.int64)).to(self._device)
        weights = torch.from_numpy(samples.weights).float().to(self._device)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self._how.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        with one_thread():
            for _ in range(self._how.steps):
                loss = self._loss(features, labels, weights)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.item())
            with torch.no_grad():
                losses.append(self._loss(features, labels, weights).item())
        return TextLoss(losses[0], losses[-1], len(samples))

    def _loss(self, features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        embeds = self._model(**self._all).text_embeds
        text = mean_embedding(embeds.unflatten(0, (len(self._bank.classes), -1))).float()
        losses = cross_entropy(self._bank.logit_scale * features @ text.T, labels, reduction="none")
        return (weights * losses).sum()
