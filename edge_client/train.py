"""Local training on a quantised image tower: the steps, and what is said about them (docs/method.md, steps 2 and 3)."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from clip_lora.lora import adapter_state, freeze_factors, load_adapter
from edge_client.checkpoint import Checkpoint
from edge_client.data import Dataset
from edge_client.encoder import EVAL_BATCH, ImageEncoder, encode
from edge_client.losses import alignment_loss, orthogonal_loss
from protocol.messages import Adapter, Recipe, TextBank, Update

log = logging.getLogger(__name__)


class TrainingStopped(Exception):  # noqa: N818 - not an error: the process was asked to end
    """Training was interrupted between two steps."""


@dataclass(frozen=True)
class Metrics:
    """How a run of local steps went: mean loss over its steps, number of steps, seconds."""

    loss: float
    steps: int
    seconds: float


def derive_seed(federation_seed: int, number: int, client: str) -> int:
    """Return the seed of one client's round: the same wherever and whenever it is computed."""
    digest = hashlib.sha256(f"{federation_seed}:{number}:{client}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def local_steps(
    encoder: ImageEncoder,
    data: Dataset,
    bank: TextBank,
    recipe: Recipe,
    seed: int,
    batch_limit: int,
    stopped: Callable[[], bool] = lambda: False,
    checkpoint: Checkpoint | None = None,
    work: str = "",
) -> Metrics:
    """Take `recipe.local_steps` AdamW steps on the adapter; raises TrainingStopped as soon as `stopped()`.

    If `checkpoint` is of `work`, it goes on from there, to the same bits as without a break.
    """
    freeze_factors(encoder.model, a=recipe.freeze_a)
    parameters = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    targets = torch.from_numpy(bank.embeddings).to(encoder.device)
    labels = torch.from_numpy(data.labels.astype(np.int64)).to(encoder.device)
    started, size = time.monotonic(), min(recipe.batch_size, batch_limit)
    first, total = (0, 0.0) if checkpoint is None else checkpoint.load(work, parameters, optimizer)
    epoch = -(-len(data) // size)
    batches = itertools.islice(_batches(len(data), size, seed), first, recipe.local_steps)
    for step, batch in enumerate(batches, start=first):
        asked_to_stop = stopped()
        if checkpoint is not None and step > first and (asked_to_stop or (step % epoch == 0 and checkpoint.due())):
            checkpoint.save(work, step, total, parameters, optimizer)
        if asked_to_stop:
            raise TrainingStopped
        features = encoder.encode(data, batch.tolist())
        y = labels[torch.from_numpy(batch)]
        loss = alignment_loss(features, y, targets, bank.logit_scale) + recipe.mu * orthogonal_loss(features, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item()
        del features, loss  # they hold what this step kept for its way back, beside what the next one keeps
    return Metrics(total / max(recipe.local_steps, 1), recipe.local_steps, time.monotonic() - started)


def summarise(
    encoder: ImageEncoder,
    data: Dataset,
    bank: TextBank,
    recipe: Recipe,
    seed: int,
    start: Adapter,
    at_once: int = EVAL_BATCH,
) -> tuple[Update, float]:
    """Return the update and the training accuracy; at most `at_once` pictures take memory at a time.

    Prototypes are the unit means of v(x) over all samples of a class that has `min_prototype_count` of them. Features are of
    correctly predicted samples, or of all, a seeded draw of at most `features_per_class` of each class (docs/method.md,
    step 3), as the `start` adapter sees them or as the trained one does.
    """
    adapter: Adapter = adapter_state(encoder.model)
    at_once = min(at_once, EVAL_BATCH)  # a training step of as many pictures takes more than they do
    features = encode(encoder, data, at_once=at_once)
    correct = (features @ bank.embeddings.T).argmax(axis=1) == data.labels
    # Of the other classes nothing leaves the device: features would tell their prototypes and counts.
    shown = np.array([c for c in np.unique(data.labels) if (data.labels == c).sum() >= recipe.min_prototype_count], np.int32)
    means = np.array([features[data.labels == c].mean(axis=0) for c in shown]).reshape(-1, features.shape[1])
    order = np.random.default_rng(seed).permutation(len(data))
    wanted = correct if recipe.features_of == "correct" else np.ones(len(data), bool)
    chosen = [order[(data.labels[order] == c) & wanted[order]][: recipe.features_per_class] for c in shown]
    picked = np.concatenate([order[:0], *chosen])
    sent = features[picked]
    if recipe.features_from == "start" and recipe.local_steps and len(picked):  # without steps the two are one
        load_adapter(encoder.model, start)
        sent = encode(encoder, data, picked.tolist(), at_once)
        load_adapter(encoder.model, adapter)
    update = Update(
        adapter,
        (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32),
        shown,
        np.array([(data.labels == c).sum() for c in shown], np.int32),
        np.array([((data.labels == c) & correct).sum() for c in shown], np.int32),
        sent,
        data.labels[picked].astype(np.int32),
    )
    return update, float(correct.mean())


def accuracy(encoder: ImageEncoder, data: Dataset, bank: TextBank) -> float:
    """Return the share of pictures whose nearest class embedding is their own, 0 to 1."""
    return float(((encode(encoder, data) @ bank.embeddings.T).argmax(axis=1) == data.labels).mean())


def _batches(size: int, batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Endless seeded epochs; a short last batch is kept, so that every picture is seen once an epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(size)
        for start in range(0, size, batch):
            yield order[start : start + batch]
