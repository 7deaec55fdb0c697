"""Envelopes: every manifest survives the way; everything else is a WireError."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.envelope import COORDINATOR, KINDS, MAX_MANIFEST, Envelope, decode, encode, expect
from protocol.errors import WireError
from protocol.messages import (
    CHUNK_SIZE,
    MAX_BLOB_SIZE,
    MAX_CHUNKS,
    MAX_LARGE_BLOB_SIZE,
    BlobRef,
    ClassBankManifest,
    ClientAdapter,
    LargeBlobRef,
    Need,
    Notice,
    Offer,
    Privacy,
    Receipt,
    Recipe,
    RoundPlan,
    Status,
    Successor,
)
from protocol.release.manifests import Health, Release, Report, Smoke, Want

SHA = "ab" * 32
names = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}", fullmatch=True)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
counts = st.integers(0, 2**40)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
refs = st.builds(
    BlobRef,
    sha256=digests,
    size=st.integers(1, MAX_BLOB_SIZE),
    chunk_size=st.integers(MAX_BLOB_SIZE // MAX_CHUNKS, CHUNK_SIZE),
)
privacies = st.builds(
    Privacy,
    clip=positive,
    noise_multiplier=st.floats(1e-3, 1e6),
    delta=st.floats(0, 1e-3, exclude_min=True),
    epsilon=positive,
)
plain = st.builds(
    Recipe,
    rank=st.integers(1, 256),
    alpha=positive,
    projections=st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj", "out_proj"]), min_size=1, unique=True).map(tuple),
    learning_rate=positive,
    mu=st.floats(min_value=0, allow_infinity=False),
    features_from=st.sampled_from(["start", "trained"]),
)
recipes = plain | st.builds(Recipe, features_per_class=st.just(0), privacy=privacies)
versions = st.integers(1, 2**40)


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


MANIFESTS = {
    "key": st.builds(Successor, next=st.from_regex(r"\A[A-Za-z0-9_-]{43}\Z")),
    "classes": st.builds(ClassBankManifest, version=counts, blob=refs),
    "round": st.builds(
        RoundPlan,
        run=names,
        start=counts,
        round=counts,
        state=st.sampled_from(["open", "finished"]),
        classes=digests,
        adapter=refs,
        individual=st.booleans(),
        participants=st.lists(names, max_size=5).map(tuple),
        recipe=recipes,
        seed=counts,
        deadline_s=positive,
        seal_to=st.none() | st.from_regex(r"\A[A-Za-z0-9_-]{43}\Z"),
    ),
    "adapter": st.builds(ClientAdapter, run=names, round=counts, adapter=refs),
    "offer": st.builds(
        Offer,
        round=counts,
        base=digests,
        blob=refs,
        samples=st.integers(1, 2**40),
        loss=st.none() | finite,
        accuracy=st.none() | finite,
        train_seconds=st.none() | finite,
        epsilon=st.none() | st.floats(0, allow_nan=False, allow_infinity=False),
        bytes_received=counts,
    ),
    "need": st.builds(Need, sha256=digests, missing=st.binary(min_size=1, max_size=4096).map(bytes.hex)),
    "receipt": st.builds(
        Receipt, round=counts, sha256=digests, accepted=st.booleans(), reason=names, detail=st.text(max_size=500)
    ),
    "notice": st.builds(Notice, reason=names, detail=st.text(max_size=500)),
    "status": st.builds(
        Status,
        state=st.sampled_from(["online", "offline"]),
        phase=st.sampled_from(["waiting", "training", "failed"]),
        round=st.none() | counts,
        profile=st.none() | names,
        bits=st.sampled_from([None, 4, 8, 32]),
        max_rank=st.none() | st.integers(1, 256),
        detail=st.text(max_size=500),
    ),
    "release": st.builds(
        Release,
        version=versions,
        state=st.sampled_from(["open", "paused", "aborted"]),
        rollback=st.booleans(),
        artefact=st.builds(LargeBlobRef, sha256=digests, size=st.integers(1, MAX_LARGE_BLOB_SIZE)),
        adapter=st.none() | refs,
        classes=st.none() | refs,
        profiles=st.lists(names, max_size=4).map(tuple),
        devices=st.lists(names, max_size=32).map(tuple),
        percent=st.floats(0, 100),
        smoke=st.builds(
            Smoke,
            picture=st.binary(min_size=1, max_size=3750).map(base64_text),
            label=st.text(min_size=1, max_size=60),
            embedding=st.binary(min_size=3, max_size=1024).map(base64_text),
            min_cosine=st.floats(0, 1, exclude_min=True, exclude_max=True),
        ),
        health=st.builds(Health, window_s=st.floats(0, 7 * 86400, exclude_min=True), max_latency_ratio=st.floats(1, 1000)),
        note=st.text(max_size=200),
    ),
    "want": st.builds(Want, sha256=digests, missing=st.binary(min_size=1, max_size=4096).map(bytes.hex)),
    "report": st.builds(
        Report,
        running=counts,
        release=versions,
        phase=st.sampled_from(["idle", "fetching", "staged", "trying", "committed", "refused", "rolled-back"]),
        profile=st.none() | names,
        reason=st.none() | names,
        detail=st.text(max_size=500),
        answers=counts,
        errors=counts,
        latency_ms=st.none() | finite,
        agreement=st.none() | st.floats(0, 1),
    )
    | st.builds(Report, running=counts),
}
PLAN = RoundPlan(
    run="run-1",
    start=1,
    round=1,
    state="open",
    classes=SHA,
    adapter=BlobRef(sha256=SHA, size=5000),
    participants=("a",),
    recipe=Recipe(),
    seed=0,
    deadline_s=60.0,
)
OFFER = Offer(
    round=1,
    base=SHA,
    blob=BlobRef(sha256=SHA, size=5000),
    samples=3,
    loss=0.5,
    accuracy=0.25,
    train_seconds=1.5,
    bytes_received=0,
)
REPORT = Report(running=6, release=7, phase="trying")


def changed(manifest, frame=None, **body) -> bytes:
    """Return the envelope of `manifest` with some fields replaced, as a sender without our checks would write it."""
    data = json.loads(encode(Envelope("fed", "a", manifest)))
    data["body"] |= body
    return json.dumps(data | (frame or {})).encode()


def test_every_kind_of_manifest_is_tried():
    assert set(MANIFESTS) == set(KINDS)


@pytest.mark.parametrize("kind", sorted(MANIFESTS))
@given(data=st.data(), federation=names, sender=names)
@settings(deadline=None, max_examples=30)
def test_a_manifest_survives_the_way(kind, data, federation, sender):
    instance = data.draw(st.from_regex(r"\A[0-9a-f]{16}\Z"))
    envelope = Envelope(federation, sender, data.draw(MANIFESTS[kind]), data.draw(counts), instance)
    encoded = encode(envelope)
    assert decode(encoded) == envelope
    assert encode(decode(encoded)) == encoded


def test_a_manifest_of_exactly_12_kb_is_read_and_one_byte_more_is_refused():
    data = encode(Envelope("fed", COORDINATOR, PLAN))
    assert decode(data.ljust(MAX_MANIFEST)).manifest == PLAN
    with pytest.raises(WireError, match="12289 bytes exceeds 12288"):
        decode(data.ljust(MAX_MANIFEST + 1))


def test_a_manifest_above_12_kb_is_not_sent():
    crowd = PLAN.model_copy(update={"participants": tuple(f"client-{i:056}" for i in range(300))})
    with pytest.raises(WireError, match=r"round manifest of .* exceeds 12288"):
        encode(Envelope("fed", COORDINATOR, crowd))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (changed(OFFER, {"kind": "nonsense"}), "unknown kind"),
        (changed(OFFER, {"kind": "need"}), "bad need manifest"),
        (changed(OFFER, {"v": 2}), "version 2"),
        (changed(OFFER, {"v": "1"}), "not an envelope: v"),
        (changed(OFFER, {"extra": 1}), "not an envelope: extra"),
        (changed(OFFER, {"sequence": -1}), "not an envelope: sequence"),
        (changed(OFFER, {"sequence": "1"}), "not an envelope: sequence"),
        (changed(OFFER, {"sender": "a/b"}), "not an envelope: sender"),
        (changed(OFFER, {"sender": "a\n"}), "not an envelope: sender"),
        (changed(OFFER, {"federation": "+"}), "not an envelope: federation"),
        (changed(OFFER, {"body": []}), "not an envelope: body"),
        (changed(OFFER, surprise=1), "bad offer manifest: surprise"),
        (changed(OFFER, loss=float("nan")), "bad offer manifest: loss"),
        (changed(OFFER, accuracy=float("inf")), "bad offer manifest: accuracy"),
        (changed(PLAN, deadline_s=float("nan")), "bad round manifest: deadline_s"),
        (changed(PLAN, recipe={"learning_rate": float("inf")}), "bad round manifest: recipe.learning_rate"),
        (changed(PLAN, recipe={"projections": ["q_proj", "q_proj"]}), "bad round manifest: recipe"),
        (changed(OFFER, round=-1), "bad offer manifest: round"),
        (changed(OFFER, round=2**41), "bad offer manifest: round"),
        (changed(OFFER, samples=0), "bad offer manifest: samples"),
        (changed(OFFER, base=SHA.upper()), "bad offer manifest: base"),
        (changed(OFFER, blob={"sha256": SHA, "size": 0}), "bad offer manifest: blob.size"),
        (changed(OFFER, blob={"sha256": SHA, "size": 1, "chunk_size": 1}), "bad offer manifest: blob.chunk_size"),
        (changed(REPORT, phase="done"), "bad report manifest: phase"),
        (changed(REPORT, release=None), "bad report manifest: Value error, phase 'trying' of no release"),
        (changed(REPORT, release=0), "bad report manifest: release"),
        (changed(REPORT, latency_ms=float("inf")), "bad report manifest: latency_ms"),
        (b"", "not an envelope"),
        (b"null", "not an envelope"),
        (b"[" * 12000, "not an envelope"),
        (b'{"v":' + b"9" * 9000 + b"}", "not an envelope"),
        (b"\xff\xfe", "not an envelope"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused_and_named(data, problem):
    with pytest.raises(WireError, match=problem):
        decode(data)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode(data)


@given(st.sampled_from(sorted(MANIFESTS)).flatmap(MANIFESTS.get), st.data())
@settings(deadline=None, max_examples=100)
def test_damaged_envelopes_are_read_or_refused(manifest, data):
    encoded = bytearray(encode(Envelope("fed", "a", manifest)))
    position = data.draw(st.integers(0, len(encoded) - 1))
    replacement = data.draw(st.binary(max_size=3))
    encoded[position : position + data.draw(st.integers(0, 3))] = replacement
    try:
        envelope = decode(bytes(encoded))
    except WireError:
        return
    assert decode(encode(envelope)) == envelope


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([(PLAN, name) for name in RoundPlan.model_fields] + [(OFFER, name) for name in Offer.model_fields]),
    json_values,
)
@settings(deadline=None, max_examples=150)
def test_any_json_in_any_field_is_read_or_refused(target, value):
    manifest, name = target
    try:
        envelope = decode(changed(manifest, **{name: value}))
    except WireError:
        return
    assert decode(encode(envelope)) == envelope


def test_a_manifest_of_another_kind_than_expected_is_refused():
    envelope = decode(encode(Envelope("fed", "a", OFFER)))
    assert expect(envelope, Offer) == OFFER
    with pytest.raises(WireError, match="expected a need manifest, got offer"):
        expect(envelope, Need)
