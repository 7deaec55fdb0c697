"""What a board and the coordinator say to each other at enrolment, and what nobody else can make of it."""

from __future__ import annotations

import base64

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Refused, WireError
from protocol.trust.claims import MAX_MESSAGE, Claim, EnrolAnswer, EnrolRequest, claimed_id, seal, unseal

CLAIM, NONCE, KEY = Claim.make("jetson-1"), "ab" * 16, "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
PEM = "-----BEGIN CERTIFICATE REQUEST-----\nMAo=\n-----END CERTIFICATE REQUEST-----\n"
REQUEST = EnrolRequest(federation="lab", id="jetson-1", nonce=NONCE, csr=PEM, key=KEY)
ANSWER = EnrolAnswer(federation="lab", id="jetson-1", nonce=NONCE, certificate=PEM, coordinator_key=KEY)
NAMES = st.from_regex(r"\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}\Z").filter(lambda name: name not in ("coordinator", "enrol"))


@given(NAMES)
def test_a_token_is_read_back_whatever_the_name(name: str) -> None:
    claim = Claim.make(name)
    assert Claim.read(f" {claim}\n") == claim
    assert claim.secret not in claim.proof


@pytest.mark.parametrize(
    "text",
    [
        "",
        "jetson-1",
        f"jetson-1.{CLAIM.secret[:-1]}",
        f"coordinator.{CLAIM.secret}",
        f"enrol.{CLAIM.secret}",
        f".{CLAIM.secret}",
    ],
)
def test_what_is_no_whole_token_is_said_to_be_none(text: str) -> None:
    with pytest.raises(WireError, match="clipcast device add ID"):
        Claim.read(text)


@pytest.mark.parametrize(
    "message", [REQUEST, ANSWER, EnrolAnswer(federation="lab", id="jetson-1", nonce=NONCE, refused="no")]
)
def test_a_message_comes_back_as_it_was(message: EnrolRequest | EnrolAnswer) -> None:
    token = seal(message, CLAIM.proof)
    assert claimed_id(token) == "jetson-1"
    assert unseal(token, CLAIM.proof, type(message), "lab", NONCE) == message


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_byte_of_a_message_can_be_changed(where: int, change: int) -> None:
    token = bytearray(seal(REQUEST, CLAIM.proof))
    place = where % len(token)
    token[place] ^= change
    try:
        found = unseal(bytes(token), CLAIM.proof, EnrolRequest, "lab", NONCE)
    except Refused:
        return
    # base64url of a length that fits no whole number of bytes has bits to spare, which say nothing
    assert found == REQUEST


@given(st.binary(max_size=300))
def test_whatever_comes_is_refused_not_a_crash(data: bytes) -> None:
    with pytest.raises(Refused):
        unseal(data, CLAIM.proof, EnrolRequest, "lab", NONCE)


@pytest.mark.parametrize(
    ("verdict", "token"),
    [
        ("bad-signature", seal(REQUEST, Claim.make("jetson-1").proof)),
        ("malformed", seal(ANSWER, CLAIM.proof)),  # an answer given back as a request
        ("wrong-topic", seal(REQUEST.model_copy(update={"federation": "other"}), CLAIM.proof)),
        ("wrong-topic", seal(REQUEST.model_copy(update={"nonce": "cd" * 16}), CLAIM.proof)),
        ("too-long", b"a" * (MAX_MESSAGE + 1)),
        ("not-signed", jwt.encode({"id": "jetson-1"}, "", "none", {"kid": "jetson-1"}).encode()),
        ("not-signed", b"a.b.c"),
    ],
)
def test_each_refusal_has_its_verdict(verdict: str, token: bytes) -> None:
    with pytest.raises(Refused) as refused:
        unseal(token, CLAIM.proof, EnrolRequest, "lab", NONCE)
    assert refused.value.verdict == verdict


def test_the_name_in_the_header_is_the_name_inside() -> None:
    token = seal(REQUEST, CLAIM.proof)
    stolen = jwt.api_jws.PyJWS().encode(
        base64.urlsafe_b64decode(token.split(b".")[1] + b"=="),
        bytes.fromhex(CLAIM.proof),
        "HS256",
        {"kid": "jetson-2", "typ": None},
    )
    with pytest.raises(Refused, match="on a topic of others"):
        unseal(stolen.encode(), CLAIM.proof, EnrolRequest, "lab", NONCE)


@pytest.mark.parametrize(
    "fields",
    [{}, {"certificate": PEM}, {"coordinator_key": KEY}, {"certificate": PEM, "coordinator_key": KEY, "refused": "no"}],
)
def test_an_answer_says_either_yes_or_no(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a certificate and the coordinator's key, or the reason"):
        EnrolAnswer(federation="lab", id="jetson-1", nonce=NONCE, **fields)
