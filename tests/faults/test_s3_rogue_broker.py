"""S3: a broker that forges, alters, misplaces and repeats what it has seen, between real ends of a federation at work.

Nothing of it is accepted: an end that is given a forgery says nothing, tells its actor nothing, counts the refusal under a
verdict that docs/operations.md lists, and goes on, message by message, as the end of a calm federation does.
"""

from __future__ import annotations

import random
import re
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from protocol.bus import Delivery, Event
from protocol.topics import parse
from protocol.trust.signing import Signer
from tests.faults.disk import Disks
from tests.faults.forgeries import forge
from tests.faults.machines import COORDINATOR, FEDERATION, WHOLE
from tests.faults.rogue import Ahead, Rogue
from tests.faults.verdict import calm_outcome, problems, run_to_the_end
from tests.faults.world import World

ENROLLED = replace(WHOLE, enrolled=True)
OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"
A_MESSAGE = 12
SHA256 = re.compile("[0-9a-f]{64}")


def documented() -> set[str]:
    """The verdicts that operators can look up."""
    text = OPERATIONS.read_text()
    table = text[text.index("| verdict | cause | cure |") :].split("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall("`([a-z-]+)`", row.split("|")[1])}


def trace(world: World) -> list[tuple[Any, ...]]:
    """Everything that was said and when, with hashes by the order in which they come up: updates are sealed anew each time.

    Notices are left out: who is turned away is told so.
    """
    names: dict[str, str] = {}

    def named(topic: str) -> str:
        return SHA256.sub(lambda match: names.setdefault(match[0], f"blob {len(names)}"), topic)

    said = [m for m in world.network.published if parse(m.topic).kind != "notice"]
    return [(named(message.topic), message.retain, len(message.payload) // 64) for message in said]


class Insert:
    """Gives an end forgeries before each true message, and looks at what it makes of them."""

    def __init__(self, world: World, rogue: Rogue, wanted: int) -> None:
        self.made, self.verdicts, self.wrong = Counter[str](), Counter[str](), list[str]()
        self._world, self._rogue, self._left = world, rogue, wanted
        self._seen: dict[str, list[Delivery]] = {}

    def __call__(self, name: str, event: Event) -> Iterator[Event]:
        """Try forgeries, then let the true message through."""
        if isinstance(event, Delivery):
            known, waiting = self._seen.setdefault(name, []), self._world.running[name].socket.inbox
            self._rogue.seen = [delivery for delivery in known if delivery not in waiting]
            for _ in range(A_MESSAGE):
                forged = forge(self._rogue, event) if self._left else None
                if forged is not None:
                    self._try(name, *forged)
            known.append(event)
        yield event

    def _try(self, name: str, kind: str, delivery: Delivery) -> None:
        end = self._world.running[name].end
        assert end is not None
        before = Counter(end.gate.counts)
        actions, events = end.handle(delivery, self._world.network.now)
        verdicts = end.gate.counts - before
        self._left -= 1
        self.made[kind] += 1
        self.verdicts.update(verdicts)
        if actions or events:
            self.wrong.append(f"{kind} to {name} on {delivery.topic}: {actions} {events} {delivery.payload[:300]!r}")
        if verdicts.total() != 1 or not verdicts.keys() <= documented():
            self.wrong.append(f"{kind} to {name} on {delivery.topic} was classified as {dict(verdicts)}")


def test_no_forgery_is_accepted_and_all_are_classified(
    fast_path: Path, disks: Disks, full: bool, score: Callable[..., None]
) -> None:
    wanted = 20_000 if full else 4_000
    calm = calm_outcome(fast_path, disks, ENROLLED)
    with World(fast_path / "calm trace", disks, ENROLLED) as world:
        world.start()
        run_to_the_end(world)
        calm_trace = trace(world)
    made, verdicts, wrong = Counter[str](), Counter[str](), []
    seed = secrets.randbits(32)
    while made.total() < wanted:
        with World(fast_path / f"{made.total()}", disks, ENROLLED) as world:
            world.start()
            signers = {name: Signer(key, Ahead()) for name, key in world.keys.items()}
            rogue = Rogue(random.Random(seed if made else 0), [], signers, Signer(), FEDERATION, ENROLLED.clients)
            world.network.broker = insert = Insert(world, rogue, wanted - made.total())
            run_to_the_end(world)
            wrong += [*insert.wrong, *problems(world, calm)]
            if trace(world) != calm_trace:
                wrong.append(f"the federation went on otherwise than the calm one, after {dict(insert.made)}")
        made += insert.made
        verdicts += insert.verdicts
        seed += 1
    sys.stderr.write(f"\nthe last seed was {seed - 1}\n{dict(made)}\n{dict(verdicts)}\n" + "\n".join(wrong[:60]))
    assert len(made) > 14
    accepted = [line for line in wrong if "was classified" not in line]
    score("S3", "forgeries", made.total(), "messages", f">= {wanted}", passed=made.total() >= wanted)
    score("S3", "forgeries accepted", len(accepted), "messages", "0", passed=not accepted)
    score("S3", "forgeries without a documented verdict", len(wrong), "messages", "0", passed=not wrong)


class Spoil:
    """Drops, holds back, repeats and reorders true messages, and spoils chunks or exchanges them between blobs.

    What it has seen it says again and again, also to processes that have forgotten it. After `left` of that it is honest.
    """

    def __init__(self, rng: random.Random, left: int) -> None:
        self.left, self.done = left, Counter[str]()
        self._rng = rng
        self._seen: dict[str, list[Delivery]] = {}
        self._held: dict[str, list[Delivery]] = {}

    def __call__(self, name: str, event: Event) -> list[Event]:
        """Return what is said instead."""
        if not isinstance(event, Delivery):
            return [event]
        seen, held = self._seen.setdefault(name, []), self._held.setdefault(name, [])
        seen.append(event)
        if not self.left:
            return [event]
        self.left -= 1
        makers = {"dropped": [], "let through": [event], "said again": [event, *self._rng.choices(seen, k=3)]}
        kind = self._rng.choice([*makers, "held back", "let go", "spoiled"])
        if kind == "held back":
            held.append(event)
        elif kind == "let go":
            makers[kind], self._held[name] = [event, *reversed(held)], []
        elif kind == "spoiled" and parse(event.topic).kind == "blob":
            makers[kind] = [self._spoiled(event), event]
        self.done[kind] += 1
        return list(makers.get(kind, []))

    def _spoiled(self, chunk: Delivery) -> Delivery:
        others = [data for seen in self._seen.values() for d in seen if len(data := d.payload) == len(chunk.payload)]
        turned = bytes([chunk.payload[0] ^ 1]) + chunk.payload[1:]
        return Delivery(chunk.topic, self._rng.choice([turned, *others]))


def test_a_broker_that_spoils_what_it_carries_delays_the_same_result(
    fast_path: Path, disks: Disks, full: bool, score: Callable[..., None]
) -> None:
    calm = calm_outcome(fast_path, disks, ENROLLED)
    seeds = [*range(120 if full else 12), secrets.randbits(32)]
    wrong, done = [], Counter[str]()
    for seed in seeds:
        with World(fast_path / f"spoilt {seed}", disks, ENROLLED) as world:
            rng = random.Random(seed)
            world.network.broker = spoil = Spoil(rng, 150)
            world.start()
            for _ in range(2):
                world.pass_time(rng.uniform(1.0, 8.0))
                world.kill(COORDINATOR)
                world.start(COORDINATOR)
            world.run(lambda world=world, spoil=spoil: world.finished or not spoil.left or world.network.now > 200.0)  # type: ignore[misc]
            spoil.left = 0
            for name in list(world.running):
                world.disconnect(name)
                world.connect(name)
            run_to_the_end(world)
            wrong += [f"seed {seed}: {problem}" for problem in problems(world, calm)]
            done += spoil.done
    sys.stderr.write(f"\nthe last seed was {seeds[-1]}\n{dict(done)}\n" + "\n".join(wrong[:9]))
    score(
        "S3",
        "messages that a broker dropped, held, repeated or spoiled",
        done.total(),
        "messages",
        ">= 500",
        passed=done.total() >= 500,
    )
    score("S3", "federations that ended otherwise under such a broker", len(wrong), "", "0", passed=not wrong)
