"""R6: clients and coordinator stopped, cut off, killed and slow by random schedules: no federation hangs."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcast.exit_codes import CODES
from tests.conftest import is_listening, wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto
from tests.faults.evidence import counted_twice, lost, records
from tests.faults.processes import Zygote
from tests.faults.proxy import FaultProxy

CLIENTS = ("one", "two", "three")
QUORUM, ROUNDS, DEADLINE_S = 2, 3, 2.0
TRAINING_S, SLOW_S = 0.7, 3.0
KEEPALIVE = {"keepalive_s": 5}
SLACK_S = 20.0  # starting and learning on a busy machine
TOGETHER = 6
ENDED = CODES["coordinator.errors.FederationError"]
NAMED = re.compile(r"^error: .*(without a quorum of|needs \d+ clients, only|was away for)", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """What happens to whom, when, and for how long, in seconds."""

    kind: str
    who: str
    at: float
    seconds: float


def schedule(rng: random.Random) -> list[Fault]:
    """Draw one to five faults within the first seconds of a federation."""
    faults = []
    for _ in range(rng.randint(1, 5)):
        kind = rng.choice(("stop", "partition", "crash", "crash for good"))
        who = rng.choice((*CLIENTS, *CLIENTS, COORDINATOR)) if kind != "crash for good" else rng.choice(CLIENTS)
        faults.append(Fault(kind, who, rng.uniform(0.0, 4.0), rng.uniform(0.2, 4.0 * DEADLINE_S)))
    return sorted(faults, key=lambda fault: fault.at)


def settings(number: int) -> dict[str, Any]:
    """Return a short federation; its clients are fewer than its quorum when two are gone."""
    recipe = {"name": "fedlora"}
    size = {"clients_per_round": len(CLIENTS), "quorum": QUORUM, "deadline_s": DEADLINE_S, "rounds": ROUNDS}
    return {"federation": f"stall-{number}", "classes": ["cat", "dog"], "recipe": recipe, "seed": number, **size}


def happen(fault: Fault, cast: Cast, proxies: dict[str, FaultProxy], away: threading.Lock) -> None:
    """Let one fault happen and end."""
    who = fault.who
    if fault.kind == "stop":
        cast.children[who].send(signal.SIGSTOP)
        time.sleep(fault.seconds)  # it waits for nothing: so long the fault lasts
        cast.children[who].send(signal.SIGCONT)
    elif fault.kind == "partition":
        proxies[who].freeze()
        time.sleep(fault.seconds)
        proxies[who].thaw()
    else:
        with away:  # nobody is started twice
            cast.children[who].kill()
            if fault.kind == "crash":
                time.sleep(fault.seconds)
                cast.start(who, **({} if who == COORDINATOR else {"seconds": TRAINING_S}))


def longest(faults: list[Fault]) -> float:
    """Return how long the federation may take: each round may wait for clients and for updates, and faults hold it up.

    A coordinator that comes back waits anew, and three rounds without a quorum are the end.
    """
    returns = 1 + sum(fault.who == COORDINATOR for fault in faults)
    return 2.0 * DEADLINE_S * (ROUNDS + 3) * returns + max(f.at for f in faults) + sum(f.seconds for f in faults) + SLACK_S


def live(zygote: Zygote, folder: Path, broker: Mosquitto, number: int) -> str:
    """Run one federation under its schedule; return how it ended. Fails if it does not end in time or without a reason."""
    rng = random.Random(number)
    faults = schedule(rng)
    names = (COORDINATOR, *CLIENTS)
    proxies = {name: FaultProxy(broker.port) for name in names}
    links = {name: {"url": f"mqtt://127.0.0.1:{proxy.port}", **KEEPALIVE} for name, proxy in proxies.items()}
    home, slow = folder / str(number), rng.choice((None, *CLIENTS))
    try:
        with Cast(zygote, home, settings(number), broker, CLIENTS, links) as cast:
            for name in names:
                seconds = SLOW_S if name == slow else TRAINING_S
                cast.start(name, **({} if name == COORDINATOR else {"seconds": seconds}))
            return watch(cast, faults, proxies)
    finally:
        for proxy in proxies.values():
            proxy.close()


def watch(cast: Cast, faults: list[Fault], proxies: dict[str, FaultProxy]) -> str:
    """Let the faults happen, each at its time, and wait for the coordinator's end."""
    began, away = time.monotonic(), threading.Lock()
    timers = [threading.Timer(fault.at, happen, (fault, cast, proxies, away)) for fault in faults]
    for timer in timers:
        timer.start()
    try:

        def ended() -> bool:
            with away:
                return not cast.children[COORDINATOR].is_alive

        wait_until(ended, longest(faults), f"the end of a federation under {faults}")
    finally:
        for timer in timers:
            timer.cancel()
        for timer in timers:
            timer.join()
    coordinator = cast.children[COORDINATOR]
    code = coordinator.wait()
    assert not lost(cast.folder, cast.state, CLIENTS)
    assert not counted_twice(cast.state)
    print(f"{cast.folder.name}: code {code} after {time.monotonic() - began:.1f} s, {faults}")
    if code == 0:
        assert len(records(cast.state)) == ROUNDS
        return "all rounds"
    assert code == ENDED, coordinator.tail()
    assert NAMED.search(coordinator.tail()), coordinator.tail()
    return "named reason"


def test_no_federation_hangs_under_any_schedule(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None]
) -> None:
    schedules = 200 if full else 8
    broker = Mosquitto(zygote, folder / BROKER)
    child = broker.start()
    wait_until(lambda: is_listening(broker.port), what="the broker to listen")
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(TOGETHER) as pool:
            ends = Counter(pool.map(lambda number: live(zygote, folder, broker, number), range(schedules)))
    finally:
        child.kill()
    how = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    score("R6", "schedules that ended in time", ends.total(), f"({how})", f"{schedules}", passed=ends.total() == schedules)
    score("R6", "seconds", round(time.monotonic() - began), "s", "", passed=True)
