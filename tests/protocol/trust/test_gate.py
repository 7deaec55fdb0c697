"""The gate: every reason to turn a message away has its own verdict and counter."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from protocol.codec import reference
from protocol.envelope import COORDINATOR, MAX_MANIFEST
from protocol.errors import KeyFileError, Refused
from protocol.messages import ClassBankManifest, Need, Receipt, Status
from protocol.topics import Topics, parse
from protocol.trust.gate import FirstUse, Gate, Pinned, note
from protocol.trust.signing import MAX_TOKEN, Signer

TOPICS = Topics("fed")
SHA = "ab" * 32
STATUS, NEED = Status(state="online"), Need(sha256=SHA, missing="80")
RECEIPT = Receipt(round=1, sha256=SHA, accepted=True, reason="accepted")
BANK = ClassBankManifest(version=1, blob=reference(b"bank"))


@pytest.fixture
def gate():
    return Gate("fed", FirstUse())


def verdict(gate, topic, payload):
    before = Counter(gate.counts)
    with pytest.raises(Refused) as caught:
        gate.open(parse(topic), payload)
    assert gate.refuse(topic, caught.value) is caught.value
    assert gate.counts - before == {caught.value.verdict: 1}
    return caught.value.verdict


def test_a_signed_manifest_on_its_own_topic_is_let_in(gate):
    envelope = gate.open(parse(TOPICS.from_("a", "need")), Signer().seal("fed", "a", NEED))
    assert (envelope.sender, envelope.manifest) == ("a", NEED)
    assert not gate.counts


@pytest.mark.parametrize(
    ("topic", "federation", "sender", "manifest", "expected"),
    [
        (TOPICS.from_("a", "need"), "fed", "b", NEED, "wrong-topic"),
        (TOPICS.from_("a", "need"), "fed", COORDINATOR, NEED, "wrong-topic"),
        (TOPICS.from_(COORDINATOR, "need"), "fed", COORDINATOR, NEED, "wrong-topic"),
        (TOPICS.from_("a", "need"), "other", "a", NEED, "wrong-topic"),
        (TOPICS.from_("a", "offer"), "fed", "a", NEED, "wrong-topic"),
        (TOPICS.to("a", "need"), "fed", "a", NEED, "wrong-topic"),
        (TOPICS.broadcast("classes"), "fed", "a", BANK, "wrong-topic"),
        (Topics("other").from_("a", "need"), "other", "a", NEED, "wrong-topic"),
    ],
)
def test_what_is_signed_for_another_place_is_turned_away(gate, topic, federation, sender, manifest, expected):
    assert verdict(gate, topic, Signer().seal(federation, sender, manifest)) == expected


def test_what_is_not_signed_is_turned_away(gate):
    topic = TOPICS.from_("a", "need")
    token = Signer().seal("fed", "a", NEED)
    head, body, signature = token.split(b".")
    assert verdict(gate, topic, b"{}") == "not-signed"
    assert verdict(gate, topic, b"") == "not-signed"
    assert verdict(gate, topic, b".".join((head, body, b""))) == "bad-signature"
    assert verdict(gate, topic, b".".join((head, body, signature[:-4] + b"AAAA"))) == "bad-signature"
    assert verdict(gate, topic, bytes(MAX_TOKEN + 1)) == "too-long"
    assert verdict(gate, topic, Signer().seal("fed", "a", Need.model_construct(sha256="x", missing="80"))) == "malformed"


def test_the_longest_manifest_passes(gate):
    manifest = Need(sha256=SHA, missing="ff" * 4096)
    assert len(Signer().seal("fed", "a", manifest)) < MAX_TOKEN
    assert gate.open(parse(TOPICS.from_("a", "need")), Signer().seal("fed", "a", manifest)).manifest == manifest
    assert MAX_TOKEN < 2 * MAX_MANIFEST


def test_a_name_belongs_to_the_key_that_it_was_first_seen_with(gate):
    one, other, topic = Signer(), Signer(), TOPICS.from_("a", "need")
    gate.open(parse(topic), one.seal("fed", "a", NEED))
    assert verdict(gate, topic, other.seal("fed", "a", NEED)) == "wrong-key"
    gate.open(parse(TOPICS.from_("b", "need")), other.seal("fed", "b", NEED))


def test_a_message_that_is_turned_away_gives_nobody_a_name(gate):
    thief, owner, topic = Signer(), Signer(), TOPICS.from_("a", "need")
    for token in (thief.seal("other", "a", NEED), thief.seal("fed", "b", NEED), thief.seal("fed", "a", STATUS)):
        verdict(gate, topic, token)
    gate.open(parse(topic), owner.seal("fed", "a", NEED))


def test_what_a_device_that_is_gone_has_left_at_the_broker_gives_it_no_name(gate):
    old, new, topic = Signer(), Signer(), parse(TOPICS.from_("a", "status"))
    assert gate.open(topic, old.seal("fed", "a", Status(state="offline"))).manifest.state == "offline"
    gate.open(topic, new.seal("fed", "a", STATUS))
    assert verdict(gate, TOPICS.from_("a", "status"), old.seal("fed", "a", STATUS)) == "wrong-key"


def test_nothing_is_let_in_twice_but_what_the_broker_retains(gate):
    signer, to_coordinator = Signer(), TOPICS.from_("a", "need")
    first, second = signer.seal("fed", "a", NEED), signer.seal("fed", "a", NEED)
    gate.open(parse(to_coordinator), second)
    assert verdict(gate, to_coordinator, second) == "replayed"
    assert verdict(gate, to_coordinator, first) == "replayed"
    old, new = (signer.seal("fed", COORDINATOR, BANK) for _ in range(2))
    for _ in range(3):
        gate.open(parse(TOPICS.broadcast("classes")), new)
    assert verdict(gate, TOPICS.broadcast("classes"), old) == "replayed"


def test_a_last_will_that_was_signed_long_ago_is_let_in(gate):
    signer, topic = Signer(), parse(TOPICS.from_("a", "status"))
    will = signer.seal("fed", "a", Status(state="offline"))
    gate.open(topic, signer.seal("fed", "a", STATUS))
    assert gate.open(topic, will).manifest == Status(state="offline")


def test_a_restart_believes_nothing_older_than_what_it_had(tmp_path):
    signer, marks = Signer(), tmp_path / "state" / "marks.json"
    old = {"classes": signer.seal("fed", COORDINATOR, BANK), "receipt": signer.seal("fed", COORDINATOR, RECEIPT, "a")}
    topics = {"classes": TOPICS.broadcast("classes"), "receipt": TOPICS.to("a", "receipt"), "need": TOPICS.to("a", "need")}
    gate = Gate("fed", FirstUse(), marks)
    for kind, manifest, to in (("classes", BANK, None), ("receipt", RECEIPT, "a"), ("need", NEED, "a")):
        gate.open(parse(topics[kind]), signer.seal("fed", COORDINATOR, manifest, to))
    newest = signer.seal("fed", COORDINATOR, BANK)
    gate.open(parse(topics["classes"]), newest)
    again = Gate("fed", FirstUse(), marks)
    for kind, token in old.items():
        assert verdict(again, topics[kind], token) == "replayed"
    again.open(parse(topics["classes"]), newest)  # retained: it is what a restart has to find
    assert set(json.loads(marks.read_text())) == {"key", "classes", "receipt"}


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"classes": "x"}', b"\xff"])
def test_marks_that_cannot_be_read_are_told_and_begin_anew(tmp_path, caplog, damage):
    (tmp_path / "marks.json").write_bytes(damage)
    gate = Gate("fed", FirstUse(), tmp_path / "marks.json")
    assert damage == b"[]" or "cannot be read" in caplog.text
    gate.open(parse(TOPICS.broadcast("classes")), Signer().seal("fed", COORDINATOR, BANK))
    assert json.loads((tmp_path / "marks.json").read_text()).items() >= {"classes": 1}.items()


def test_a_pinned_coordinator_stays_the_only_one_over_restarts(tmp_path):
    path, one, other = tmp_path / "coordinator.key", Signer(), Signer()
    topic = TOPICS.broadcast("classes")
    Gate("fed", Pinned(path)).open(parse(topic), one.seal("fed", COORDINATOR, BANK))
    assert path.read_text() == one.public
    assert verdict(Gate("fed", Pinned(path)), topic, other.seal("fed", COORDINATOR, BANK)) == "wrong-key"
    Gate("fed", Pinned(path)).open(parse(topic), one.seal("fed", COORDINATOR, BANK))


def test_a_key_of_the_settings_goes_before_the_one_that_was_seen_first(tmp_path):
    path, one, other = tmp_path / "coordinator.key", Signer(), Signer()
    path.write_text(one.public)
    gate = Gate("fed", Pinned(path, other.public))
    assert verdict(gate, TOPICS.broadcast("classes"), one.seal("fed", COORDINATOR, BANK)) == "wrong-key"
    gate.open(parse(TOPICS.broadcast("classes")), other.seal("fed", COORDINATOR, BANK))
    path.write_text("no key")
    with pytest.raises(KeyFileError, match="cannot be read as a key"):
        Pinned(path)


def test_a_flood_is_logged_in_a_few_lines(caplog):
    counts: Counter[str] = Counter()
    for _ in range(1000):
        counts["not-signed"] += 1
        note(counts, "topic", Refused("not-signed", "why"))
    assert len(caplog.records) == 10
    assert "512 so far" in caplog.text


def test_a_device_that_was_set_up_anew_begins_to_count_anew(gate):
    """Its new key's numbers are its own; what the old key has said stays said, should it ever count again."""
    topic, keys = TOPICS.from_("a", "need"), {}

    class Known:
        def check(self, sender, key):
            if keys[sender] != key:
                raise Refused("wrong-key", "another")

        def admit(self, sender, key):
            pass

    gate, old, new = Gate("fed", Known()), Signer(), Signer()
    keys["a"] = old.public
    said = [old.seal("fed", "a", NEED) for _ in range(5)]
    gate.open(parse(topic), said[4])
    keys["a"] = new.public
    assert verdict(gate, topic, old.seal("fed", "a", NEED)) == "wrong-key"
    gate.open(parse(topic), new.seal("fed", "a", NEED))
    keys["a"] = old.public
    assert verdict(gate, topic, said[3]) == "replayed"
