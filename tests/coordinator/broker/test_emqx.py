"""EMQX's files, without an EMQX: both are well formed, and the rules let each role do what it must and nothing else.

The rules are judged as EMQX's documentation and its source (emqx_authz_rule, emqx_topic:match) say: the first that fits
counts, a rule's filter covers one that is subscribed to level by level, of `$share` only the filter behind it counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.broker.emqx import emqx
from protocol.bus import matches
from protocol.errors import WireError
from protocol.messages import CHUNK_SIZE, MIN_CHUNK_SIZE
from protocol.transfer.exchange import chunk_size
from tests.faults.rights import FILTERS, ROLES, TOPICS, may_read, may_write

FILES = emqx("lab", Path("/etc/emqx/lab"), Path("/etc/ca"))


def erlang_terms(text: str) -> list[Any]:
    """Read Erlang terms: tuples and lists become Python's, atoms and strings become str; raises ValueError."""
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("%%"))
    tokens = re.findall(r'"[^"]*"|[a-z][a-z_]*|[{}\[\],.]|\S', text)
    position = 0

    def take(wanted: str | None = None) -> str:
        nonlocal position
        if position >= len(tokens) or (wanted is not None and tokens[position] != wanted):
            raise ValueError(f"expected {wanted or 'a term'} at token {position}")
        position += 1
        return str(tokens[position - 1])

    def term() -> Any:
        token = take()
        if token in "{[":
            end, items = {"{": "}", "[": "]"}[token], []
            while True:
                items.append(term())
                if tokens[position : position + 1] != [","]:
                    break
                take(",")
            take(end)
            return tuple(items) if token == "{" else items
        if not re.fullmatch(r'"[^"]*"|[a-z][a-z_]*', token):
            raise ValueError(f"{token!r} is no term")
        return token.strip('"')

    found = []
    while position < len(tokens):
        found.append(term())
        take(".")
    return found


@dataclass(frozen=True)
class Rule:
    allowed: bool
    who: str | None  # None: everybody
    action: str
    topics: tuple[str, ...]


def read_rules(text: str) -> list[Rule]:
    rules = []
    for permission, who, *rest in erlang_terms(text):
        action, topics = rest or ("all", ["#"])
        assert permission in ("allow", "deny")
        assert action in ("publish", "subscribe", "all")
        assert who == "all" or (who[0] == "username" and len(who) == 2)
        rules.append(Rule(permission == "allow", None if who == "all" else who[1], action, tuple(topics)))
    return rules


def covers(rule: str, wanted: str) -> bool:
    """emqx_topic:match: level by level, `+` covers any one level, `#` the rest; a wildcard at the root covers no `$`."""
    if wanted.startswith("$") and rule[:1] in ("+", "#"):
        return False
    levels, asked = rule.split("/"), wanted.split("/")
    for position, level in enumerate(levels):
        if level == "#":
            return True
        if position >= len(asked) or level not in ("+", asked[position]):
            return False
    return len(levels) == len(asked)


RULES = read_rules(FILES["acl.conf"])


def allows(user: str, action: str, topic: str) -> bool:
    wanted = topic.split("/", 2)[2] if topic.startswith("$share/") else topic
    for rule in RULES:
        fits = rule.action in (action, "all") and rule.who in (None, user)
        if fits and any(covers(filter_.replace("${username}", user), wanted) for filter_ in rule.topics):
            return rule.allowed
    return False  # `no_match = deny`


def test_every_role_may_say_what_it_must_and_nothing_else() -> None:
    wrong = [
        (role, topic) for role in ROLES for topic in TOPICS if allows(role, "publish", topic) is not may_write(role, topic)
    ]
    assert wrong == []
    assert len(ROLES) * len(TOPICS) >= 150


