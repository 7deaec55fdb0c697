"""A training without pictures: real optimiser, real checkpoints, gradients drawn from seed, round and client.

It stands where edge_client/trainer.py's Trainer stands and can be left between any two steps, as a power cut leaves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator

import numpy as np
import torch

from edge_client.checkpoint import Checkpoint
from edge_client.work import work_of
from protocol.events import PlanReady
from protocol.messages import FloatArray, TrainingResult, Update

STEPS = 4
EPOCH = 2
PICTURES = (8, 64)


def training(ready: PlanReady, client: str, checkpoint: Checkpoint) -> Generator[None, None, TrainingResult]:
    """Take the steps one by one; from the checkpoint if it is of this work."""
    plan = ready.plan
    work = work_of(ready, client)
    names = sorted(ready.adapter)
    parameters = [torch.nn.Parameter(torch.from_numpy(ready.adapter[name].copy())) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    first, loss = checkpoint.load(work, parameters, optimizer)
    for step in range(first, STEPS):
        if step > first and step % EPOCH == 0 and checkpoint.due():
            checkpoint.save(work, step, loss, parameters, optimizer)
        rng = _rng(plan.seed, plan.round, client, step)
        for parameter in parameters:
            parameter.grad = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
        optimizer.step()
        loss += float(rng.random())
        yield
    adapter = {name: p.detach().numpy().copy() for name, p in zip(names, parameters, strict=True)}
    update, samples = _summary(ready, client, adapter)
    checkpoint.clear()
    return TrainingResult(plan.round, ready.base, update, samples, loss / STEPS, 0.5, 1.0)


def _summary(ready: PlanReady, client: str, adapter: dict[str, FloatArray]) -> tuple[Update, int]:
    classes, width = ready.bank.embeddings.shape
    rng = _rng(ready.plan.seed, ready.plan.round, client, "summary")
    counts = rng.integers(*PICTURES, classes).astype(np.int32)
    labels = np.repeat(np.arange(classes, dtype=np.int32), ready.plan.recipe.features_per_class)
    rows = _unit(rng.standard_normal((classes + len(labels), width), np.float32))
    indices = np.arange(classes, dtype=np.int32)
    update = Update(adapter, rows[:classes], indices, counts, (counts // 2).astype(np.int32), rows[classes:], labels)
    return update, int(counts.sum())


def _rng(*what: object) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr(what).encode()).digest()))


def _unit(rows: FloatArray) -> FloatArray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def finish(steps: Iterator[None]) -> TrainingResult:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
