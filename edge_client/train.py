"""Local training on a quantised image tower: the steps, and what is said about them (docs/method.md, steps 2 and 3).

The model is loaded once per process and kept; a round only swaps adapters.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clip_lora.algebra import rank_of
from clip_lora.lora import adapter_state, freeze_factors, load_adapter
from clip_lora.preprocess import Preprocessing, load_preprocessing
from clip_lora.towers import ModelFacts, model_facts
from edge_client.allocator import give_back, keep_freed_memory, return_freed_memory
from edge_client.checkpoint import Checkpoint
from edge_client.config import Placement, told
from edge_client.data import Dataset
from edge_client.encoder import EVAL_BATCH, ImageEncoder, encode
from edge_client.encoders import Encoders
from edge_client.errors import OutOfMemoryError, UnfitPlanError
from edge_client.losses import alignment_loss, orthogonal_loss
from edge_client.memory import ample, fitted, held_mib, room_for, shape_of
from edge_client.privacy.budget import Budget
from edge_client.privacy.disclose import disclose, parts_of
from edge_client.probes import out_of_memory, release_memory
from edge_client.work import work_of
from protocol.events import PlanReady
from protocol.findings import first_line
from protocol.messages import Adapter, Recipe, TextBank, TrainingResult, Update

log = logging.getLogger(__name__)

OpenPictures = Callable[[Sequence[str], Preprocessing], Dataset]
"""Opens this device's pictures against the class bank's classes."""


class TrainingStopped(Exception):  # noqa: N818 - not an error: the process was asked to end
    """Training was interrupted between two steps."""


@dataclass(frozen=True)
class Metrics:
    """How a run of local steps went: mean loss over its steps, number of steps, seconds."""

    loss: float
    steps: int
    seconds: float


class Trainer:
    """Runs rounds on this device's pictures."""

    def __init__(
        self,
        client_id: str,
        open_pictures: OpenPictures,
        placement: Placement,
        model: str | None,
        encoders: Encoders | None = None,
        checkpoint: Checkpoint | None = None,
        budget: Budget | None = None,
        report: Callable[[str], None] = lambda _: None,
        root: Path | None = None,
    ) -> None:
        """`report` is told what is done other than the settings ask for, as when memory ran out.

        Below `root` the system's files say, before each round, how much memory there is; without it what is placed counts.
        """
        self._id = client_id
        self._open_pictures = open_pictures
        self._placement = placement
        self._model = model
        self._facts: ModelFacts | None = None
        self._encoders = encoders or Encoders()
        self._checkpoint = checkpoint
        self._budget = budget or Budget()
        self._report = report
        self._root = root
        self._used = placement  # of the round that is trained: the placement, or what fitted at its beginning
        self._data: Dataset | None = None
        self._classes: tuple[str, ...] | None = None

    def prepare(self, bank: TextBank, recipe: Recipe) -> tuple[ImageEncoder, Dataset]:
        """Load model and pictures unless they are here already.

        Raises ModelError, DataError, or UnfitPlanError if the plan is not for this device.
        """
        name = self._check(bank, recipe)
        data = self._pictures(bank, name)
        return self._encoder(name, recipe, self._placement), data

    def _check(self, bank: TextBank, recipe: Recipe) -> str:
        """Return the name of the federation's model on this device."""
        if recipe.rank > self._placement.max_rank:
            raise UnfitPlanError(
                f"the federation trains rank {recipe.rank}, this device's profile allows {self._placement.max_rank}: lower "
                f"rank in the coordinator's recipe, set its aggregation to mean_of_products, which serves each device its "
                f"own rank, or name another profile"
            )
        name = self._model or bank.model
        if self._facts is None or self._facts.name != name:
            self._facts = model_facts(name)
        if self._facts.digest != bank.model_digest:
            raise UnfitPlanError(
                f"model {name!r} here has weights {self._facts.digest[:12]}, the federation trains {bank.model!r} with "
                f"{bank.model_digest[:12]}: install the same weights on this device, or set `model` to them"
            )
        return name

    def _pictures(self, bank: TextBank, model: str) -> Dataset:
        if self._data is None or self._classes != bank.classes:
            self._data = self._open_pictures(bank.classes, load_preprocessing(model))
            self._classes = bank.classes
            log.info("%d pictures", len(self._data))
        return self._data

    def _encoder(self, model: str, recipe: Recipe, placement: Placement) -> ImageEncoder:
        encoder = self._encoders.get(model, placement.bits, placement.device, recipe, placement.dtype)
        encoder.checkpointing = placement.checkpointing
        return encoder

    def _fitted(self, model: str, recipe: Recipe, data: Dataset, work: Callable[[int], str]) -> Placement:
        """Return how a round is trained: as placed if that fits into memory now, else smaller. `work` is its name by batch.

        One that was begun with a smaller batch goes on with that: other batches are another training.
        """
        placement, device = self._placement, self._placement.device
        batch = min(recipe.batch_size, placement.batch_size)
        sizes = [batch >> halvings for halvings in range(batch.bit_length())]
        begun = next((size for size in sizes if self._checkpoint is not None and self._checkpoint.is_of(work(size))), batch)
        if begun < batch:
            fallback = told(placement.fallback, f"batches of {begun}: the round was begun with them")
            placement = replace(placement, batch_size=begun, fallback=fallback)
        if self._root is not None:
            pictures = len(data) - (data.kept if device == "cuda" else 0)
            room, held = room_for(device, self._root), held_mib(device, self._root)
            about = (recipe, begun, shape_of(model), pictures, room, held)
            placement = fitted(placement, *about)
            (keep_freed_memory if ample(placement, *about) else return_freed_memory)()
        if placement.fallback != self._used.fallback:
            log.warning("trained other than settings and profile say: %s", placement.fallback or "no more")
            self._report(placement.fallback)
        return placement

    def run(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        """Train one round, from its checkpoint if there is one, and return what goes up.

        What fits into memory is chosen before. If it runs out all the same, once more with half the batch, which stays that
        size. Raises TrainingStopped, OutOfMemoryError, and PlanRefusedError if memory or privacy budget allow no round.
        """
        try:
            return self._run_or_halve(ready, stopped)
        finally:
            give_back()

    def _run_or_halve(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        try:
            return self._run(ready, stopped)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            problem = first_line(error)
        # Out of the handler: the error's traceback holds the tensors that did not fit.
        batch = min(ready.plan.recipe.batch_size, self._used.batch_size)
        self._placement = self._used = self._used.smaller(f"memory ran out ({problem})", batch)
        log.warning("round %d is trained again: %s", ready.plan.round, self._placement.fallback)
        self._report(self._placement.fallback)
        release_memory()
        try:
            return self._run(ready, stopped)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"memory ran out with batches of {self._placement.batch_size} too ({first_line(error)}): stop what else "
                f"runs here, set a smaller `batch_size` or 4 `bits`, or take a smaller model. `clipcast plan` says what fits"
            ) from error

    def _run(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        plan, bank = ready.plan, ready.bank
        started = time.monotonic()
        recipe = self._placement.stricter(plan.recipe.at_rank(rank_of(ready.adapter)))
        name = self._check(bank, recipe)
        data = self._pictures(bank, name)
        digest = data.digest()
        self._used = self._fitted(name, recipe, data, lambda size: self._work(ready, size, digest))
        encoder = self._encoder(name, recipe, self._used)
        seed = derive_seed(plan.seed, plan.round, self._id)
        load_adapter(encoder.model, ready.adapter)
        batch = min(recipe.batch_size, self._used.batch_size)
        work = self._work(ready, batch, digest)
        self._budget.check(recipe.privacy, work, parts_of(recipe))
        metrics = local_steps(encoder, data, bank, recipe, seed, batch, stopped, self._checkpoint, work)
        if recipe.privacy is None:
            update, accuracy = summarise(encoder, data, bank, recipe, seed, ready.adapter, batch)
            took = time.monotonic() - started
            result = TrainingResult(plan.round, ready.base, update, len(data), metrics.loss, accuracy, took)
        else:
            disclosed = disclose(encoder, data, len(bank.classes), recipe, ready.adapter, self._budget, work)
            result = TrainingResult(
                plan.round, ready.base, disclosed.update, disclosed.samples, None, None, None, disclosed.epsilon
            )
        if self._checkpoint is not None:
            self._checkpoint.clear()
        return result

    def _work(self, ready: PlanReady, batch: int, digest: str) -> str:
        return work_of(ready, self._id, *self._placement.numerics(), batch, digest)


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
