"""A kind of device as data: schema and loader. One TOML = one device; the file name is the profile's name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


class ProfileError(ValueError):
    """A profile that does not exist or cannot be read."""


class Fact(BaseModel):
    """A number or word with where it is from; `verified` only if it was measured on the device."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float | str
    unit: str = ""
    source: str
    verified: bool


class Identity(BaseModel):
    """How a board is recognised: entries of its device tree's `compatible`, and the range of MemTotal in MiB."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    compatible: tuple[str, ...] = ()
    mem_total_mib: tuple[int, int] = (0, 2**31)


class Profile(BaseModel):
    """What training and inference take from a device; everything can be overridden in the client's TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    title: str
    device: Literal["cpu", "cuda"]
    bits: Literal[4, 8, 32]
    batch_size: Annotated[int, Field(ge=1)]
    max_rank: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=0)]
    onnx_providers: tuple[str, ...]
    notes: str = ""
    identity: Identity = Identity()
    facts: dict[str, Fact] = {}


def names() -> list[str]:
    """Return the names of all profiles, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Profile:
    """Return a profile by name; raises ProfileError with the names there are."""
    path = FOLDER / f"{name}.toml"
    if name not in names():
        raise ProfileError(f"no profile {name!r}; there are {', '.join(names())}")
    try:
        return Profile.model_validate({"name": name, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{path}: {error}") from error
