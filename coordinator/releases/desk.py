"""The desk: announces the newest release, hears how it goes on each device, and opens one ring after the other.

It has a connection of its own, as the coordinator's user: a run of the federation need not be under way. What the operator's
commands write into the journal it finds there within a second. One desk works in a state folder at a time.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError, NotKeptError
from coordinator.releases.blobs import ReleaseBlobs
from coordinator.releases.book import Book, Entry, Heard
from coordinator.state.devices import Devices
from coordinator.state.journal import not_written
from coordinator.state.store import Store
from protocol.errors import BusError, KeyFileError, WireError
from protocol.events import BrokerLink, Cloned
from protocol.link import Link
from protocol.mqtt import MqttBus
from protocol.release.desk_end import FOLDER, DeskEnd, DeskEvent, Reported
from protocol.release.manifests import Release
from protocol.release.rings import Rollout, Standing, decide
from protocol.storage.at_rest import KeptBlob
from protocol.storage.blobs import BlobError
from protocol.storage.files import lock_folder
from protocol.trust.signing import public_key_of

log = logging.getLogger(__name__)

POLL_S, LOOK_S = 0.5, 1.0
AGE_S, KEEP_S = 5.0, 60.0
"""How often the release's age, and the moments when devices were heard, are written down."""

RECENT_S = 900.0
"""Who has said nothing for so long is not named for a ring: devices say how it goes every five minutes at least."""

AGAIN_S, BLOBS_AGAIN_S = 5.0, 60.0


