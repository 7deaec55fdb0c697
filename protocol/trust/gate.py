"""The gate: what has to be true of a message before its content is looked at. Cheapest checks first, each with a verdict."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Protocol

from protocol.doublings import worth_telling
from protocol.envelope import COORDINATOR, RESERVED, Envelope, decode
from protocol.errors import KeyFileError, Refused, WireError
from protocol.messages import Status
from protocol.storage.files import write_atomic
from protocol.topics import Address
from protocol.trust.instances import Instances
from protocol.trust.notices import CLONED
from protocol.trust.signing import MAX_TOKEN, opened, public_key, signer_of
from protocol.trust.succession import leads_to, newest

log = logging.getLogger(__name__)

RETAINED = frozenset(("classes", "round", "adapter", "release", "report"))
LASTING = (*sorted(RETAINED), "receipt", "notice")


class Trust(Protocol):
    """Whose key counts."""

    def check(self, sender: str, key: str) -> None:
        """Raise Refused unless `sender` may sign with `key`, or is not known yet and may become so."""

    def admit(self, sender: str, key: str) -> None:
        """Take in a sender whose first message has passed the gate; does nothing if it is known."""


class Anchor(Trust, Protocol):
    """Whose key counts at a client, which follows its coordinator from key to key."""

    def follow(self, chain: bytes, federation: str) -> bool:
        """Take in the coordinator's statements; return whether they lead to another key, which counts from now on."""


class FirstUse:
    """Trusts the key that a sender is first seen with, and no other from then on, for as long as this process runs."""

    def __init__(self, keys: dict[str, str] | None = None) -> None:
        self._keys = dict(keys or {})

    def check(self, sender: str, key: str) -> None:
        """Raise Refused if the sender is known by another key."""
        if self._keys.get(sender, key) != key:
            raise Refused("wrong-key", f"{sender} is known by another key than {key[:12]}")

    def admit(self, sender: str, key: str) -> None:
        """Remember the sender's key."""
        self._keys.setdefault(sender, key)

    def follow(self, chain: bytes, federation: str) -> bool:
        """Follow the coordinator to its newest key."""
        known = self._keys.get(COORDINATOR)
        if known is not None:
            self._keys[COORDINATOR] = newest(chain, federation, known)
        return self._keys.get(COORDINATOR) != known


