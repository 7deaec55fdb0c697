"""What a data file says, with where it is from; and how such files are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


class ProfileError(ValueError):
    """A profile, a platform or a kind of processor that does not exist or cannot be read."""


class Frozen(BaseModel):
    """A record that does not change and has no keys but those it names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(Frozen):
    """A number, word or list with where it is from.

    `verified` only if this project measured it on such a device, or looked it up in the thing itself.
    """

    value: bool | int | float | str | tuple[str, ...]
    unit: str = ""
    source: Annotated[str, Field(min_length=10)]
    verified: bool

    def __str__(self) -> str:
        """Return value and unit, and the mark of what nobody here has measured."""
        value = ", ".join(self.value) if isinstance(self.value, tuple) else self.value
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        return f"{shown} {self.unit}".rstrip() + ("" if self.verified else " (not verified)")


Record = TypeVar("Record", bound=BaseModel)


def names_in(folder: str) -> list[str]:
    """Return the names of the data files in a folder of this package, sorted."""
    return sorted(path.stem for path in (FOLDER / folder).glob("*.toml"))


def read_named(folder: str, name: str, what: str) -> dict[str, Any]:
    """Return a data file as it stands; raises ProfileError, with the names there are or where the file is wrong."""
    if name not in names_in(folder):
        raise ProfileError(f"no {what} {name!r}; there are {', '.join(names_in(folder))}")
    path = FOLDER / folder / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{path}: {error}") from error


def made_of(kind: type[Record], folder: str, name: str, data: dict[str, Any]) -> Record:
    """Return a data file's contents as a record; raises ProfileError naming file and key."""
    try:
        return kind.model_validate({"name": name, **data})
    except ValidationError as error:
        raise ProfileError(f"{FOLDER / folder / name}.toml: {error}") from error
