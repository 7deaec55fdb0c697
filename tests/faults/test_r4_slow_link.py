"""R4: an update over a link of 256 kbit/s that is cut again and again, with the default keepalive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from tests.faults.actors import read_notes
from tests.faults.cast import BROKER, Cast, Mosquitto
from tests.faults.light import recipe_of
from tests.faults.processes import Zygote
from tests.faults.proxy import FaultProxy
from tests.faults.relay import UP

RATE = 256_000 / 8


def settings_for(size: int) -> dict[str, Any]:
    """Return a federation of one client whose updates have about `size` bytes."""
    alone = {"clients_per_round": 1, "quorum": 1, "deadline_s": 3600, "rounds": 1}
    return {"federation": "slow", "classes": ["cat", "dog"], "recipe": recipe_of(size, 2), **alone}


def test_an_update_comes_through_a_slow_link_that_is_cut_again_and_again(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None], fault_proxy: Callable[..., FaultProxy]
) -> None:
    size, cuts, time_limit, bytes_limit = (5_000_000, (20.0, 40.0), 1.25, 1.15) if full else (300_000, (4.0, 7.0), 2.0, 1.5)
    broker = Mosquitto(zygote, folder / BROKER)
    proxy = fault_proxy(broker.port, seed=4, rate=RATE, directions=(UP,))
    links = {"one": {"url": f"mqtt://127.0.0.1:{proxy.port}"}}
    with Cast(zygote, folder, settings_for(size), broker, ("one",), links) as cast:
        cast.begin()

        def note(what: str) -> dict[str, Any] | None:
            return next((note for note in read_notes(folder / "one.notes") if note["what"] == what), None)

        wait_until(lambda: note("send") is not None, 120.0, "the update")
        before = proxy.moved[UP]
        proxy.cut_every(cuts)
        wait_until(lambda: note("receipt") is not None, 10.0 * size / RATE, "the receipt")
        sent = proxy.moved[UP] - before
        offered, answered = note("send"), note("receipt")
    assert offered is not None
    assert answered is not None
    assert answered["accepted"]
    assert proxy.cuts > 0
    what = f"{size / 1e6:g} MB at 256 kbit/s, cut every {cuts[0]:g} to {cuts[1]:g} s"
    longer = (answered["at"] - offered["at"]) * RATE / offered["size"]
    score("R4", f"{what}: time", round(longer, 3), "x ideal", f"<= {time_limit}", passed=longer <= time_limit)
    more = sent / offered["size"]
    score(
        "R4", f"{what}: bytes", round(more, 3), f"x size, {proxy.cuts} cuts", f"<= {bytes_limit}", passed=more <= bytes_limit
    )
