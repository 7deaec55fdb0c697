"""A training under way, on disk: a power cut costs an epoch, or ten seconds if that is longer, and no bit of the result.

Kept are the adapter, the optimiser's moments and step counts, the number of steps taken and their summed loss. The random
state needs no place: batches are drawn from the round's seed, and those already taken are skipped.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from protocol.storage.files import remove_halves, write_atomic

log = logging.getLogger(__name__)

EVERY_S = 10.0
Parameters = Sequence[torch.nn.Parameter]


class Checkpoint:
    """The last epoch's end of one training, in the file `path`."""

    def __init__(self, path: Path, every_s: float = EVERY_S) -> None:
        self._path = path
        with contextlib.suppress(OSError):
            remove_halves(path)  # a power cut while it was written leaves one of its size, each time
        self._every_s = every_s
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last `save` is long enough ago: flash memory wears out, and a short epoch is soon done again."""
        return time.monotonic() - self._last >= self._every_s

    def save(self, work: str, step: int, loss: float, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
        """Keep where the training `work` is. A disk that takes no more is told and changes nothing."""
        tensors = {f"parameter.{i}": parameter.detach().cpu().contiguous() for i, parameter in enumerate(parameters)}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{key}.{i}": value.detach().cpu().contiguous() for key, value in state.items()}
        try:
            write_atomic(self._path, save(tensors, {"work": work, "step": str(step), "loss": loss.hex()}))
        except OSError as error:
            log.warning("no checkpoint could be written: %s", error)
        self._last = time.monotonic()

    def work(self) -> str | None:
        """Return which training was begun and is kept here."""
        with contextlib.suppress(OSError, SafetensorError), safe_open(self._path, "pt") as file:
            return (file.metadata() or {}).get("work")
        return None

    def load(self, work: str, parameters: Parameters, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Put parameters and optimiser where `work` was; return steps taken and their summed loss, (0, 0.0) if unknown."""
        self._last = time.monotonic()
        try:
            with safe_open(self._path, "pt") as file:
                about = file.metadata() or {}
                if about.get("work") != work:
                    return 0, 0.0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            step, loss = int(about["step"]), float.fromhex(about["loss"])
            values = [tensors.pop(f"parameter.{i}").view(parameter.shape) for i, parameter in enumerate(parameters)]
        except FileNotFoundError:
            return 0, 0.0
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            log.warning("the checkpoint cannot be used, the round is trained from its beginning: %s", error)
            return 0, 0.0
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            key, i = name.rsplit(".", 1)
            state.setdefault(int(i), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        log.info("the training goes on after step %d", step)
        return step, loss

    def clear(self) -> None:
        """Forget it: the training is over. If it cannot be removed, it is of no other training."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the checkpoint cannot be removed: %s", error)
