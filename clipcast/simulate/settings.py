"""What a simulation is, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipcast.partition import parse_partition
from coordinator.recipe import parse_recipe
from protocol.settings import SettingsError, explain_problem

Split = Literal["test", "validation"]
Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class SimulateSettings:
    """Several recipes on several seeds, everything else equal. `shots` None: all pictures."""

    data: str
    model: str
    bits: Literal[4, 8, 32]
    recipes: tuple[str, ...]
    seeds: int
    clients: int
    partition: str
    shots: int | None
    rounds: int
    out: Path
    engine: Engine = "local"
    jobs: int = 1
    threads: int = 1
    split: Split = "test"
    test_pictures: int | None = None
    templates: tuple[str, ...] = ("a photo of a {}",)

    def check(self) -> SimulateSettings:
        """Return the settings; raises SettingsError for what cannot work."""
        parse_partition(self.partition)
        for recipe in self.recipes:
            try:
                parse_recipe(recipe)
            except ValueError as error:
                raise SettingsError(f"--recipes {recipe!r}: {explain(error)}") from error
        if not self.recipes or len(set(self.recipes)) != len(self.recipes):
            raise SettingsError("--recipes names at least one recipe, each once")
        if self.bits not in (4, 8, 32):
            raise SettingsError(f"--bits {self.bits}: choose 4, 8 or 32")
        if self.engine not in ("local", "ray"):
            raise SettingsError(f"--engine {self.engine!r}: choose local or ray")
        if self.engine == "ray" and self.jobs > 1:
            raise SettingsError("--jobs and --engine ray exclude each other: Ray spreads the clients itself")
        if self.split not in ("test", "validation"):
            raise SettingsError(f"--split {self.split!r}: choose test or validation")
        return self


def parse_shots(text: str) -> int | None:
    """Read `all` or a number of pictures per class over all clients; raises SettingsError."""
    if text == "all":
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise SettingsError(f"--shots {text!r}: write all, or the number of pictures per class over all clients, e.g. 16")


def explain(error: ValueError) -> str:
    """Return the first line that says what is wrong: pydantic's errors begin with a count."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    return explain_problem(problem["loc"], problem["msg"], problem["type"])