def test_no_filter_that_is_allowed_brings_what_a_role_may_not_read() -> None:
    wrong, heard = [], set()
    for role in ROLES:
        for filter_ in (*TOPICS, *FILTERS):
            if not allows(role, "subscribe", filter_):
                continue
            plain = filter_.split("/", 2)[2] if filter_.startswith("$share/") else filter_
            brought = {topic for topic in TOPICS if matches(plain, topic)}
            heard |= {(role, topic) for topic in brought}
            wrong += [(role, filter_, topic) for topic in brought if not may_read(role, topic)]
    assert wrong == []
    assert heard == {(role, topic) for role in ROLES for topic in TOPICS if may_read(role, topic)}


class Hocon:
    """Reads the HOCON that we write: `key = value`, `a.b { ... }`, lists and comments; raises ValueError."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
        self._tokens = [*re.findall(r'"[^"]*"|[\w.]+|[{}\[\]=,]|\S', text), ""]

    def whole(self) -> dict[str, Any]:
        return self._block("")

    def _block(self, end: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self._tokens[0] != end:
            *path, last = self._key().split(".")
            place = found
            for part in path:
                place = place.setdefault(part, {})
            if last in place:
                raise ValueError(f"{last} is set twice")
            place[last] = self._value()
        self._tokens.pop(0)
        return found

    def _key(self) -> str:
        key = self._tokens.pop(0)
        if not re.fullmatch(r"[a-z_][a-z_0-9.]*", key):
            raise ValueError(f"{key!r} is no key")
        if self._tokens[0] == "=":
            self._tokens.pop(0)
        return key

    def _value(self) -> Any:
        token = self._tokens.pop(0)
        if token == "{":
            return self._block("}")
        if token == "[":
            return self._items()
        if not re.fullmatch(r'"[^"]*"|\w+', token):
            raise ValueError(f"{token!r} is no value")
        return token.strip('"')

    def _items(self) -> list[Any]:
        items = []
        while self._tokens[0] != "]":
            items.append(self._value())
            if self._tokens[0] == ",":
                self._tokens.pop(0)
        self._tokens.pop(0)
        return items


def test_the_configuration_is_well_formed_and_says_what_matters() -> None:
    conf = Hocon(FILES["emqx.conf"]).whole()
    tls = conf["listeners"]["ssl"]["default"]
    assert tls["bind"] == "0.0.0.0:8883"
    assert {name: tls["ssl_options"][name] for name in ("verify", "fail_if_no_peer_cert", "versions", "cacertfile")} == {
        "verify": "verify_peer",
        "fail_if_no_peer_cert": "true",
        "versions": ["tlsv1.3"],
        "cacertfile": "/etc/ca/ca.pem",
    }
    assert all(conf["listeners"][other]["default"] == {"enable": "false"} for other in ("tcp", "ws", "wss"))
    assert conf["mqtt"]["peer_cert_as_username"] == "cn"
    assert chunk_size(int(conf["mqtt"]["max_packet_size"])) == CHUNK_SIZE > MIN_CHUNK_SIZE
    assert conf["authorization"]["no_match"] == "deny"
    assert conf["authorization"]["sources"] == [{"type": "file", "enable": "true", "path": "/etc/emqx/lab/acl.conf"}]
    assert conf["retainer"]["enable"] == conf["mqtt"]["retain_available"] == "true"
    assert "not tried on a live EMQX" in FILES["emqx.conf"]


@pytest.mark.parametrize("damage", ["{allow, all", "{allow, all}", "{allow all}.", "{allow, , all}.", "Allow."])
def test_the_reader_of_rules_refuses_what_is_no_rule(damage: str) -> None:
    with pytest.raises(ValueError):
        erlang_terms(damage)


@pytest.mark.parametrize("damage", ["a = ", "a { b = 1", "a = 1\na = 2", "= 1", "a = 1 }", "a = {"])
def test_the_reader_of_hocon_refuses_what_is_none(damage: str) -> None:
    with pytest.raises(ValueError):
        Hocon(damage).whole()


def test_a_federation_needs_a_name() -> None:
    with pytest.raises(WireError):
        emqx("a/b", Path(), Path())
