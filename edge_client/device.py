"""From settings and profile to a running client: which bits, batch, device and threads are used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from clip_lora.towers import as_dtype
from edge_client.checkpoint import Checkpoint
from edge_client.config import DIGITS, ClientConfig, Placement, told
from edge_client.data import find_pictures, open_dataset
from edge_client.errors import DataError
from edge_client.participation import Participation
from edge_client.privacy.budget import Budget
from edge_client.probes import kernel, quantised
from edge_client.trainer import Trainer
from edge_client.work import Work
from hardware_profiles.profile import Profile
from protocol.messages import Status

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"


def place(config: ClientConfig, profile: Profile) -> Placement:
    """Combine settings and profile: settings win. What does not run here is reported and not used, by trying it."""
    threads = config.threads or profile.threads
    if threads:
        torch.set_num_threads(threads)
    device, bits, reasons = config.device or profile.device, config.bits or profile.bits, []
    if device == "cuda" and (problem := kernel(device)):
        reasons.append(f"the CPU instead of the GPU: {problem}")
        device = "cpu"
    dtype = profile.dtype if device == profile.device else "auto"
    if bits != 32 and (problem := quantised(bits, device, as_dtype(dtype, device))):
        reasons.append(f"a base that is not quantised instead of {bits} bits: {problem}")
        bits = 32
    for reason in reasons:
        log.warning("%s. `clipcast doctor` says more", reason)
    return Placement(
        bits,
        config.batch_size or profile.batch_size,
        profile.max_rank,
        device,
        config.min_prototype_count,
        dtype,
        fallback=told(*reasons),
    )


def new_client(
    config: ClientConfig, profile: Profile, done: Work | None = None, report: Callable[[str], None] = lambda _: None
) -> tuple[Trainer, Participation, Status]:
    """Return what a client consists of besides its link: trainer, part in the federation, first status.

    `done` is what the outbox holds; `report` is told what is done other than the settings ask for. Raises DataError if the
    pictures cannot be found, and LedgerError if the privacy ledger cannot be read: now, not when a round begins.
    """
    if config.data is None:
        raise DataError("`data` is missing in the settings: name a folder of pictures with one sub-folder per class")
    budget = Budget.open(config.state, config.max_epsilon, config.max_delta)
    if config.data != DIGITS:
        find_pictures(config.data)
    placement = place(config, profile)
    report(placement.fallback)
    status = Status(
        state="online",
        profile=profile.name,
        bits=placement.bits,
        device=placement.device,
        max_rank=placement.max_rank,
    )
    pictures = partial(open_dataset, config.data)
    checkpoint = Checkpoint(config.state / CHECKPOINT)
    trainer = Trainer(
        config.id,
        pictures,
        placement,
        config.model,
        checkpoint=checkpoint,
        budget=budget,
        report=report,
        root=Path("/"),
    )
    return trainer, Participation(status, done), status
