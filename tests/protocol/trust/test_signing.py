"""Signed manifests: what a key has signed is read, and nothing else; numbers rise over restarts."""

from __future__ import annotations

import base64
import json
import stat

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.envelope import Envelope, decode
from protocol.errors import KeyFileError, Refused
from protocol.messages import Status
from protocol.trust.signing import FileSequence, Signer, key_text, opened, private_key, public_key, signer_of

STATUS = Status(state="online")
# RFC 8037, appendix A: the key pair of its example.
SEED = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"
PUBLIC = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"


def encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def rfc_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(base64.urlsafe_b64decode(SEED + "="))


def test_what_is_signed_is_read_and_is_a_jws_that_others_can_check():
    signer = Signer(rfc_key())
    assert signer.public == PUBLIC
    token = signer.seal("fed", "a", STATUS)
    assert signer_of(token) == PUBLIC
    envelope = decode(opened(token, PUBLIC))
    assert envelope == Envelope("fed", "a", STATUS, 1, envelope.instance)
    assert decode(opened(signer.seal("fed", "a", STATUS), PUBLIC)).instance == envelope.instance
    assert decode(opened(Signer(rfc_key()).seal("fed", "a", STATUS), PUBLIC)).instance != envelope.instance
    checked = jwt.api_jws.PyJWS(algorithms=["EdDSA"]).decode(token, rfc_key().public_key(), algorithms=["EdDSA"])
    assert json.loads(checked)["sequence"] == 1
    header, payload, signature = token.split(b".")
    rfc_key().public_key().verify(base64.urlsafe_b64decode(signature + b"=="), header + b"." + payload)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_no_other_bytes_are_let_through(data):
    token = Signer(rfc_key()).seal("fed", "a", STATUS)
    place = data.draw(st.integers(0, len(token) - 1))
    changed = token[:place] + data.draw(st.binary(max_size=2)) + token[place + data.draw(st.integers(0, 2)) :]
    if changed != token:
        with pytest.raises(Refused):
            opened(changed, signer_of(changed))


def test_a_token_has_one_spelling():
    """The last letter of a signature has four idle bits; some readers take padding, or pass over foreign letters."""
    token = Signer(rfc_key()).seal("fed", "a", STATUS)
    assert opened(token, signer_of(token))
    letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    idle = token[:-1] + letters[(place := letters.index(token[-1:]) ^ 1) : place + 1]
    for other in (idle, token + b"=", token + b"==", token + b"\n", token[:-4] + b"*" + token[-4:]):
        with pytest.raises(Refused) as caught:
            opened(other, signer_of(other))
        assert caught.value.verdict == "not-signed"


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_noise_is_refused(noise):
    with pytest.raises(Refused):
        opened(noise, signer_of(noise))


def test_another_key_in_the_header_does_not_open_it():
    token, other = Signer(rfc_key()).seal("fed", "a", STATUS), Signer()
    with pytest.raises(Refused) as caught:
        opened(token, other.public)
    assert caught.value.verdict == "bad-signature"


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none", "kid": PUBLIC},
        {"alg": "HS256", "kid": PUBLIC},
        {"alg": "EdDSA"},
        {"alg": "EdDSA", "kid": 5},
        {"alg": "EdDSA", "kid": "x; rm -rf ~"},
        {"alg": "EdDSA", "kid": PUBLIC + "="},
        {"alg": "EdDSA", "kid": PUBLIC, "jku": "http://x"},
        {"alg": "EdDSA", "kid": PUBLIC, "crit": ["b64"], "b64": False},
        ["EdDSA"],
    ],
)
def test_headers_that_are_not_ours_are_refused(header):
    token = b".".join((encoded(json.dumps(header).encode()), encoded(b"{}"), encoded(bytes(64))))
    with pytest.raises(Refused) as caught:
        signer_of(token)
    assert caught.value.verdict == "not-signed"


def test_an_hmac_with_the_public_key_as_its_secret_opens_nothing():
    token = jwt.api_jws.PyJWS().encode(b"{}", PUBLIC, "HS256", {"kid": PUBLIC, "typ": None}).encode()
    with pytest.raises(Refused):
        signer_of(token)
    with pytest.raises(Refused):
        opened(token, PUBLIC)


@pytest.mark.parametrize(
    "text", ["", "abc", PUBLIC + "A", PUBLIC[:-1], PUBLIC[:-1] + "p", PUBLIC[:-1] + "=", "ü" * 43, "+" * 43]
)
def test_what_is_no_key_is_refused(text):
    with pytest.raises(ValueError, match="is not a key"):
        public_key(text)


def test_a_key_comes_back_from_its_text():
    assert key_text(public_key(PUBLIC)) == PUBLIC


def test_a_private_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "state" / "key.pem"
    first = private_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert key_text(private_key(path).public_key()) == key_text(first.public_key())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_ed25519_key_is_named(tmp_path):
    path = tmp_path / "key.pem"
    path.write_text("no key")
    with pytest.raises(KeyFileError, match=r"key\.pem cannot be read as a key"):
        private_key(path)
    path.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(KeyFileError, match="another kind of key"):
        private_key(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(KeyFileError, match="folder"):
        private_key(tmp_path / "folder")


@given(st.lists(st.integers(1, 2500), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_numbers_rise_however_often_the_process_dies(tmp_path_factory, lives):
    path, last, ahead = tmp_path_factory.mktemp("sequence") / "sequence", 0, 1000
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("protocol.trust.signing.RESERVED", ahead)  # so that a life needs several
        for numbers in lives:
            sequence = FileSequence(path)
            for _ in range(numbers):
                number = sequence.next()
                assert number > last
                last = number
    assert last <= sum(lives) + len(lives) * ahead * 3 // 2


def test_a_disk_that_is_full_for_an_hour_leaves_enough_numbers_for_a_thousand_clients(tmp_path, monkeypatch):
    sequence = FileSequence(tmp_path / "sequence")
    sequence.next()

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protocol.trust.signing.write_atomic", no_room)
    first = sequence.next()
    # What is retained for each of a thousand clients is said again after 10, 20, 40, 80, 160 and then every 300 s.
    assert [sequence.next() for _ in range(1000 * 17)][-1] == first + 17_000


def test_a_number_that_cannot_be_kept_is_not_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot be read as a number"):
        FileSequence(tmp_path / "file")
    sequence = FileSequence(tmp_path / "gone" / "sequence")
    (tmp_path / "gone").write_text("where a folder should be")
    with pytest.raises(KeyFileError, match="cannot be written"):
        sequence.next()
