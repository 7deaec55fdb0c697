"""Sealed updates: only the coordinator's key opens them, and only for what they were sealed for."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import KeyFileError, WireError
from protocol.trust.sealing import SEALING_BYTES, Unsealer, purpose, seal
from protocol.trust.signing import Signer

OURS = Unsealer()
NAMES = st.text("abcdef-._", min_size=1, max_size=8)
PURPOSES = st.tuples(NAMES, NAMES, st.none() | NAMES, st.integers(0, 2**40))


@given(st.binary(min_size=1, max_size=4096), PURPOSES)
@settings(deadline=None)
def test_what_is_sealed_comes_back_and_is_nowhere_to_be_seen(blob, what):
    sealed = seal(blob, OURS.public, purpose(*what))
    assert OURS.unseal(sealed, purpose(*what)) == blob
    assert len(sealed) == len(blob) + SEALING_BYTES
    assert len(blob) < 8 or blob not in sealed


@given(PURPOSES, PURPOSES)
def test_two_purposes_are_the_same_bytes_only_if_they_are_the_same(one, other):
    assert (purpose(*one) == purpose(*other)) == (one == other)


@given(st.binary(min_size=1, max_size=200), st.data())
@settings(deadline=None)
def test_what_was_changed_cut_or_moved_is_not_opened(blob, data):
    info = purpose("fed", "ann", "run", 3)
    sealed = bytearray(seal(blob, OURS.public, info))
    for other in (("fed", "bob", "run", 3), ("fed", "ann", "run", 4), ("fed", "ann", None, 3), ("other", "ann", "run", 3)):
        with pytest.raises(WireError, match="not sealed"):
            OURS.unseal(bytes(sealed), purpose(*other))
    with pytest.raises(WireError, match="not sealed"):
        OURS.unseal(bytes(sealed[: data.draw(st.integers(0, len(sealed) - 1))]), info)
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(WireError, match="not sealed"):
        OURS.unseal(bytes(sealed), info)


def test_another_key_opens_nothing():
    info = purpose("fed", "ann", "run", 3)
    with pytest.raises(WireError, match="not sealed"):
        Unsealer().unseal(seal(b"update", OURS.public, info), info)


@pytest.mark.parametrize("key", ["A" * 43, "short", "!" * 43])
def test_what_cannot_be_sealed_to_is_told(key):
    with pytest.raises(WireError, match="cannot be sealed to"):
        seal(b"update", key, b"")


def test_the_key_is_made_once_for_its_owner_alone(tmp_path):
    first = Unsealer.open(tmp_path)
    assert stat.S_IMODE((tmp_path / "sealing.pem").stat().st_mode) == 0o600
    assert Unsealer.open(tmp_path).public == first.public
    Signer.open(tmp_path)
    (tmp_path / "sealing.pem").write_bytes((tmp_path / "key.pem").read_bytes())
    with pytest.raises(KeyFileError, match="another kind of key than X25519"):
        Unsealer.open(tmp_path)
