"""What the federation is compared with, on the same held-out pictures and with the same code: zero-shot, and each alone."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_lora.lora import load_adapter
from edge_client.data import Dataset, open_dataset
from edge_client.encoder import ImageEncoder
from edge_client.train import accuracy, derive_seed, local_steps
from protocol.messages import Adapter, Recipe, TextBank

NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Evaluator:
    """A quantised image tower and the held-out pictures."""

    encoder: ImageEncoder
    held_out: Dataset

    @classmethod
    def load(cls, bank: TextBank, bits: int, recipe: Recipe, held_out: Path) -> Evaluator:
        """Load model and pictures once."""
        encoder = ImageEncoder(bank.model, bits, "cpu", recipe)
        return cls(encoder, open_dataset(str(held_out), bank.classes, encoder.preprocessing))

    def accuracy(self, adapter: Adapter, bank: TextBank) -> float:
        """Return the held-out accuracy with an adapter and the class bank that goes with it, 0 to 1."""
        load_adapter(self.encoder.model, adapter)
        return accuracy(self.encoder, self.held_out, bank)


@dataclass(frozen=True)
class Alone:
    """One client without a federation."""

    home: Path
    held_out: Path
    bank: TextBank
    start: Adapter
    recipe: Recipe
    bits: int
    rounds: int
    seed: int


def all_alone(tasks: Sequence[Alone]) -> list[float]:
    """Train each client alone, in processes side by side; return the held-out accuracies in order."""
    workers = min(len(tasks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(train_alone, tasks))


def train_alone(task: Alone) -> float:
    """Take the same local steps as in the federation, on this client's pictures only; return the held-out accuracy."""
    torch.set_num_threads(1)
    evaluator = Evaluator.load(task.bank, task.bits, task.recipe, task.held_out)
    data = open_dataset(str(task.home), task.bank.classes, evaluator.encoder.preprocessing)
    load_adapter(evaluator.encoder.model, task.start)
    for number in range(1, task.rounds + 1):
        seed = derive_seed(task.seed, number, task.home.name)
        local_steps(evaluator.encoder, data, task.bank, task.recipe, seed, NO_LIMIT)
    return accuracy(evaluator.encoder, evaluator.held_out, task.bank)
