"""From settings and profile to a running client: which bits, batch, device and threads are used."""

from __future__ import annotations

import logging
from functools import partial

import torch

from clip_lora.towers import default_device
from edge_client.checkpoint import Checkpoint
from edge_client.config import DIGITS, ClientConfig, Placement
from edge_client.data import find_pictures, open_dataset
from edge_client.participation import Participation
from edge_client.privacy.budget import Budget
from edge_client.train import Trainer
from edge_client.work import Work
from hardware_profiles.profile import Profile
from protocol.messages import Status

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"


def place(config: ClientConfig, profile: Profile) -> Placement:
    """Combine settings and profile: settings win; a GPU that torch cannot see is reported and not used."""
    device = config.device or profile.device
    if device == "cuda" and default_device() != "cuda":
        log.warning("no GPU that this torch can use: training on the CPU. Is torch built for this board?")
        device = "cpu"
    threads = config.threads or profile.threads
    if threads:
        torch.set_num_threads(threads)
    return Placement(
        config.bits or profile.bits,
        config.batch_size or profile.batch_size,
        profile.max_rank,
        device,
        config.min_prototype_count,
    )


def new_client(config: ClientConfig, profile: Profile, done: Work | None = None) -> tuple[Trainer, Participation, Status]:
    """Return what a client consists of besides its link: trainer, part in the federation, first status.

    `done` is what the outbox holds. Raises DataError if the pictures cannot be found, and LedgerError if the privacy ledger
    cannot be read: now, not when a round begins.
    """
    budget = Budget.open(config.state, config.max_epsilon, config.max_delta)
    if config.data != DIGITS:
        find_pictures(config.data)
    placement = place(config, profile)
    status = Status(
        state="online",
        profile=profile.name,
        bits=placement.bits,
        device=placement.device,
        max_rank=placement.max_rank,
    )
    pictures = partial(open_dataset, config.data)
    checkpoint = Checkpoint(config.state / CHECKPOINT)
    trainer = Trainer(config.id, pictures, placement, config.model, checkpoint=checkpoint, budget=budget)
    return trainer, Participation(status, done), status
