"""What a federation is, from one TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from coordinator.recipe import FederationRecipe
from protocol.messages import Name
from protocol.settings import BrokerSettings, beside, load_settings, model_beside

TEMPLATE = """\
# clipcast coordinator. `clipcast coordinator run {file}` starts it.

federation = "{federation}"                 # one word; becomes part of MQTT topics
classes = [{classes}]
templates = ["a photo of a {{}}"]       # {{}} is replaced by the class name; several are averaged
model = "tiny-clip"                   # tiny-clip, a folder in transformers' format, or e.g. "openai/clip-vit-base-patch32"

rounds = 5                            # of training; the recipe's aligning and closing round follow
clients_per_round = 2                 # drawn from the clients that are online
quorum = 2                            # so many accepted updates close a round
deadline_s = 600                      # a round without its quorum by then is given up, and the next one begins
seed = 0
state = "state"                       # adapters and the journal of every round; a restart continues from here
# journal = "postgresql+pg8000://clipcast@labserver/clipcast"   # instead of state/journal.db; one database a federation
# authority = "ca"                    # the lab's (`clipcast ca init`): who has a claim (`clipcast device add`) is enrolled
# admission = "open"                  # "registered": only devices that `clipcast device add` has let in may take part
# seal_updates = true                 # only this coordinator can read what devices send; false: the broker can, too
# uploads_at_once = 8                 # so many clients upload at a time, the others wait with their updates on their disks
# keep_rounds = 100                   # so many rounds' adapters stay on the disk, and the records of all

# What is trained, and how. Without further keys the recipe is as published in docs/method.md; every key overrides it alone.
[recipe]
name = "fedalign"                     # fedalign, fedlora, local, zero-shot or feddtl
# aggregation = "mean_of_factors"     # "mean_of_products" averages B A exactly and lets devices differ in rank; or "none".
                                      # Against malicious devices: "multi_krum"; "median", "trimmed_mean" with freeze_a
# freeze_a = false                    # true trains B alone and keeps A as it was initialised
rank = 4
alpha = 8.0
projections = ["q_proj", "k_proj", "v_proj", "out_proj"]
# first_block = 0                     # blocks below this one stay as they are; -3 adapts the last three
learning_rate = 3e-3
local_steps = 15                      # optimiser steps of a client in a round
batch_size = 16
# mu = 0.1                            # weight of the orthogonal loss
# features_per_class = 16             # features a client uploads in a round; 0 uploads none
# late_rounds = 0                     # an update may come so many rounds late; it then counts in the average alone
# late_discount = 0.5                 # its weight is multiplied by this for each round
# features_of = "all"                 # "correct": of correctly predicted pictures only
# min_prototype_count = 5             # of a class with fewer pictures on a device, neither prototype nor count leaves it

# [recipe.privacy]                    # needs features_per_class = 0, and the extra `privacy` on the devices
# clip = 0.1                          # L2 bound on the adapter's whole change in a round
# noise_multiplier = 2.0              # noise over the sensitivity to one picture; docs/security.md says what it costs
# delta = 1e-5
# epsilon = 8.0                       # no device goes beyond, in all its rounds and runs

# [recipe.text]                       # the coordinator's own training, on the uploaded features
# steps = 20                          # 0 leaves the text side as it is
# prototypes_for_missing = true       # a class without a feature is represented by its prototypes
# balance_classes = true
# continued = false                   # true goes on from the last round instead of beginning anew
# aligning_round = true               # after the last round: fit the text side to the final global adapter

# [recipe.personal]                   # each client's own adapter
# query = "R1"                        # R1, R2, R3, identity (everybody keeps their own) or none (all take the global one)
# start = "global"                    # what a round starts from: the global adapter for all, or "own"
# tau_q = 0.1                         # small listens to the alike, inf to all
# cut = 0                             # blocks below take the global adapter
# own_share = 0.0                     # share of the attention that stays with the client itself
# clusters = 0                        # for fleets: attend to so many cluster means instead of to every client
# closing_steps = 10                  # a last round in which each client takes so many steps from its own adapter
# ex_query = true                     # one more query over their results

# [recipe.defence]                    # against devices that lie; limits are multiples of the round's median, inf is none
# norm_limit = 4.0                    # larger adapters do not count
# over_limit = "reject"               # "clip" scales them down instead
# sample_cap = 4.0                    # more samples weigh no more
# malicious_share = 0.2               # so many of the clients trimmed_mean and multi_krum are prepared for

[broker]
url = "{broker}"                      # mqtts:// for TLS
# username = "coordinator"
# password_file = "password.txt"
# ca_file = "ca.pem"
# tls_version = "1.2"                 # the oldest TLS that is spoken; 1.3 unless the broker knows no better
"""


class CoordinatorConfig(BaseModel):
    """One federation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    federation: Name
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {}",)
    model: str = "tiny-clip"
    rounds: Annotated[int, Field(ge=1)] = 5
    clients_per_round: Annotated[int, Field(ge=1)] = 2
    quorum: Annotated[int, Field(ge=1)] = 2
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    seed: Annotated[int, Field(ge=0, le=2**40)] = 0
    state: Annotated[Path, Field(validate_default=True)] = Path("state")
    journal: str | None = None
    authority: Path | None = None
    admission: Literal["open", "registered"] = "open"
    seal_updates: bool = True
    uploads_at_once: Annotated[int, Field(ge=1)] = 8
    keep_rounds: Annotated[int, Field(ge=1)] = 100
    recipe: FederationRecipe = FederationRecipe()
    broker: BrokerSettings = BrokerSettings()

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if (template.count("{}"), template.count("{"), template.count("}")) != (1, 1, 1):
                raise ValueError(
                    f"template {template!r} needs exactly one {{}} where the class name goes, and no other braces"
                )
        return templates

    @field_validator("state", "authority")
    @classmethod
    def _relative_to_the_file(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else Path(beside(str(path), info))

    @field_validator("model")
    @classmethod
    def _model_beside_the_file(cls, model: str, info: ValidationInfo) -> str:
        return model_beside(model, info)

    @model_validator(mode="after")
    def _fits(self) -> CoordinatorConfig:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must differ from each other")
        if self.quorum > self.clients_per_round:
            raise ValueError(f"quorum {self.quorum} can never be reached with clients_per_round {self.clients_per_round}")
        return self


def load(path: Path) -> CoordinatorConfig:
    """Read a coordinator's TOML; raises SettingsError."""
    return load_settings(path, CoordinatorConfig, "clipcast coordinator init")
