"""The one place that decides which parts of the method are on. A baseline is a recipe, never a fork of the code.

In a federation's TOML: `recipe = "fedalign"`, or a table with single overrides: `recipe = { name = "fedalign", mu = 0.2,
text = { steps = 50 } }`. docs/method.md says what each part does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clip_lora.errors import ModelError
from coordinator.defence import Defence
from protocol.messages import Projection, Recipe

Aggregation = Literal["mean_of_factors", "mean_of_products", "median", "trimmed_mean", "multi_krum", "none"]
Query = Literal["none", "R1", "R2", "R3", "identity"]
RecipeName = Literal["fedalign", "fedlora", "local", "zero-shot", "feddtl"]


class TextTraining(BaseModel):
    """How the coordinator trains its text side on uploaded features (docs/method.md, step 4); 0 steps: not at all.

    Few steps, anew from the pretrained tower in every round, generalise best; `continued` goes on from the last round's.
    With `aligning_round`, a round without local steps follows the last one: clients send features as the final global
    adapter sees them, so that image and text side fit each other at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    projections: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    first_block: Annotated[int, Field(ge=0)] = 0
    continued: bool = False
    aligning_round: bool = True
    prototypes_for_missing: bool = True
    balance_classes: bool = True


class Personalisation(BaseModel):
    """How clients' own adapters are made (docs/method.md, step 6).

    `start` says what the rounds' training starts from; with "global", own adapters serve inference and the closing round.
    Blocks below `cut` take the global adapter. `own_share` of the attention stays with the client itself. With
    `clusters` above 0 clients attend to so many cluster means instead of to each other. With `closing_steps`
    above 0 a last round follows in which each client takes so many steps from what it was sent and keeps the result, or
    with `ex_query`, what one more query makes of all results.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    query: Query = "none"
    start: Literal["global", "own"] = "global"
    tau_q: Annotated[float, Field(ge=1e-6)] = 0.1
    cut: Annotated[int, Field(ge=0)] = 0
    own_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    clusters: Annotated[int, Field(ge=0)] = 0
    closing_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    ex_query: bool = False

    @model_validator(mode="after")
    def _tau_is_a_number(self) -> Personalisation:
        if math.isnan(self.tau_q):
            raise ValueError("tau_q must be a number; inf gives everybody the global mean")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "fedalign": {"text": {"steps": 20}, "personal": {"query": "R1", "closing_steps": 10, "ex_query": True}},
    "fedlora": {"mu": 0.0, "features_per_class": 0},
    "local": {
        "mu": 0.0,
        "features_per_class": 0,
        "aggregation": "none",
        "personal": {"query": "identity", "start": "own", "closing_steps": 10},
    },
    "zero-shot": {"local_steps": 0, "features_per_class": 0, "aggregation": "none"},
    "feddtl": {"mu": 0.0, "first_block": -3, "text": {"steps": 20, "prototypes_for_missing": False}},
}


class FederationRecipe(Recipe):
    """What clients do (the inherited fields, which travel in the plan) and what the coordinator does.

    With `late_rounds` an update may come so many rounds after its own; its weight is multiplied by `late_discount` for each.
    A negative `first_block` counts from the last block: -3 adapts the last three, or all if there are fewer.
    """

    first_block: int = 0
    name: RecipeName = "fedalign"
    aggregation: Aggregation = "mean_of_factors"
    late_discount: Annotated[float, Field(gt=0, lt=1)] = 0.5
    text: TextTraining = TextTraining()
    personal: Personalisation = Personalisation()
    defence: Defence = Defence()

    @model_validator(mode="after")
    def _a_fits_the_aggregation(self) -> FederationRecipe:
        if self.aggregation in ("median", "trimmed_mean") and not self.freeze_a:
            raise ValueError(
                f"aggregation {self.aggregation} needs freeze_a = true: (c B, A / c) is the same adapter for every c, so "
                f"that single numbers of A and B can only be compared if all clients have the same A"
            )
        if self.aggregation == "mean_of_products" and self.freeze_a:
            raise ValueError(
                "aggregation mean_of_products makes a new A, freeze_a keeps it: choose mean_of_factors, which is exact then"
            )
        return self

    @property
    def mixes_ranks(self) -> bool:
        """Return whether devices may differ in rank: factors can be averaged at one rank only."""
        return self.aggregation in ("mean_of_products", "none")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, given: Any) -> Any:
        given = {"name": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping):
            return given
        name = given.get("name", "fedalign")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"no recipe {name!r}: choose one of {', '.join(PRESETS)}")
        return _merge({"name": name, **PRESETS[name]}, given)

    @property
    def rounds_after(self) -> int:
        """Return how many rounds follow a federation's training rounds: the aligning one, the closing one."""
        return int(self.aligns) + int(self.personal.closing_steps > 0)

    @property
    def aligns(self) -> bool:
        """Return whether an aligning round follows the training rounds."""
        return self.text.steps > 0 and self.text.aligning_round

    def training(self, depth: int) -> Recipe:
        """Return what travels to the clients, for an image tower of `depth` blocks; raises ModelError for a cut above."""
        fields = self.model_dump(include=set(Recipe.model_fields))
        if self.first_block < 0:
            fields["first_block"] = max(0, depth + self.first_block)
        if self.personal.cut > depth:
            raise ModelError(f"the recipe's personal.cut is {self.personal.cut}, the model's image tower has {depth} blocks")
        return Recipe.model_validate(fields)


def parse_recipe(text: str) -> FederationRecipe:
    """Read `NAME[+KEY=VALUE...]`, e.g. `fedalign+mu=0+personal.tau_q=inf+projections=q_proj/v_proj`; raises ValueError."""
    name, *overrides = text.split("+")
    given: dict[str, Any] = {"name": name}
    for override in overrides:
        path, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"{override!r} in recipe {text!r}: write KEY=VALUE, e.g. mu=0 or personal.tau_q=inf")
        *parents, key = path.split(".")
        if path == "name":
            raise ValueError(f"{override!r} in recipe {text!r}: the recipe's name is what comes before the first +")
        place = given
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{override!r} in recipe {text!r}: {parent} is a value, not a table of keys")  # noqa: TRY004
        place[key] = value.split("/") if key == "projections" else value
    return FederationRecipe.model_validate(given)


def _merge(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(preset)
    for key, value in given.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
