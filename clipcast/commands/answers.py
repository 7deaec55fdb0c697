"""What `infer`, `serve`, `watch` and `bench` answer with: a model for this board, which releases may replace."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_client.inference.answering import Answering
    from edge_client.inference.model import Model
    from edge_client.inference.providers import Runtime


def open_model(model: Path, adapter: Path | None, provider: str, profile: str, threads: int = 0) -> Model:
    """Load a model for this board; raises InferenceError, ProfileError."""
    from edge_client.inference.model import Model

    return Model.open(model, runtime_here(provider, profile, threads)[0], adapter=adapter)


@contextlib.contextmanager
def answering_with(
    model: Path | None, adapter: Path | None, releases: Path | None, provider: str, profile: str, threads: int
) -> Iterator[Answering]:
    """Give what answers; with `releases`, a client's settings, follow releases meanwhile.

    Raises InferenceError, ProfileError, SettingsError, StateError.
    """
    from edge_client.inference.answering import Answering
    from edge_client.inference.model import Model

    runtime, board = runtime_here(provider, profile, threads)
    if releases is None:
        assert model is not None
        yield Answering(Model.open(model, runtime, adapter=adapter))
        return
    from edge_client.config import load
    from edge_client.releases.following import following

    config = load(releases)
    with following(config, profile or config.profile or board, model, adapter, runtime) as answering:
        yield answering


def runtime_here(provider: str, profile: str, threads: int) -> tuple[Runtime, str]:
    """Return how models are run on this board, and the name of its profile."""
    from edge_client.inference.providers import runtime_for
    from hardware_profiles.detect import detect
    from hardware_profiles.profile import load

    board = load(profile) if profile else detect().profile
    return runtime_for(board, provider, threads, engines()), board.name


def engines() -> Path:
    """Return where engines that a provider has built are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "clipcast" / "engines"
