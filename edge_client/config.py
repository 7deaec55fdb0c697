"""What one device needs to know, from one TOML. Blanks are filled from the hardware profile and the class bank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from edge_client.enrolment import EnrolmentSettings, enrolled_id
from protocol.envelope import RESERVED
from protocol.messages import Name, Recipe
from protocol.settings import BrokerSettings, beside, load_settings, model_beside
from protocol.trust.signing import public_key

DIGITS = "digits"

TEMPLATE = """\
# clipcast edge client. `clipcast client run {file}` starts it.

id = "{id}"                      # unique in the federation; becomes part of MQTT topics. Without it: as enrolled
federation = "{federation}"         # as the coordinator names it

# A folder of pictures with one sub-folder per class, or "digits" (scikit-learn's handwritten digits, for a first try).
data = "{data}"

# state = "{id}-state"           # what survives a restart: downloads, and the update until its receipt
# coordinator_key = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"  # see `clipcast coordinator key`; else the first one seen
# profile = "generic-cpu"        # a name from `clipcast profiles list`; without it the board is detected
# bits = 4                       # 4, 8 or 32: overrides the profile
# batch_size = 16                # upper limit for this device; the federation's recipe may ask for less
# threads = 2                    # CPU threads for training
# device = "cuda"                # "cpu" or "cuda"; without it the profile decides
# min_prototype_count = 20       # classes of fewer pictures stay on this device; the recipe may ask for more, not for less
# max_epsilon = 8.0              # plans without differential privacy, or beyond this epsilon in all, are refused
# max_delta = 1e-5               # the largest delta at which that is counted
# metrics = "127.0.0.1:9464"     # answers Prometheus there: `pip install 'clipcast[metrics]'`
# model = "/opt/models/clip"     # a local copy of the federation's model; without it the federation's name is loaded

[broker]
url = "{broker}"
# username = "{id}"
# password_file = "password.txt"
# ca_file = "ca.pem"             # with mqtts:// and a private authority
# tls_version = "1.2"            # the oldest TLS that is spoken; 1.3 unless the broker knows no better

# [enrolment]                    # for `clipcast client enrol`, which gets this device its id and certificate
# cert_file = "enrol.pem"        # the certificate with which any board of the lab may ask
# key_file = "enrol.key"
# token_file = "claim.token"     # what `clipcast device add ID` prints on the coordinator
"""


class ClientConfig(BaseModel):
    """One edge client. Without `data` it trains nothing, and may answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: Name
    federation: Name
    data: str | None = None
    state: Annotated[Path, Field(validate_default=True)] = Path()
    coordinator_key: str | None = None
    profile: str | None = None
    bits: Literal[4, 8, 32] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    device: Literal["cpu", "cuda"] | None = None
    min_prototype_count: Annotated[int, Field(ge=1)] = 1
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    metrics: Annotated[str, Field(pattern=r"^[^\s:]+:[0-9]{1,5}$")] | None = None
    model: str | None = None
    broker: BrokerSettings = BrokerSettings()
    enrolment: EnrolmentSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _named_by_enrolment(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("state"), str):
            return data
        name = enrolled_id(Path(beside(data["state"], info)))
        if "id" in data:
            if name not in (None, data["id"]):
                raise ValueError(f"this device was enrolled as {name!r}, `id` says another: leave `id` out")
            return data
        if name is None:
            raise ValueError("this device has no id yet: `clipcast client enrol` gets it one, or write `id` here")
        return {"id": name, **data}

    @field_validator("id")
    @classmethod
    def _is_a_device(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name!r} is not a device's name: give this device another id")
        return name

    @field_validator("data")
    @classmethod
    def _relative_to_the_file(cls, data: str | None, info: ValidationInfo) -> str | None:
        return data if data in (None, DIGITS) else beside(str(data), info)

    @field_validator("state")
    @classmethod
    def _state_beside_the_file(cls, state: Path, info: ValidationInfo) -> Path:
        default = f"{info.data.get('id', 'client')}-state"
        return Path(beside(default if state == Path() else str(state), info))

    @field_validator("coordinator_key")
    @classmethod
    def _is_a_key(cls, key: str | None) -> str | None:
        if key is not None:
            public_key(key)
        return key

    @field_validator("model")
    @classmethod
    def _model_beside_the_file(cls, model: str | None, info: ValidationInfo) -> str | None:
        return None if model is None else model_beside(model, info)


@dataclass(frozen=True)
class Placement:
    """How this device trains: settings over profile. `batch_size` and `max_rank` are upper limits.

    `min_prototype_count` is a lower one: of two, the plan's and the device's own, the larger counts. `fallback` says what
    is other than settings and profile ask for, and why.
    """

    bits: Literal[4, 8, 32]
    batch_size: int
    max_rank: int
    device: Literal["cpu", "cuda"]
    min_prototype_count: int = 1
    dtype: str = "auto"
    checkpointing: bool = False
    fallback: str = ""

    def numerics(self) -> tuple[int, str, str]:
        """Return what decides over bits of the result, besides the batch."""
        return self.bits, self.device, self.dtype

    def smaller(self, why: str, batch: int) -> Placement:
        """Return a placement that needs less memory: half of `batch`, and blocks computed again on the way back."""
        size = max(1, batch // 2)
        return replace(self, batch_size=size, checkpointing=True, fallback=told(self.fallback, f"batches of {size}: {why}"))

    def stricter(self, recipe: Recipe) -> Recipe:
        """Return the recipe as this device carries it out."""
        least = max(recipe.min_prototype_count, self.min_prototype_count)
        return recipe.model_copy(update={"min_prototype_count": least})


def told(*reasons: str) -> str:
    """Return reasons as one text that fits a status."""
    return "; ".join(reason for reason in reasons if reason)[:500]


def load(path: Path) -> ClientConfig:
    """Read a client's TOML; raises SettingsError."""
    return load_settings(path, ClientConfig, "clipcast client init")
