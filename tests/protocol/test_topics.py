"""Topics: what a constructor writes, the parser reads; nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bus import matches
from protocol.errors import WireError
from protocol.messages import MAX_BLOB_SIZE, MAX_CHUNKS, BlobRef
from protocol.topics import Address, Topics, check_name, parse

SHA = "ab" * 32
names = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}", fullmatch=True)
kinds = st.sampled_from(["need", "receipt", "adapter", "notice", "offer", "status"])
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
indices = st.integers(0, 99_999)


@given(names, names, kinds, digests, indices)
@settings(deadline=None)
def test_every_constructor_parses_back(federation, client, kind, sha256, index):
    topics = Topics(federation)
    assert parse(topics.to(client, kind)) == Address(federation, "to", kind, client)
    assert parse(topics.from_(client, kind)) == Address(federation, "from", kind, client)
    assert parse(topics.blob(sha256, index)) == Address(federation, "all", "blob", None, sha256, index)
    assert parse(topics.upload(client, sha256, index)) == Address(federation, "from", "blob", client, sha256, index)


@pytest.mark.parametrize("kind", ["classes", "round", "release", "blob"])
@pytest.mark.parametrize("direction", ["to", "from"])
def test_what_is_said_to_all_is_not_said_to_one(kind, direction):
    with pytest.raises(WireError):
        parse(f"clipcast/1/fed/{direction}/a/{kind}")


@pytest.mark.parametrize("kind", ["classes", "round", "release"])
def test_a_broadcast_topic_parses_back(kind):
    assert parse(Topics("fed").broadcast(kind)) == Address("fed", "all", kind)


def test_the_last_chunk_of_the_largest_blob_in_the_smallest_chunks_has_a_topic():
    last = BlobRef(sha256=SHA, size=MAX_BLOB_SIZE, chunk_size=MAX_BLOB_SIZE // MAX_CHUNKS).chunks - 1
    assert parse(Topics("fed").blob(SHA, last)).index == last


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "/",
        "clipcast/1/fed",
        "clipcast/2/fed/round",
        "other/1/fed/round",
        "/clipcast/1/fed/round",
        "clipcast/1/fed/round/",
        "clipcast/1/fed/nonsense",
        "clipcast/1/fed/#",
        "clipcast/1/+/round",
        "clipcast/1//round",
        "clipcast/1/fed/from/+/offer",
        "clipcast/1/fed/from//offer",
        "clipcast/1/fed/from/../offer",
        "clipcast/1/fed/from/a b/offer",
        "clipcast/1/fed/from/a\0/offer",
        f"clipcast/1/fed/from/{'a' * 65}/offer",
        "clipcast/1/fed/from/a/blob",
        f"clipcast/1/fed/to/a/blob/{SHA}/0",
        f"clipcast/1/fed/blob/{SHA.upper()}/0",
        f"clipcast/1/fed/blob/{SHA[1:]}/0",
        f"clipcast/1/fed/blob/{SHA}/",
        f"clipcast/1/fed/blob/{SHA}/-1",
        f"clipcast/1/fed/blob/{SHA}/01",
        f"clipcast/1/fed/blob/{SHA}/1e3",
        f"clipcast/1/fed/blob/{SHA}/\u0663",
        f"clipcast/1/fed/blob/{SHA}/100000",
        f"clipcast/1/fed/blob/{SHA}/{'9' * 5000}",
        "clipcast/1/fed\n/round",
        "clipcast/1/fed/from/a\n/offer",
        f"clipcast/1/fed/blob/{SHA}\n/0",
    ],
)
def test_a_hostile_topic_is_refused(topic):
    with pytest.raises(WireError, match="topic"):
        parse(topic)


@given(st.lists(st.sampled_from(["clipcast", "1", "fed", "from", "to", "blob", "a", SHA, "0", "", "+"]) | st.text()))
@settings(deadline=None)
def test_any_text_is_an_address_that_names_its_federation_or_refused(levels):
    topic = "/".join(levels)
    try:
        address = parse(topic)
    except WireError:
        return
    assert topic.split("/")[2] == address.federation


@pytest.mark.parametrize(
    "name",
    ["", "+", "#", "a/b", "a b", "-a", ".a", "..", "_a", "$SYS", "é", "a\0", "a" * 65, "a\n"],
)
def test_a_name_that_cannot_be_one_level_is_refused_everywhere(name):
    with pytest.raises(WireError, match="cannot be used"):
        check_name(name, "client id")
    with pytest.raises(WireError, match="federation"):
        Topics(name)
    for build in (
        lambda: Topics("fed").to(name, "need"),
        lambda: Topics("fed").from_(name, "offer"),
        lambda: Topics("fed").upload(name, SHA, 0),
    ):
        with pytest.raises(WireError, match="client id"):
            build()


def test_filters_cover_the_sides_own_topics_and_no_others():
    topics = Topics("fed")

    def client_hears(topic):
        return any(matches(wanted, topic) for wanted in topics.client_filters("a"))

    def coordinator_hears(topic):
        return any(matches(wanted, topic) for wanted in topics.coordinator_filters())

    mine, others, upward = topics.to("a", "receipt"), topics.to("b", "receipt"), topics.from_("a", "offer")
    assert client_hears(mine)
    assert client_hears(topics.broadcast("round"))
    assert client_hears(topics.broadcast("classes"))
    assert not client_hears(others)
    assert not client_hears(upward)
    assert coordinator_hears(upward)
    assert coordinator_hears(topics.upload("b", SHA, 3))
    assert not coordinator_hears(mine)
    assert not coordinator_hears(topics.blob(SHA, 3))
    said = [topics.from_("a", kind) for kind in ("want", "report", "need", "status", "offer")]
    heard_by_the_desk = [topic for topic in said if any(matches(wanted, topic) for wanted in topics.desk_filters())]
    assert heard_by_the_desk == said[:2]
    assert matches(topics.blob_filter(SHA), topics.blob(SHA, 3))
    assert not matches(topics.blob_filter(SHA), topics.blob("cd" * 32, 3))
    assert matches(topics.status_filter(), topics.from_("b", "status"))
    assert not matches(topics.status_filter(), upward)
