"""Virtual clients spread over a Ray cluster, a worker for each GPU or, without GPUs, for each CPU. Same results as locally.

Each worker holds one quantised base. A client's training depends on its plan and its pictures, not on where it runs. The
cluster's machines need clipcast installed and the pictures under the same path.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal

import ray
import torch

from clip_lora.towers import default_device
from clipcast.simulate.engine import new_trainers, place
from edge_client.encoders import Encoders
from edge_client.trainer import OpenPictures, Trainer
from protocol.events import PlanReady
from protocol.messages import TrainingResult
from protocol.settings import SettingsError


class _Worker:
    """One process of the cluster."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoders = Encoders()
        self._trainers: dict[str, Trainer] = {}

    def open(self, pictures: Mapping[str, OpenPictures], bits: Literal[4, 8, 32]) -> None:
        """Take in a run's clients; their pictures are read when they first train."""
        self._trainers = new_trainers(pictures, place(bits, default_device()), self._encoders)

    def train(self, client: str, ready: PlanReady) -> TrainingResult:
        """Train a client."""
        return self._trainers[client].run(ready, lambda: False)


class RayEngine:
    """Deals the clients out among the workers. The cluster is the one that RAY_ADDRESS names, or one on this machine."""

    def __init__(self, pictures: Mapping[str, OpenPictures], bits: Literal[4, 8, 32], threads: int) -> None:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._workers = _start(threads)
        shared = ray.put(dict(pictures))
        ray.get([worker.open.remote(shared, bits) for worker in self._workers])
        self._of = {client: self._workers[n % len(self._workers)] for n, client in enumerate(sorted(pictures))}

    def submit(self, client: str, ready: PlanReady) -> Future[TrainingResult]:
        """Start a client's training on its worker."""
        started: Future[TrainingResult] = self._of[client].train.remote(client, ready).future()
        return started

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            ray.kill(worker)


def _start(threads: int) -> list[Any]:
    cluster = ray.cluster_resources()
    cpus, gpus = int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0))
    if threads > cpus:  # the cluster would wait for such a machine for ever
        raise SettingsError(f"--threads {threads}: the Ray cluster has {cpus} CPUs; take fewer threads")
    actor = ray.remote(_Worker).options(num_cpus=threads, num_gpus=1 if gpus else 0)
    return [actor.remote(threads) for _ in range(gpus or max(1, cpus // threads))]
