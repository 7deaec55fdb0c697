"""The broker in memory: it must behave as a real one does."""

from __future__ import annotations

import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bus import Connected, Delivery, MemoryBroker, Publish, Subscribe, Unsubscribe, matches
from protocol.errors import BusError

WILL = Publish("status/a", b"gone", retain=True)
levels = st.lists(st.sampled_from(["a", "b", "", "a.b", "0"]), min_size=1, max_size=4)


def received(bus):
    events = []
    while (event := bus.receive(0.0)) is not None:
        events.append(event)
    return events


def listener(broker, topic_filter="#"):
    bus = broker.connect()
    bus.do(Subscribe(topic_filter))
    assert isinstance(bus.receive(0.0), Connected)
    return bus


def naive_matches(topic_filter: str, topic: str) -> bool:
    """MQTT 5, 4.7.1, as a regular expression."""
    pattern = "/".join("[^/]*" if part == "+" else re.escape(part) for part in topic_filter.split("/"))
    pattern = re.sub(r"^\\#$", ".*", re.sub(r"/\\#$", "(/.*)?", pattern))
    return re.fullmatch(pattern, topic) is not None


@given(st.lists(st.sampled_from(["a", "b", "", "a.b", "0", "+"]), max_size=4), st.booleans(), levels)
@settings(deadline=None, max_examples=300)
def test_wildcards_match_as_the_naive_twin_does(parts, open_end, topic):
    wanted = "/".join([*parts, "#"] if open_end or not parts else parts)
    assert matches(wanted, "/".join(topic)) == naive_matches(wanted, "/".join(topic))


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/#", "a", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("+", "a/b", False),
        ("a", "a/b", False),
        ("a/b", "a", False),
    ],
)
def test_wildcards_at_the_edges(topic_filter, topic, expected):
    assert matches(topic_filter, topic) is expected
    assert naive_matches(topic_filter, topic) is expected


def test_a_message_reaches_each_subscriber_once_and_nobody_else():
    broker = MemoryBroker()
    both, other = listener(broker, "a/+"), listener(broker, "b")
    both.do(Subscribe("a/b"))
    broker.connect().do(Publish("a/b", b"x"))
    assert received(both) == [Delivery("a/b", b"x")]
    assert received(other) == []


def test_the_last_retained_message_greets_a_late_subscriber_and_an_empty_one_removes_it():
    broker = MemoryBroker()
    sender = broker.connect()
    for payload in (b"1", b"2"):
        sender.do(Publish("r", payload, retain=True))
    sender.do(Publish("r", b"fleeting"))
    assert received(listener(broker)) == [Delivery("r", b"2")]
    sender.do(Publish("r", b"", retain=True))
    assert received(listener(broker)) == []


def test_nothing_comes_after_an_unsubscription():
    broker = MemoryBroker()
    bus = listener(broker)
    bus.do(Unsubscribe("#"))
    bus.do(Publish("a", b"x"))
    assert received(bus) == []


def test_a_crash_speaks_the_last_will_once_and_retains_it():
    broker = MemoryBroker()
    watcher, doomed = listener(broker), broker.connect(WILL)
    doomed.drop()
    doomed.drop()
    assert received(watcher) == [Delivery("status/a", b"gone")]
    assert received(listener(broker)) == [Delivery("status/a", b"gone")]


def test_a_good_bye_is_sent_and_the_last_will_is_not():
    broker = MemoryBroker()
    watcher, leaving = listener(broker), broker.connect(WILL)
    leaving.close(Publish("status/a", b"bye", retain=True))
    leaving.drop()
    assert received(watcher) == [Delivery("status/a", b"bye")]


def test_who_has_left_hears_nothing_more():
    broker = MemoryBroker()
    left = listener(broker)
    left.close()
    broker.connect().do(Publish("a", b"x"))
    assert received(left) == []


def test_a_packet_above_the_limit_is_refused_and_reaches_nobody():
    broker = MemoryBroker(max_packet=100)
    watcher, sender = listener(broker), broker.connect()
    assert sender.receive(0.0) == Connected(100)
    with pytest.raises(BusError, match="limit of 100 bytes"):
        sender.do(Publish("topic", bytes(96)))
    assert received(watcher) == []
    sender.do(Publish("topic", bytes(95)))
    assert received(watcher) == [Delivery("topic", bytes(95))]


def test_wake_ends_a_wait_from_another_thread():
    bus = MemoryBroker().connect()
    bus.receive(0.0)
    results = []
    waiting = threading.Thread(target=lambda: results.append(bus.receive(60.0)))
    waiting.start()
    bus.wake()
    waiting.join(10.0)
    assert results == [None]
