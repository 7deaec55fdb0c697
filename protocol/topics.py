"""Every MQTT topic of clipcast, as functions and one parser; nobody else writes a slash.

clipcast/1/<federation>/classes                        retained  newest class bank
clipcast/1/<federation>/round                          retained  newest round plan
clipcast/1/<federation>/release                        retained  newest release
clipcast/1/<federation>/key                            retained  the coordinator's keys, each signed by the one before
clipcast/1/<federation>/blob/<sha256>/<i>              chunk of a broadcast blob
clipcast/1/<federation>/to/<id>/<kind>                 coordinator to one client
clipcast/1/<federation>/from/<id>/<kind>               one client to the coordinator
clipcast/1/<federation>/from/<id>/blob/<sha256>/<i>    chunk of an upload
clipcast/1/<federation>/enrol/<nonce>/<kind>           a board that has no name yet asks to become a device, and is answered
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from protocol.errors import Refused, WireError

ROOT = "clipcast"
VERSION = "1"
BROADCASTS = ("classes", "round", "release", "key")
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}\Z")
SHA256 = re.compile(r"^[0-9a-f]{64}\Z")
NONCE = re.compile(r"^[0-9a-f]{32}\Z")
ENROLMENT = ("request", "answer")

Direction = Literal["all", "to", "from", "enrol"]


@dataclass(frozen=True)
class Address:
    """What a topic says: who talks to whom about what. `client` is None for a broadcast, and where a `nonce` stands."""

    federation: str
    direction: Direction
    kind: str
    client: str | None = None
    sha256: str | None = None
    index: int | None = None
    nonce: str | None = None


def check_name(name: str, what: str) -> str:
    """Return `name` if it may be one level of a topic, else raise WireError."""
    if not NAME.match(name):
        message = (
            f"{what} {name!r} cannot be used in a topic: 1 to 64 letters, digits, '-', '_' or '.', not starting with a sign"
        )
        raise WireError(message)
    return name


@dataclass(frozen=True)
class Topics:
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        check_name(self.federation, "federation")

    @property
    def _base(self) -> str:
        return f"{ROOT}/{VERSION}/{self.federation}"

    def broadcast(self, kind: str) -> str:
        """Return the retained topic of a broadcast manifest, e.g. kind "round"."""
        return f"{self._base}/{kind}"

    def blob(self, sha256: str, index: int) -> str:
        """Return the topic of chunk `index` of a broadcast blob."""
        return f"{self._base}/blob/{sha256}/{index}"

    def to(self, client: str, kind: str) -> str:
        """Return the topic on which the coordinator talks to one client."""
        return f"{self._base}/to/{check_name(client, 'client id')}/{kind}"

    def from_(self, client: str, kind: str) -> str:
        """Return the topic on which one client talks to the coordinator."""
        return f"{self._base}/from/{check_name(client, 'client id')}/{kind}"

    def upload(self, client: str, sha256: str, index: int) -> str:
        """Return the topic of chunk `index` of a client's upload."""
        return f"{self._base}/from/{check_name(client, 'client id')}/blob/{sha256}/{index}"

    def check(self, client: str, name: str) -> str:
        """Return a topic that a client may write to and nobody listens to: for measuring a broker."""
        return f"{self._base}/from/{check_name(client, 'client id')}/check/{check_name(name, 'check')}"

    def enrolment(self, nonce: str, kind: str) -> str:
        """Return the topic of a request to be enrolled, or of its answer; "+" as the nonce makes it a filter for all."""
        return f"{self._base}/enrol/{nonce}/{kind}"

    def blob_filter(self, sha256: str) -> str:
        """Return the filter for all chunks of one broadcast blob."""
        return f"{self._base}/blob/{sha256}/+"

    def client_filters(self, client: str) -> tuple[str, ...]:
        """Return what a client listens to besides the blobs it is fetching."""
        # The keys first: what follows may be signed with the newest.
        return (self.broadcast("key"), self.to(client, "+"), self.broadcast("classes"), self.broadcast("round"))

    def coordinator_filters(self) -> tuple[str, ...]:
        """Return what the coordinator listens to: all clients' manifests and chunks."""
        return (f"{self._base}/from/+/+", f"{self._base}/from/+/blob/+/+")

    def desk_filters(self) -> tuple[str, ...]:
        """Return what the desk that sends releases out listens to: what all devices want, and how they say it goes."""
        return (f"{self._base}/from/+/want", f"{self._base}/from/+/report")

    def status_filter(self) -> str:
        """Return the filter for every client's retained status."""
        return f"{self._base}/from/+/status"


def parse(topic: str) -> Address:
    """Read a topic back into its parts, or raise WireError."""
    parts = topic.split("/")
    if len(parts) < 4 or parts[0] != ROOT or parts[1] != VERSION or not NAME.match(parts[2]):
        raise Refused("wrong-topic", f"not a clipcast/{VERSION} topic: {topic[:120]!r}")
    address = _parse_rest(parts[2], parts[3:])
    if address is None:
        raise Refused("wrong-topic", f"no such topic: {topic[:120]!r}")
    return address


def _parse_rest(federation: str, rest: list[str]) -> Address | None:
    match rest:
        case [kind] if kind in BROADCASTS:
            return Address(federation, "all", kind)
        case ["blob", sha256, index] if _is_chunk(sha256, index):
            return Address(federation, "all", "blob", None, sha256, int(index))
        case [("to" | "from") as direction, client, kind] if NAME.match(client) and _is_personal(kind):
            return Address(federation, "to" if direction == "to" else "from", kind, client)
        case ["from", client, "blob", sha256, index] if NAME.match(client) and _is_chunk(sha256, index):
            return Address(federation, "from", "blob", client, sha256, int(index))
        case ["enrol", nonce, kind] if NONCE.match(nonce) and kind in ENROLMENT:
            return Address(federation, "enrol", kind, nonce=nonce)
        case _:
            return None


def _is_personal(kind: str) -> bool:
    """Whether this is said to or by one client: nothing that is said to all, nor a blob."""
    return bool(NAME.match(kind)) and kind not in (*BROADCASTS, "blob")


def _is_chunk(sha256: str, index: str) -> bool:
    return (
        bool(SHA256.match(sha256)) and index.isascii() and index.isdigit() and len(index) <= 5 and str(int(index)) == index
    )
