"""TOML settings, read strictly: an unknown key is an error that names it. And the broker section that both sides share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings", bound=BaseModel)
PORTS = {"mqtt": 1883, "mqtts": 8883}


class SettingsError(ValueError):
    """A settings file that cannot be read; the message says where, what, and what to do."""


class BrokerSettings(BaseModel):
    """Where the broker is and how to be let in. `mqtts://` means TLS; `ca_file` is needed for a private authority.

    `tls_version` is the oldest version of TLS that is spoken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    url: str = "mqtt://localhost:1883"
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    tls_version: Literal["1.3", "1.2"] = "1.3"
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 30
    connect_timeout_s: Annotated[float, Field(gt=0)] = 20.0

    @field_validator("url")
    @classmethod
    def _url_has_scheme_and_host(cls, url: str) -> str:
        parts = urlsplit(url)
        extra = parts.username or parts.password or parts.query or parts.fragment or parts.path not in ("", "/")
        if parts.scheme not in PORTS or not parts.hostname or extra or not _port_is_valid(url):
            raise ValueError(
                f"{url!r} is not mqtt://HOST[:PORT] or mqtts://HOST[:PORT]; user and password have keys of their own"
            )
        return url

    @field_validator("password_file", "ca_file", "cert_file", "key_file")
    @classmethod
    def _relative_to_the_file(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return None if path is None else Path(beside(str(path), info))

    @model_validator(mode="after")
    def _certificates_need_tls(self) -> BrokerSettings:
        if (self.ca_file or self.cert_file) and not self.tls:
            raise ValueError("ca_file and cert_file have no effect on mqtt://: write mqtts:// in url")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        return self

    @property
    def tls(self) -> bool:
        """Whether the link is encrypted."""
        return urlsplit(self.url).scheme == "mqtts"

    @property
    def host(self) -> str:
        """The broker's host name or address."""
        return urlsplit(self.url).hostname or "localhost"

    @property
    def port(self) -> int:
        """The broker's TCP port."""
        parts = urlsplit(self.url)
        return parts.port or PORTS[parts.scheme]

    def password(self) -> str | None:
        """Return what is in the password file, if one is named; raises OSError."""
        return self.password_file.read_text().strip() if self.password_file else None


class Participant(BaseModel):
    """What a coordinator's settings and a client's have in common; the rest is ignored. A coordinator's have no `id`."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    federation: str
    id: str = "coordinator"
    broker: BrokerSettings = BrokerSettings()


def beside(path: str, info: ValidationInfo) -> str:
    """Return a path of a settings file relative to that file's folder; for validators."""
    folder: Path | None = (info.context or {}).get("folder")
    return path if folder is None else str(folder / Path(path).expanduser())


def model_beside(name: str, info: ValidationInfo) -> str:
    """Return a model's name as it is, or its folder, if it is written as a path, relative to the settings file."""
    return beside(name, info) if name.startswith((".", "~", "/")) else name


def load_settings(path: Path, schema: type[Settings], command: str) -> Settings:
    """Read `path` as `schema`. Relative paths inside are relative to the file. `command` is what would make a new one.

    Raises SettingsError with every problem found, one a line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such file. `{command}` writes one to start from.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as TOML: {error}") from error
    return parse_settings(text, path, schema)


def parse_settings(text: str, path: Path, schema: type[Settings]) -> Settings:
    """Read the TOML `text` of the file `path`, which need not exist yet; raises SettingsError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: cannot be read as TOML: {error}") from error
    return settings_of(data, schema, path)


def settings_of(data: dict[str, Any], schema: type[Settings], path: Path | None = None) -> Settings:
    """Read settings that came from the file `path`, or from a command's options; raises SettingsError."""
    try:
        return schema.model_validate(data, context={"folder": path.absolute().parent} if path else None)
    except ValidationError as error:
        lines = [explain_problem(problem["loc"], problem["msg"], problem["type"]) for problem in error.errors()]
        where = f"{path}:" if path else "these options cannot be used:"
        raise SettingsError(f"{where}\n" + "\n".join(f"  {line}" for line in lines)) from error


def _port_is_valid(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def explain_problem(location: tuple[int | str, ...], message: str, kind: str) -> str:
    """Say what is wrong with a setting: where pydantic found it, what it said, and of which type the error is."""
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return f"unknown key {key!r}: remove it or correct its spelling"
    if kind == "missing":
        return f"key {key!r} is missing"
    said = message.removeprefix("Value error, ")
    return f"{key}: {said}" if key else said
