"""A round on this device: what fits, trained from where it was left, told as an update.

The model is loaded once per process and kept; a round only swaps adapters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from clip_lora.algebra import rank_of
from clip_lora.lora import load_adapter
from clip_lora.preprocess import Preprocessing, load_preprocessing
from clip_lora.towers import ModelFacts, model_facts
from edge_client.allocator import give_back, keep_freed_memory, return_freed_memory
from edge_client.checkpoint import Checkpoint
from edge_client.config import Placement, told
from edge_client.data import Dataset
from edge_client.encoder import ImageEncoder
from edge_client.encoders import Encoders
from edge_client.errors import OutOfMemoryError, UnfitPlanError
from edge_client.memory import ample, fitted, held_mib, room_for, shape_of
from edge_client.privacy.budget import Budget
from edge_client.privacy.disclose import disclose, parts_of
from edge_client.probes import out_of_memory, release_memory
from edge_client.train import derive_seed, local_steps, summarise
from edge_client.work import work_of
from protocol.events import PlanReady
from protocol.findings import first_line
from protocol.messages import Recipe, TextBank, TrainingResult

log = logging.getLogger(__name__)

OpenPictures = Callable[[Sequence[str], Preprocessing], Dataset]
"""Opens this device's pictures against the class bank's classes."""


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
        kept = None if self._checkpoint is None else self._checkpoint.work()
        begun = batch if kept is None else next((size for size in sizes if work(size) == kept), batch)
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
