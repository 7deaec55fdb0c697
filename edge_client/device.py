"""From settings and profile to a running client: which bits, batch, device and threads are used."""

from __future__ import annotations

import logging
from functools import partial

import torch

from clip_lora.towers import default_device
from edge_client.config import ClientConfig, Placement
from edge_client.data import open_dataset
from edge_client.outbox import Work
from edge_client.participation import Participation
from edge_client.train import Trainer
from hardware_profiles.profile import Profile
from protocol.messages import Status

log = logging.getLogger(__name__)


def place(config: ClientConfig, profile: Profile) -> Placement:
    """Combine settings and profile: settings win; a GPU that torch cannot see is reported and not used."""
    device = config.device or profile.device
    if device == "cuda" and default_device() != "cuda":
        log.warning("no GPU that this torch can use: training on the CPU. Is torch built for this board?")
        device = "cpu"
    threads = config.threads or profile.threads
    if threads:
        torch.set_num_threads(threads)
    return Placement(config.bits or profile.bits, config.batch_size or profile.batch_size, profile.max_rank, device)


def new_client(config: ClientConfig, profile: Profile, done: Work | None = None) -> tuple[Trainer, Participation, Status]:
    """Return what a client consists of besides its link: trainer, part in the federation, first status.

    `done` is what the outbox holds.
    """
    placement = place(config, profile)
    status = Status(
        state="online",
        profile=profile.name,
        bits=placement.bits,
        device=placement.device,
        max_rank=placement.max_rank,
    )
    trainer = Trainer(config.id, partial(open_dataset, config.data), placement, config.model)
    return trainer, Participation(status, done), status
