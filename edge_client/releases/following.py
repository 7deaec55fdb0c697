"""Starts the loop beside what answers. Neither a broker that is away nor a full disk keeps anybody from answering."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path

from edge_client.config import ClientConfig
from edge_client.errors import StateError
from edge_client.inference.answering import Answering
from edge_client.inference.providers import Runtime
from edge_client.releases.follower import Follower
from edge_client.releases.live import Live, Shelf
from edge_client.releases.slots import Slots
from protocol.errors import BusError, KeyFileError
from protocol.link import Link
from protocol.mqtt import MqttBus
from protocol.release.follower_end import FOLDER, FollowerEnd
from protocol.storage.files import lock_folder
from protocol.trust.gate import Pinned

log = logging.getLogger(__name__)

AGAIN_S = 15.0


@contextlib.contextmanager
def following(
    config: ClientConfig, profile: str, base: Path | None, adapter: Path | None, runtime: Runtime
) -> Iterator[Answering]:
    """Give what answers: the newest release that this device has, or else `base`; and follow releases meanwhile.

    Raises InferenceError, StateError, and KeyFileError if no release can come and nothing answers without one.
    """
    folder = config.state / FOLDER
    try:
        lock = lock_folder(folder)
    except BlockingIOError as error:
        raise StateError(f"another process follows releases in {folder}: one device, one of them") from error
    except OSError as error:
        raise StateError(f"{folder} cannot be written: {error}. Make room there, or set another `state`") from error
    with lock:
        slots = Slots(folder)
        live = Live(Follower(config.id, profile, slots.load()), slots, Shelf(slots, base, adapter, runtime))
        answering = live.begin()
        try:
            end = _end(config)
        except KeyFileError:
            if answering.current()[0] is None:
                raise
            end = None
        stop = threading.Event()
        thread = threading.Thread(target=_follow, args=(config, live, end, stop), name="releases", daemon=True)
        thread.start()
        try:
            yield answering
        finally:
            stop.set()
            thread.join()
            live.leave()


def _end(config: ClientConfig) -> FollowerEnd:
    trust = Pinned(config.state / "coordinator.key", config.coordinator_key)
    return FollowerEnd(config.federation, config.id, random.Random(), config.state, trust)


def _follow(config: ClientConfig, live: Live, end: FollowerEnd | None, stop: threading.Event) -> None:
    told = ""
    while not stop.is_set():
        try:
            end = end or _end(config)
            bus = MqttBus.open(config.broker, f"{config.federation}:{config.id}:answers")
        except (BusError, KeyFileError) as error:
            if str(error) != told:
                log.warning("no releases for now: %s", error)
            told = str(error)
            stop.wait(AGAIN_S)
            continue
        try:
            live.run(Link(bus, end), end, stop)
        except Exception:
            log.exception("following releases ended, answers go on: this is a bug in clipcast")
            stop.wait(AGAIN_S)
        finally:
            bus.close()
