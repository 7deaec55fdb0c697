"""Whose key counts here: the journal's table of devices, looked up in memory and read again every two seconds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from coordinator.errors import NotKeptError
from coordinator.state.registry import Device
from coordinator.state.store import Store
from protocol.errors import Refused

log = logging.getLogger(__name__)

Admission = Literal["open", "registered"]
REFRESH_S = 2.0
KEEP_S = 0.2


class Devices:
    """The devices of a federation, as the gate asks for them.

    With admission "open" a device that nobody knows is registered by the key that it is first seen with; from then on its
    name belongs to that key. With "registered" only `clipcast device add` lets one in.
    """

    def __init__(self, store: Store, admission: Admission, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = store.registry
        self._admission = admission
        self._clock = clock
        self._known = self._registry.devices()
        self._read = clock()
        self._unkept: dict[str, Device] = {}
        self._kept = -math.inf
        self._away = False

    def check(self, sender: str, key: str) -> None:
        """Raise Refused if the sender is unknown and may not register, is revoked, or is known by another key."""
        known = self._known.get(sender)
        if known is None:
            if self._admission == "registered":
                raise Refused("unknown-device", f"{sender} is not registered: `clipcast device add {sender} {key}` would")
        elif known.revoked:
            raise Refused("revoked", f"{sender} was revoked")
        elif known.key != key:
            raise Refused(
                "wrong-key",
                f"{sender} is registered with key {known.key[:12]}, this is signed with {key[:12]}: another device of this "
                f"name, or the same one set up anew (then `clipcast device add {sender} KEY`, with what `clipcast client "
                f"key` prints there)",
            )
        elif known.quarantined:
            raise Refused(
                "quarantined",
                f"two devices have used {sender} and its key at the same time: when one of them is switched off, or has an "
                f"id and a state of its own, `clipcast device add {sender} {known.key}` lets the other one in again",
            )

    def admit(self, sender: str, key: str) -> None:
        """Register a new device."""
        if sender not in self._known:
            log.info("new device %s with key %s", sender, key)
            self._change(sender, Device(key, revoked=False))

    def quarantine(self, client: str) -> None:
        """Shut a device out until it is added again."""
        if client in self._known:
            self._change(client, replace(self._known[client], quarantined=True))
            self.keep()

    def keep(self) -> None:
        """Write down what is new, in one transaction; it stays in memory while the journal does not take it."""
        if not self._unkept:
            return
        self._kept = self._clock()
        try:
            kept = self._registry.register(self._unkept)
        except NotKeptError as error:
            names = ", ".join(sorted(self._unkept))
            log.error("in memory only: devices %s: %s", names[:300], error)  # noqa: TRY400 - no bug, no traceback
            return
        self._known.update(kept)
        self._unkept.clear()

    def _change(self, client: str, device: Device) -> None:
        """Note a change. A thousand that come at once are written together: each transaction is a sync of the disk."""
        self._unkept[client] = self._known[client] = device
        if self._clock() - self._kept >= KEEP_S:
            self.keep()

    @property
    def active(self) -> set[str]:
        """The devices that may take part."""
        return {name for name, device in self._known.items() if not device.revoked and not device.quarantined}

    @property
    def shut_out(self) -> set[str]:
        """The devices that were revoked, or are in quarantine."""
        return self._known.keys() - self.active

    def is_revoked(self, client: str) -> bool:
        """Whether a device was cut off for good, and not only given another key."""
        known = self._known.get(client)
        return known is not None and known.revoked

    def refresh(self) -> set[str]:
        """Read the table again if it is time; return the devices that were revoked or replaced meanwhile."""
        if self._clock() - self._kept >= KEEP_S:
            self.keep()
        if self._clock() - self._read < REFRESH_S:
            return set()
        self.keep()
        self._read = self._clock()
        try:
            read = self._registry.devices()
        except NotKeptError as error:
            if not self._away:
                log.error("no news of devices that are revoked or added: %s", error)  # noqa: TRY400 - no bug, no traceback
            self._away = True
            return set()
        self._away = False
        before, self._known = self._known, read | self._unkept
        return {name for name, device in self._known.items() if name in before and before[name] != device}
