"""The coordinator's keys after each other: who follows whom, what a thief of an old key can do, and power cuts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from protocol.bus import Connected, Delivery, Publish, Subscribe
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import COORDINATOR
from protocol.errors import KeyFileError
from protocol.events import Finished
from protocol.messages import RoundPlan, Status, Successor
from protocol.topics import Topics
from protocol.trust.gate import FirstUse, Pinned
from protocol.trust.signing import Signer
from protocol.trust.succession import MOST, leads_to, load, newest, rotate
from tests.protocol.test_ends_distrust import a_plan

TOPICS = Topics("fed")


def statement(by: Signer, successor: Signer, federation: str = "fed", sender: str = COORDINATOR) -> bytes:
    return by.seal(federation, sender, Successor(next=successor.public))


@pytest.fixture
def keys() -> list[Signer]:
    return [Signer() for _ in range(4)]


def test_each_key_leads_to_the_newest(keys):
    a, b, c, _ = keys
    chain = b"\n".join((statement(a, b), statement(b, c)))
    assert [newest(chain, "fed", key.public) for key in (a, b, c)] == [c.public] * 3


def test_what_is_not_signed_by_the_key_before_leads_nowhere(keys):
    a, b, c, thief = keys
    for wrong in (
        statement(thief, thief),
        statement(b, thief),
        statement(a, thief, federation="other"),
        statement(a, thief, sender="jetson-1"),
        a.seal("fed", COORDINATOR, Status(state="online")),
        a.seal("fed", COORDINATOR, Successor.model_construct(next="x" * 43)),
        statement(a, thief)[:-8] + b"AAAAAAAA",
        b"",
        b"\xff" * 100,
        b"{}",
    ):
        assert newest(wrong, "fed", a.public) == a.public
        assert newest(b"\n".join((wrong, statement(a, b))), "fed", a.public) == b.public
    backwards = b"\n".join((statement(b, c), statement(a, b)))
    assert newest(backwards, "fed", a.public) == b.public


def test_a_key_that_was_given_up_leads_nobody_away_who_has_followed(keys, tmp_path, caplog):
    a, b, _, thief = keys
    path = tmp_path / "coordinator.key"
    trust = Pinned(path, a.public)
    assert trust.follow(statement(a, b), "fed")
    assert not trust.follow(statement(a, thief), "fed")
    trust.check(COORDINATOR, b.public)
    assert "do not lead to the coordinator's key" in caplog.text
    again = Pinned(path, a.public)  # also over restarts
    assert not again.follow(statement(a, thief), "fed")
    again.check(COORDINATOR, b.public)


def test_a_client_that_has_seen_nobody_yet_follows_nobody(keys, tmp_path):
    a, b, *_ = keys
    for trust in (FirstUse(), Pinned(tmp_path / "coordinator.key")):
        assert not trust.follow(statement(a, b), "fed")
        trust.admit(COORDINATOR, a.public)
        assert trust.follow(statement(a, b), "fed")
        trust.check(COORDINATOR, b.public)
    Pinned(tmp_path / "coordinator.key").check(COORDINATOR, b.public)


def test_another_key_in_the_settings_goes_before_what_was_followed(keys, tmp_path):
    a, b, c, _ = keys
    path = tmp_path / "coordinator.key"
    Pinned(path, a.public).follow(statement(a, b), "fed")
    Pinned(path, c.public).check(COORDINATOR, c.public)
    Pinned(path, a.public).check(COORDINATOR, b.public)
    path.with_suffix(".followed").write_text("x")
    with pytest.raises(KeyFileError, match="Remove it"):
        Pinned(path, a.public)


def test_what_cannot_be_kept_is_followed_in_memory_and_again_after_a_restart(keys, tmp_path, monkeypatch):
    a, b, *_ = keys
    trust = Pinned(tmp_path / "coordinator.key", a.public)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("protocol.trust.gate.write_atomic", full)
        assert trust.follow(statement(a, b), "fed")
    trust.check(COORDINATOR, b.public)
    again = Pinned(tmp_path / "coordinator.key", a.public)
    again.check(COORDINATOR, a.public)
    assert again.follow(statement(a, b), "fed")
    Pinned(tmp_path / "coordinator.key", a.public).check(COORDINATOR, b.public)


def test_rotations_lead_from_the_first_key_to_the_last(tmp_path):
    first = Signer.open(tmp_path).public
    made = [rotate(tmp_path, "fed") for _ in range(MOST + 3)]
    signer = Signer.open(tmp_path)
    assert signer.public == made[-1]
    chain = load(tmp_path, "fed", signer.public)
    assert len(chain) < 16 * 1024
    assert newest(chain, "fed", made[5]) == signer.public
    assert newest(chain, "fed", first) == first  # too long ago: its pin is renewed by hand
    assert leads_to(chain, "fed", signer.public)
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0
    assert {path.name for path in tmp_path.iterdir()} == {"key.pem", "sequence", "succession"}


def test_the_numbers_go_on_rising_under_a_new_key(tmp_path):
    old = Signer.open(tmp_path)
    old.seal("fed", COORDINATOR, Status(state="online"))
    before = (tmp_path / "sequence").read_text()
    rotate(tmp_path, "fed")
    assert (tmp_path / "sequence").read_text() == before


class PowerCut(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("step", ["write_atomic", "replace", "sync_folder"])
def test_a_rotation_that_is_cut_off_has_happened_or_not(tmp_path, monkeypatch, step):
    """Either key works at the next start, clients follow to it, and a repetition goes through."""
    first = Signer.open(tmp_path).public

    def cut(*_: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "replace") if step == "replace" else (f"protocol.trust.succession.{step}",)), cut)
        with pytest.raises(PowerCut):
            rotate(tmp_path, "fed")
    after = Signer.open(tmp_path).public
    assert (after == first) is (step != "sync_folder")
    assert newest(load(tmp_path, "fed", after), "fed", first) == after
    last = rotate(tmp_path, "fed")
    assert Signer.open(tmp_path).public == last
    assert newest(load(tmp_path, "fed", last), "fed", first) == last
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir() if step == "sync_folder")


def test_a_full_disk_leaves_the_old_key_in_force(tmp_path, monkeypatch):
    first = Signer.open(tmp_path).public

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("protocol.trust.succession.write_atomic", full)
        with pytest.raises(KeyFileError, match="The old key is still in force"):
            rotate(tmp_path, "fed")
    assert Signer.open(tmp_path).public == first


def said(end: CoordinatorEnd, plan: RoundPlan) -> list[Publish]:
    actions, _ = end.handle(Connected(None), 0.0)
    return [action for action in [*actions, *end.publish_plan(plan)] if isinstance(action, Publish)]


def finished(number: int) -> RoundPlan:
    return a_plan(number, state="finished")


def test_a_client_follows_over_the_wire_whatever_comes_first(tmp_path):
    rotated = tmp_path / "coordinator"
    client = ClientEnd("fed", "a", random.Random(0), tmp_path / "a", Pinned(tmp_path / "a" / "coordinator.key"))
    subscriptions, _ = client.handle(Connected(None), 0.0)
    assert next(action for action in subscriptions if isinstance(action, Subscribe)).filter == TOPICS.broadcast("key")

    def hear(messages: list[Publish]) -> list[object]:
        return [event for one in messages for event in client.handle(Delivery(one.topic, one.payload), 1.0)[1]]

    first = said(CoordinatorEnd("fed", random.Random(0), state=rotated), finished(1))
    assert TOPICS.broadcast("key") not in {message.topic for message in first}
    assert hear(first) == [Finished(finished(1))]
    rotate(rotated, "fed")
    keys, plan = said(CoordinatorEnd("fed", random.Random(1), state=rotated), finished(2))
    assert keys.topic == TOPICS.broadcast("key")
    assert keys.retain
    assert hear([plan]) == []  # overtaken
    assert client.gate.counts == {"wrong-key": 1}
    again, _ = client.handle(Delivery(keys.topic, keys.payload), 1.0)
    assert [action.filter for action in again] == list(TOPICS.client_filters("a"))  # what is retained comes once more
    assert hear([plan]) == [Finished(finished(2))]
    assert client.handle(Delivery(keys.topic, keys.payload), 1.0) == ([], [])
    assert hear(first[-1:]) == []  # by the old key


def test_a_thief_who_has_raised_the_numbers_stops_nobody_after_a_rotation(tmp_path):
    """Numbers are counted by key: whoever had the old one could make the client take all that follows as old."""
    rotated, trust = tmp_path / "coordinator", Pinned(tmp_path / "a" / "coordinator.key")
    client = ClientEnd("fed", "a", random.Random(0), tmp_path / "a", trust)

    class Far:
        def next(self) -> int:
            return 2**52

    owner = CoordinatorEnd("fed", random.Random(0), state=rotated)
    thief = Signer(owner._signer._key, Far())
    stolen = Delivery(TOPICS.broadcast("round"), thief.seal("fed", COORDINATOR, finished(1)))
    assert client.handle(stolen, 1.0)[1] == [Finished(finished(1))]
    rotate(rotated, "fed")
    keys, plan = said(CoordinatorEnd("fed", random.Random(1), state=rotated), finished(2))
    client.handle(Delivery(keys.topic, keys.payload), 1.0)
    assert client.handle(Delivery(plan.topic, plan.payload), 1.0)[1] == [Finished(finished(2))]
    restarted = ClientEnd("fed", "a", random.Random(0), tmp_path / "a", Pinned(tmp_path / "a" / "coordinator.key"))
    assert restarted.handle(Delivery(plan.topic, plan.payload), 1.0)[1] == [Finished(finished(2))]
    assert restarted.handle(stolen, 1.0)[1] == []


def test_the_keys_are_said_again_with_all_that_lasts(tmp_path):
    """A broker may lose a message unseen."""
    rotate(tmp_path, "fed")
    end = CoordinatorEnd("fed", random.Random(0), state=tmp_path)
    said(end, finished(1))
    wanted = {TOPICS.broadcast("key"), TOPICS.broadcast("round")}
    assert any({action.topic for action in end.tick(now, 8)} >= wanted for now in range(1000))