class Pinned:
    """Trusts one coordinator: by the key in the settings, or else by the first one seen, kept in the file `path`.

    Where that key has led to by the coordinator's statements is kept beside it, in `coordinator.followed`.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self._path = path
        self._followed = path.with_suffix(".followed")
        self._given = key
        self._first = key or self._read()
        self._kept = self._first is not None
        self._key = self._first and self._led_to(self._first)

    def check(self, sender: str, key: str) -> None:
        """Raise Refused if this is not the coordinator's key."""
        if sender == COORDINATOR and self._key not in (None, key):
            source = "the settings' `coordinator_key`" if self._given else f"{self._path}, pinned at the first contact"
            raise Refused(
                "wrong-key",
                f"signed with {key}, which is not the coordinator's key ({source}). If the coordinator was set up anew, "
                f"put the key that `clipcast coordinator key` prints there",
            )

    def admit(self, sender: str, key: str) -> None:
        """Pin the first coordinator seen; in memory if the disk does not take it, and again when it next says something."""
        if sender != COORDINATOR or self._kept:
            return
        self._first = self._key = key
        try:
            write_atomic(self._path, key.encode())
        except OSError as error:
            log.warning("%s cannot be written, a restart would believe another coordinator: %s", self._path, error)
            return
        self._kept = True
        log.info("from now on the coordinator's key is %s", key)

    def follow(self, chain: bytes, federation: str) -> bool:
        """Follow the coordinator to its newest key; return whether there is one."""
        if self._first is None or self._key is None:
            return False
        key = newest(chain, federation, self._key)
        if key == self._key:
            if not leads_to(chain, federation, key):
                log.warning("the key statements at the broker do not lead to the coordinator's key: who has an old one?")
            return False
        try:
            write_atomic(self._followed, f"{self._first}\n{key}".encode())
        except OSError as error:  # a restart is led there again
            log.warning("%s cannot be written: %s", self._followed, error)
        self._key = key
        log.info("the coordinator has a new key, by a statement of its old one: %s", key)
        return True

    def _led_to(self, first: str) -> str:
        try:
            start, _, key = self._followed.read_text(encoding="ascii").partition("\n")
            public_key(key)
        except FileNotFoundError:
            return first
        except (OSError, ValueError) as error:
            raise KeyFileError(
                f"{self._followed} cannot be read: {error}. Remove it; the coordinator's statements lead there again"
            ) from error
        return key if start == first else first  # else the operator has put another key in its place

    def _read(self) -> str | None:
        try:
            key = self._path.read_text(encoding="ascii").strip()
            public_key(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise KeyFileError(f"{self._path} cannot be read as a key: {error}. Put the coordinator's key there") from error
        return key


class Gate:
    """Lets in what a known sender has signed for this topic, once. `counts` says how much was refused, by verdict."""

    def __init__(self, federation: str, trust: Trust, marks: Path | None = None) -> None:
        """Remember in the file `marks` how far the numbers of lasting manifests have risen, or only in memory."""
        self.counts: Counter[str] = Counter()
        self._federation = federation
        self._trust = trust
        self._marks = marks
        self._seen: dict[tuple[str, str, str], int] = {}  # by sender, key and kind
        self._instances: dict[str, Instances] = {}
        if marks is not None:
            key, numbers = _read_marks(marks)
            self._seen = {(COORDINATOR, key, kind): number for kind, number in numbers.items()}

    def refuse(self, topic: str, error: WireError) -> Refused:
        """Count and log what was not let in, and return it with its verdict: "malformed" if it has no other."""
        refused = error if isinstance(error, Refused) else Refused("malformed", str(error))
        self.counts[refused.verdict] += 1
        note(self.counts, topic, refused)
        return refused

    def unwanted(self) -> None:
        """Count a chunk that nobody waits for: late, said twice, or made up."""
        self.counts["unwanted"] += 1

    def forget(self, sender: str) -> None:
        """Judge anew which processes speak under a name: it has another key, or another device was switched off."""
        self._instances.pop(sender, None)

    def open(self, address: Address, payload: bytes) -> Envelope:
        """Return the manifest inside; raises Refused, which names the verdict."""
        if len(payload) > MAX_TOKEN:
            raise Refused("too-long", f"{len(payload)} bytes, a manifest has at most {MAX_TOKEN}")
        sender = COORDINATOR if address.direction != "from" else address.client
        unknown = address.federation != self._federation or address.direction == "enrol"
        if sender is None or unknown or address.client in RESERVED:
            raise Refused("wrong-topic", f"nobody speaks on {address}")
        key = signer_of(payload)
        self._trust.check(sender, key)
        try:
            envelope = decode(opened(payload, key))
        except Refused:
            raise
        except WireError as error:
            raise Refused("malformed", str(error)) from error
        said = (envelope.federation, envelope.sender, envelope.manifest.kind, envelope.to)
        if said != (address.federation, sender, address.kind, address.client if address.direction == "to" else None):
            to = "" if said[3] is None else f" to {said[3]!r}"
            raise Refused("wrong-topic", f"a {said[2]} manifest by {said[1]!r}{to} in {said[0]!r} on a topic of others")
        if sender != COORDINATOR:
            self._check_alone(sender, envelope)
        if not (isinstance(envelope.manifest, Status) and envelope.manifest.state == "offline"):
            # What a device that is gone has left at the broker gives nobody its name.
            self._trust.admit(sender, key)
        self._check_order(sender, key, address.kind, envelope.sequence)
        return envelope

    def _check_alone(self, sender: str, envelope: Envelope) -> None:
        instances = self._instances.setdefault(sender, Instances())
        instances.hear(envelope.instance, envelope.sequence)
        if instances.two_alive:
            raise Refused(
                CLONED,
                f"two devices speak as {sender} with one key at the same time: both are shut out. Switch one off, or give "
                f"it an id and a state of its own; then `clipcast device add {sender} KEY` lets the other one in again",
            )

    def _check_order(self, sender: str, key: str, kind: str, number: int) -> None:
        if kind == "status":  # a hint; and the last will, which is signed long before it is said
            return
        last = self._seen.get((sender, key, kind), 0)
        # The broker gives out what is retained again and again; all else is said anew with a new number.
        if number < last or (number == last and kind not in RETAINED):
            raise Refused("replayed", f"number {number} of {sender} after {last}: old, or said again by somebody else")
        self._seen[sender, key, kind] = number
        if self._marks is not None and number > last and kind in LASTING:
            lasting = {kind: number for (_, by, kind), number in self._seen.items() if kind in LASTING and by == key}
            try:
                write_atomic(self._marks, json.dumps({"key": key, **lasting}).encode())
            except OSError as error:
                log.warning("%s cannot be written, a restart will believe what is older: %s", self._marks, error)


def _read_marks(path: Path) -> tuple[str, dict[str, int]]:
    try:
        marks = json.loads(path.read_bytes())
        return str(marks["key"]), {kind: int(marks[kind]) for kind in LASTING if kind in marks}
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read, older manifests would be believed: %s", path, error)
        return "", {}


def note(counts: Counter[str], topic: str, error: Refused) -> None:
    """Log a refusal: the first of its verdict, then the 2nd, 4th, 8th ... so that a flood fills no disk."""
    count = counts[error.verdict]
    if worth_telling(count):
        log.warning("refused a message on %s: %s (%s, %d so far)", topic, error, error.verdict, count)
