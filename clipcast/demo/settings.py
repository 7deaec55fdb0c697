"""What a demo run is, checked before anything starts."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coordinator.recipe import FederationRecipe
from protocol.settings import BrokerSettings, SettingsError


@dataclass(frozen=True)
class DemoSettings:
    """One run of the demo."""

    clients: int
    rounds: int
    bits: Literal[4, 8]
    data: str
    partition: str
    seed: int
    out: Path
    broker: str | None
    recipe: FederationRecipe
    federation: str = field(default_factory=lambda: f"demo-{secrets.token_hex(3)}")  # two demos may share a broker

    @property
    def last_round(self) -> int:
        """Return the number of the federation's last round."""
        return self.rounds + self.recipe.rounds_after

    @classmethod
    def checked(
        cls, clients: int, rounds: int, bits: int, data: str, partition: str, seed: int, out: Path, broker: str | None
    ) -> DemoSettings:
        """Return the settings; raises SettingsError for what cannot work."""
        from clipcast.partition import parse_partition

        parse_partition(partition)
        # Its figures are of the global model: no closing round, which is for the clients' own.
        recipe = FederationRecipe.model_validate({"personal": {"closing_steps": 0}})
        if broker is not None:
            try:
                BrokerSettings(url=broker)
            except ValueError as error:
                raise SettingsError(f"--broker {broker!r} is not mqtt://HOST[:PORT] or mqtts://HOST[:PORT]") from error
        if bits == 4:
            return cls(clients, rounds, 4, data, partition, seed, out.absolute(), broker, recipe)
        if bits == 8:
            return cls(clients, rounds, 8, data, partition, seed, out.absolute(), broker, recipe)
        raise SettingsError(f"--bits {bits}: choose 4 or 8")