class Desk:
    """One desk at work. It keeps what devices say in memory, and writes what is new into the journal every second."""

    def __init__(
        self,
        link: Link[DeskEvent],
        end: DeskEnd,
        book: Book,
        blobs: ReleaseBlobs,
        devices: Devices,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._end = end
        self._book = book
        self._blobs = blobs
        self._devices = devices
        self._clock = clock
        self._heard = book.reports()
        self._recent: dict[str, float] = {}  # when this process heard something new of a device
        self._unkept: set[str] = set()
        self._kept = self._aged = self._looked = clock()
        self._entry: Entry | None = None
        self._age = 0.0
        self._open: dict[str, KeptBlob] = {}
        self._announced: tuple[int, Release] | None = None
        self._again = 0.0  # not before this are blobs that are missing or damaged looked for again
        self._troubles: dict[str, str] = {}

    def run(self, stop: threading.Event) -> None:
        """Work until stopped; then write down what is not yet."""
        while not stop.is_set():
            for event in self._link.poll(POLL_S):
                self._take(event)
            if self._clock() - self._looked >= LOOK_S:
                self._look()
        self._keep(last=True)

    def _take(self, event: DeskEvent) -> None:
        match event:
            case Reported():
                self._reported(event)
            case Cloned(client=client):
                self._devices.quarantine(client)
            case BrokerLink(up=up, reason=reason):
                log.info("releases: %s", "connected" if up else f"lost the broker: {reason}")

    def _reported(self, said: Reported) -> None:
        """Take in a report, unless the broker has said it before, or a later one is here."""
        known = self._heard.get(said.client)
        if known is not None and known.instance == said.instance and said.sequence <= known.sequence:
            return
        news = known is None or known.report != said.report
        moved = self._age if known is None or news else known.moved
        self._heard[said.client] = Heard(said.report, said.instance, said.sequence, moved, int(time.time()))
        self._recent[said.client] = self._clock()
        if news:
            self._unkept.add(said.client)

    def _look(self) -> None:
        """See what is new in the journal, decide, and announce."""
        passed, self._looked = self._clock() - self._looked, self._clock()
        for client in self._devices.refresh():
            self._end.gate.forget(client)
        self._keep()  # first: who reads the journal finds no decision without its reasons
        with self._trouble("the journal", NotKeptError):  # it may be back the next time
            entry = self._book.newest()
            if entry is not None and (self._entry is None or entry.number != self._entry.number):
                self._age, self._again = entry.age, 0.0
            self._age += passed
            self._entry = entry if entry is None else self._decided(entry)
        if self._entry is not None:
            self._announce(self._entry)

    def _decided(self, entry: Entry) -> Entry:
        """Return a release as it goes on from here; what is announced was in the journal before."""
        decided = decide(entry.rollout, self._fleet(), self._age)
        if decided == entry.rollout:
            return entry
        changed = self._book.change(entry, decided, self._age)
        if changed is None:  # the operator was faster: look again
            return entry
        _tell(entry.rollout, decided)
        return changed

    def _fleet(self) -> dict[str, Standing]:
        since, active = self._clock() - RECENT_S, self._devices.active
        return {
            name: Standing(heard.report, heard.moved, self._recent.get(name, since) > since)
            for name, heard in self._heard.items()
            if name in active
        }

    def _announce(self, entry: Entry) -> None:
        """Announce a release as it stands now, unless it is; its blobs are looked through before the first time."""
        release = entry.rollout.release
        if self._announced == (entry.number, release) or self._clock() < self._again:
            return
        self._again = self._clock() + BLOBS_AGAIN_S
        with self._trouble("the release", BlobError, WireError):
            if self._announced is None or self._announced[0] != entry.number:
                self._open = {ref.sha256: self._blobs.open(ref) for ref in release.blobs}
            self._again = 0.0
            self._link.do(self._end.announce(release, self._open))
            self._announced = entry.number, release

    def _keep(self, *, last: bool = False) -> None:
        """Write down what is new: of what devices say at once, of the time that has passed now and then."""
        now = self._clock()
        all_due, age_due = last or now - self._kept >= KEEP_S, last or now - self._aged >= AGE_S
        if not self._unkept and not (self._heard and all_due) and not (self._entry and age_due):
            return
        with self._trouble("reports", NotKeptError):
            names = self._heard.keys() if all_due else self._unkept
            number = None if self._entry is None else self._entry.number
            self._book.keep({name: self._heard[name] for name in names}, number, self._age)
            self._kept, self._aged = now if all_due else self._kept, now
            self._unkept.clear()

    @contextlib.contextmanager
    def _trouble(self, what: str, *kinds: type[Exception]) -> Iterator[None]:
        """Say what goes wrong, once, and go on: it is tried again."""
        try:
            yield
        except kinds as error:
            if self._troubles.get(what) != str(error):
                log.error("%s: %s", what, error)  # noqa: TRY400 - no bug, no traceback
            self._troubles[what] = str(error)
        else:
            self._troubles.pop(what, None)


def _tell(before: Rollout, after: Rollout) -> None:
    """Log what became of a release."""
    version = after.release.version
    if after.reason == "ring-failed":
        log.warning("release %d has stopped: too many failed. `clipcast release status` names them", version)
    elif after.complete and not before.complete:
        log.info("release %d is complete", version)
    elif after.ring != before.ring or before.since is None:
        log.info("release %d: ring %d of %d, %s", version, after.ring + 1, len(after.rings), after.rings[after.ring])
    if named := after.release.devices[len(before.release.devices) :]:
        log.info("release %d goes to %s", version, ", ".join(named))


def take_desk(state: Path) -> IO[bytes] | None:
    """Make this process the only desk of a state folder, until the result is closed; None if another one is.

    Raises NotKeptError.
    """
    try:
        return lock_folder(state / FOLDER)
    except BlockingIOError:
        return None
    except OSError as error:
        raise not_written(state / FOLDER, error) from error


def work(config: CoordinatorConfig, stop: threading.Event) -> None:
    """Be the desk of a federation until stopped, when none is at work. Raises FederationError, BusError, KeyFileError."""
    lock = take_desk(config.state)
    if lock is None:
        raise FederationError(
            f"another desk is at work in {config.state}, perhaps that of `clipcast coordinator run`: nothing is missing"
        )
    with lock, contextlib.ExitStack() as stack:
        store = Store(config.state, config.journal)
        stack.callback(store.close)
        store.releases.prepare()
        devices = Devices(store, config.admission)
        end = DeskEnd(config.federation, random.Random(), config.state, devices)
        bus = MqttBus.open(config.broker, f"{config.federation}:releases:{secrets.token_hex(4)}")
        stack.callback(bus.close)
        blobs = ReleaseBlobs(config.state / FOLDER / "blobs")
        Desk(Link(bus, end), end, store.releases, blobs, devices).run(stop)
        devices.keep()


@contextlib.contextmanager
def desk(config: CoordinatorConfig) -> Iterator[None]:
    """Be the desk meanwhile, in a thread, whenever no other one is at work; nothing that befalls it ends the caller.

    Raises KeyFileError.
    """
    public_key_of(config.state)  # before the thread: who comes first makes it, and there has to be one
    stop = threading.Event()
    thread = threading.Thread(target=_stand_by, args=(config, stop), name="releases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _stand_by(config: CoordinatorConfig, stop: threading.Event) -> None:
    told = ""
    while not stop.is_set():
        try:
            work(config, stop)
        except (FederationError, BusError, KeyFileError, WireError) as error:
            if str(error) != told:
                log.warning("no releases from here: %s", error)
            told = str(error)
        except Exception:
            log.exception("the desk of releases ended: this is a bug in clipcast")
        stop.wait(AGAIN_S)
