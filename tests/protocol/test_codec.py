"""The codec against naive twins, and against damage."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from protocol.codec import (
    MAX_BANK_HEADER,
    MAX_HEADER,
    decode_adapter,
    decode_bank,
    decode_update,
    encode_adapter,
    encode_bank,
    encode_update,
    largest_update,
    reference,
    sha256,
)
from protocol.errors import WireError
from protocol.messages import TextBank, Update

DECODERS = {"adapter": decode_adapter, "bank": decode_bank, "update": decode_update}
halves = st.floats(-65504, 65504, width=32)
unit = st.floats(-1, 1, width=32)
shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=4)
adapters = st.dictionaries(
    st.text(min_size=1, max_size=8), hnp.arrays(np.float32, shapes, elements=halves), max_size=4
).filter(lambda adapter: "__metadata__" not in adapter)


@st.composite
def updates(draw) -> Update:
    prototypes, features, dim = draw(st.integers(0, 4)), draw(st.integers(0, 4)), draw(st.integers(1, 5))
    indices = st.integers(0, 2**31 - 1)
    return Update(
        draw(adapters),
        draw(hnp.arrays(np.float32, (prototypes, dim), elements=unit)),
        draw(hnp.arrays(np.int32, prototypes, elements=indices)),
        draw(hnp.arrays(np.int32, prototypes, elements=indices)),
        draw(hnp.arrays(np.int32, prototypes, elements=indices)),
        draw(hnp.arrays(np.float32, (features, dim), elements=unit)),
        draw(hnp.arrays(np.int32, features, elements=indices)),
    )


def an_update() -> Update:
    rng = np.random.default_rng(0)
    return Update(
        {"a.lora_A": rng.normal(size=(2, 3)).astype(np.float32), "a.lora_B": rng.normal(size=(3, 2)).astype(np.float32)},
        rng.normal(size=(2, 4)).astype(np.float32),
        np.array([0, 1], np.int32),
        np.array([3, 4], np.int32),
        np.array([2, 0], np.int32),
        rng.normal(size=(3, 4)).astype(np.float32),
        np.array([0, 1, 1], np.int32),
    )


def a_bank(classes: int = 2, logit_scale: float = 100.0) -> TextBank:
    embeddings = np.eye(classes, 3, dtype=np.float32)
    return TextBank(7, tuple(f"class {i}" for i in range(classes)), ("a {}",), embeddings, logit_scale, "clip", "digest")


BLOBS = {"adapter": encode_adapter(an_update().adapter), "bank": encode_bank(a_bank()), "update": encode_update(an_update())}


def naive_half(value: float) -> float:
    return struct.unpack("<e", struct.pack("<e", value))[0]


@given(adapters)
@settings(deadline=None)
def test_an_adapter_comes_back_rounded_to_the_nearest_float16(adapter):
    decoded = decode_adapter(encode_adapter(adapter))
    assert list(decoded) == sorted(adapter)
    for name, array in adapter.items():
        assert decoded[name].dtype == np.float32
        assert decoded[name].shape == array.shape
        for sent, got in zip(array.flat, decoded[name].flat, strict=True):
            assert got == naive_half(float(sent))
            assert abs(float(got) - float(sent)) <= max(abs(float(sent)) * 2.0**-11, 2.0**-25)


@given(updates())
@settings(deadline=None)
def test_an_update_comes_back_with_features_within_half_an_int8_step(update):
    decoded = decode_update(encode_update(update))
    assert list(decoded.adapter) == sorted(update.adapter)
    for name in ("prototype_classes", "prototype_counts", "prototype_correct", "labels"):
        np.testing.assert_array_equal(getattr(decoded, name), getattr(update, name))
    np.testing.assert_array_equal(decoded.prototypes, np.vectorize(naive_half, otypes=[np.float32])(update.prototypes))
    assert decoded.features.shape == update.features.shape
    for sent, got in zip(update.features, decoded.features, strict=True):
        largest = max(abs(float(value)) for value in sent)
        for a, b in zip(sent, got, strict=True):
            assert abs(float(a) - float(b)) <= largest / 127 * 0.5001 + float(np.finfo(np.float32).tiny)


@given(
    st.lists(st.text(max_size=6), min_size=1, max_size=5),
    st.lists(st.text(max_size=6), max_size=3),
    st.floats(0.01, 1e6),
    st.integers(0, 100),
)
@settings(deadline=None)
def test_a_bank_comes_back_exactly(classes, templates, scale, version):
    rows = np.random.default_rng(version).normal(size=(len(classes), 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bank = TextBank(version, tuple(classes), tuple(templates), rows, scale, "model", "digest")
    decoded = decode_bank(encode_bank(bank))
    np.testing.assert_array_equal(decoded.embeddings, rows)
    assert dataclasses.replace(decoded, embeddings=None) == dataclasses.replace(bank, embeddings=None)


@given(updates(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_equal_records_in_another_order_give_equal_bytes(update, rng):
    items = list(update.adapter.items())
    rng.shuffle(items)
    shuffled = {name: np.asfortranarray(array) for name, array in items}
    assert encode_adapter(shuffled) == encode_adapter(update.adapter)
    assert encode_update(dataclasses.replace(update, adapter=shuffled)) == encode_update(update)


def test_what_was_decoded_encodes_to_the_same_bytes():
    assert encode_adapter(decode_adapter(BLOBS["adapter"])) == BLOBS["adapter"]
    assert encode_bank(decode_bank(BLOBS["bank"])) == BLOBS["bank"]


@given(updates())
@settings(deadline=None)
def test_no_update_is_larger_than_the_largest_of_its_shapes(update):
    shapes = {name: array.shape for name, array in update.adapter.items()}
    most = int(np.bincount(np.unique(update.labels, return_inverse=True)[1], minlength=1).max())
    classes = max(len(update.prototypes), len(np.unique(update.labels)))
    bound = largest_update(shapes, max(update.prototypes.shape[1], update.features.shape[1]), classes, most)
    assert len(encode_update(update)) <= bound


def test_the_largest_update_is_hardly_larger_than_a_full_one():
    shapes = {f"model.layers.{i}.self_attn.q_proj.lora_{f}": (4, 768) for i in range(12) for f in "AB"}
    rows, labels = np.full((160, 512), 512**-0.5, np.float32), np.repeat(np.arange(10, dtype=np.int32), 16)
    ten = np.arange(10, dtype=np.int32)
    update = Update({n: np.ones(s, np.float32) for n, s in shapes.items()}, rows[:10], ten, ten, ten, rows, labels)
    assert largest_update(shapes, 512, 10, 16) - len(encode_update(update)) < 8192


def test_a_reference_names_hash_size_and_the_last_shorter_chunk():
    ref = reference(b"x" * 2500, 1024)
    assert (ref.sha256, ref.size, ref.chunks) == (sha256(b"x" * 2500), 2500, 3)
    assert [ref.length(index) for index in range(3)] == [1024, 1024, 452]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_blob_cut_at_any_length_is_refused(kind):
    for length in range(len(BLOBS[kind])):
        with pytest.raises(WireError):
            DECODERS[kind](BLOBS[kind][:length])
    with pytest.raises(WireError):
        DECODERS[kind](BLOBS[kind] + b"\0")


@pytest.mark.parametrize("kind", DECODERS)
@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_blob_with_flipped_bits_is_read_or_refused(kind, data):
    blob = bytearray(BLOBS[kind])
    for position in data.draw(st.lists(st.integers(0, len(blob) - 1), min_size=1, max_size=3)):
        blob[position] ^= data.draw(st.integers(1, 255))
    with np.errstate(all="ignore"):  # what a warning says about values is the subject of the tests below
        try:
            DECODERS[kind](bytes(blob))
        except WireError:
            return


@pytest.mark.parametrize(("sent", "expected"), [(a, b) for a in DECODERS for b in DECODERS if a != b])
def test_a_blob_of_another_type_is_refused(sent, expected):
    with pytest.raises(WireError, match=f"expected a blob of type '{expected}', got '{sent}'"):
        DECODERS[expected](BLOBS[sent])


@pytest.mark.parametrize("kind", DECODERS)
@given(blob=st.binary(max_size=200))
@settings(deadline=None, max_examples=50)
def test_arbitrary_bytes_are_refused(kind, blob):
    with pytest.raises(WireError):
        DECODERS[kind](blob)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "F32", "I8", "I32", "BF16", "F8_E4M3", "C64", "nonsense"]),
        "shape": st.lists(st.integers(0, 3) | st.integers(0, 2**64), max_size=3),
        "data_offsets": st.lists(st.integers(0, 24) | st.integers(), min_size=2, max_size=2),
    }
)


@pytest.mark.parametrize("kind", DECODERS)
@given(
    tensors=st.dictionaries(st.sampled_from(["embeddings", "features", "adapter.x", "prototypes"]), tensors, max_size=2),
    data=st.binary(max_size=24),
)
@settings(deadline=None, max_examples=100)
def test_any_header_is_read_or_refused(kind, tensors, data):
    with np.errstate(all="ignore"):
        try:
            DECODERS[kind](with_header({"__metadata__": {"type": kind}, **tensors}, data))
        except WireError:
            return


@pytest.mark.parametrize(
    "header", [[], 5, "text", None, {"__metadata__": {"type": 5}}, {"__metadata__": {"clipcast": "[]"}}]
)
def test_a_header_that_is_no_map_of_strings_is_refused(header):
    with pytest.raises(WireError, match="safetensors"):
        decode_update(with_header(header))


@pytest.mark.parametrize(("kind", "longest"), [("update", MAX_HEADER), ("adapter", MAX_HEADER), ("bank", MAX_BANK_HEADER)])
def test_a_header_that_is_dear_to_read_is_refused_unread(kind, longest):
    header = json.dumps({"__metadata__": {"type": "none"}}).encode()
    for length, problem in ((longest, "expected a blob of type"), (longest + 1, "the blob is truncated or not ours")):
        with pytest.raises(WireError, match=problem):
            DECODERS[kind](struct.pack("<Q", length) + header.ljust(length))


def test_the_factors_of_the_largest_clip_have_room_for_their_names():
    """ViT-bigG: 48 blocks, 4 projections; of no width here, as the widths are numbers of the same length."""
    factor = np.zeros((1, 1), np.float32)
    names = [f"vision_model.encoder.layers.{i}.self_attn.{p}_proj.lora_{f}" for i in range(48) for p in "qkvo" for f in "AB"]
    blob = encode_adapter(dict.fromkeys(names, factor))
    assert int.from_bytes(blob[:8], "little") < MAX_HEADER // 2
    assert len(decode_adapter(blob)) == 384


def test_a_key_that_stands_twice_is_refused():
    text = b'{"__metadata__":{"type":"update"},"x":1,"x":1}'
    with pytest.raises(WireError, match="not JSON"):
        decode_update(struct.pack("<Q", len(text)) + text)


def test_a_bank_with_more_than_its_embeddings_is_refused():
    tensor = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    with pytest.raises(WireError, match="2 tensors, it has its embeddings alone"):
        decode_bank(with_header({"__metadata__": {"type": "bank"}, "embeddings": tensor, "more": tensor}))


@pytest.mark.parametrize("metadata", [None, 5, ["clipcast"], "clipcast", {"clipcast": 5}])
def test_metadata_that_is_no_map_of_strings_is_refused(metadata):
    with pytest.raises(WireError, match="safetensors"):
        decode_update(with_header({"__metadata__": metadata}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65505.0, -1e30])
def test_factors_and_prototypes_that_float16_cannot_hold_do_not_travel(value):
    update = an_update()
    bad = np.full((2, 2), value, np.float32)
    with pytest.raises(WireError, match="factor holds values"):
        encode_adapter({"factor": bad})
    with pytest.raises(WireError, match=r"a\.lora_A holds values"):
        encode_update(dataclasses.replace(update, adapter=update.adapter | {"a.lora_A": bad}))
    with pytest.raises(WireError, match="prototypes holds values"):
        encode_update(dataclasses.replace(update, prototypes=bad))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_do_not_travel(value):
    with pytest.raises(WireError, match="features"), np.errstate(all="ignore"):
        encode_update(dataclasses.replace(an_update(), features=np.full((3, 4), value, np.float32)))


ROWS = ["prototypes", "prototype_classes", "prototype_counts", "prototype_correct", "features", "labels"]


@pytest.mark.parametrize("name", ROWS)
def test_an_update_whose_arrays_differ_in_number_is_refused(name):
    update = an_update()
    shorter = dataclasses.replace(update, **{name: getattr(update, name)[1:]})
    with pytest.raises(WireError, match="differ in number"):
        decode_update(encode_update(shorter))


def test_an_update_may_leave_out_how_many_are_predicted_correctly():
    untold = dataclasses.replace(an_update(), prototype_correct=np.zeros(0, np.int32))
    assert len(decode_update(encode_update(untold)).prototype_correct) == 0


@pytest.mark.parametrize("name", [*ROWS, "feature_scales"])
def test_an_update_without_one_of_its_arrays_is_refused_naming_it(name):
    arrays = {key: array for key, array in load(BLOBS["update"]).items() if key != name}
    with pytest.raises(WireError, match=f"{name} should be .* found nothing"):
        decode_update(save(arrays, {"type": "update"}))


@pytest.mark.parametrize("scale", [float("inf"), 3e38])
def test_feature_scales_that_are_not_sane_make_no_noise(scale):
    blob = encode_update(dataclasses.replace(an_update(), features=np.array([[0.0, 127.0]] * 3, np.float32)))
    ones = np.ones(3, np.float32).tobytes()
    assert blob.count(ones) == 1
    try:
        decode_update(blob.replace(ones, struct.pack("<3f", scale, scale, scale)))
    except WireError:
        return


def test_a_bank_whose_names_and_embeddings_differ_in_number_is_refused():
    with pytest.raises(WireError, match="names 1 classes but holds 2"):
        decode_bank(encode_bank(dataclasses.replace(a_bank(), classes=("one",))))
    with pytest.raises(WireError, match="names 0 classes"):
        decode_bank(encode_bank(a_bank(classes=0)))


@pytest.mark.parametrize("value", [0.0, 0.9, 2.0, float("nan"), float("inf"), 1e30])
def test_a_bank_with_embeddings_that_are_not_of_unit_length_is_refused(value):
    embeddings = np.eye(2, 3, dtype=np.float32)
    embeddings[0, 0] = value
    with pytest.raises(WireError, match="unit length"):
        decode_bank(encode_bank(dataclasses.replace(a_bank(), embeddings=embeddings)))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_bank_whose_logit_scale_is_not_finite_is_refused(scale):
    blob = BLOBS["bank"]
    literal = b"NaN" if np.isnan(scale) else b"1e400"
    with pytest.raises(WireError, match=r"logit_scale|finite"):
        decode_bank(blob.replace(b"100.0", literal.ljust(5)))
