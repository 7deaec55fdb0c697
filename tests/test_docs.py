"""What docs/wire.md shows is what travels: its examples are read, one of each kind, and its topics are the topics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protocol.envelope import COORDINATOR, KINDS, decode, encode
from protocol.signing import Signer, opened, signer_of
from protocol.topics import Topics, parse

WIRE = (Path(__file__).parent.parent / "docs" / "wire.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)```", WIRE, re.DOTALL)


def test_there_is_an_example_of_every_kind_under_its_name() -> None:
    assert sorted(decode(text.encode()).manifest.kind for text in EXAMPLES) == sorted(KINDS)
    named = re.findall(r"\*\*`(\w+)`\*\*", WIRE)
    assert named == [decode(text.encode()).manifest.kind for text in EXAMPLES]


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_is_what_would_travel(text: str) -> None:
    envelope = decode(text.encode())
    compact = text.strip().replace("\n", " ").replace(", ", ",").replace(": ", ":")
    assert encode(envelope).decode() == compact
    token = Signer().seal(envelope.federation, envelope.sender, envelope.manifest)
    assert decode(opened(token, signer_of(token))).manifest == envelope.manifest


def test_the_topics_of_the_table_are_the_topics() -> None:
    topics, sha = Topics("lab"), "ab" * 32
    filled = [
        re.sub("FEDERATION", "lab", topic).replace("SHA256", sha).replace("ID", "jetson-1").replace("/I", "/0")
        for topic in re.findall(r"\| `(clipcast/1/[^`]+)` \|", WIRE)
    ]
    assert [topic.replace("KIND", "need") for topic in filled] == [
        topics.broadcast("classes"),
        topics.broadcast("round"),
        topics.blob(sha, 0),
        topics.to("jetson-1", "need"),
        topics.from_("jetson-1", "need"),
        topics.upload("jetson-1", sha, 0),
    ]
    assert all(parse(topic.replace("KIND", "need")).federation == "lab" for topic in filled)
    assert COORDINATOR in WIRE
