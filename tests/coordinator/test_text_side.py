"""The server's half: what it learns from against plain loops, and training on tiny-clip against naive cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from clip_lora.errors import ModelError
from clip_lora.towers import one_thread
from coordinator.aggregate import Contribution
from coordinator.recipe import TextTraining
from coordinator.text_bank import make_bank
from coordinator.text_samples import TextSamples
from coordinator.text_side import TextSide
from protocol.codec import encode_adapter, reference
from protocol.messages import Offer, Update

CLASSES = ("zero", "one", "two", "cat")
TEMPLATES = ("a photo of a {}", "a blurry picture of one {} taken from far away", "{}")
LEARNING = TextTraining(steps=8, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def bank():
    return make_bank("tiny-clip", CLASSES, TEMPLATES[:1])


@pytest.fixture(scope="session")
def three_templates():
    return make_bank("tiny-clip", CLASSES, TEMPLATES)


def unit(rows):
    rows = np.asarray(rows, float)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def sent(width=3, features=(), prototypes=(), length=1.0):
    """A contribution of feature labels and prototypes' (class, count), all random directions of one length."""
    rng = np.random.default_rng((len(features), len(prototypes), *features, *(c for c, _ in prototypes)))
    rows = unit(rng.normal(size=(len(features) + len(prototypes), width))) * np.float32(length)
    counts = np.array([n for _, n in prototypes], np.int32)
    update = Update(
        {},
        rows[len(features) :],
        np.array([c for c, _ in prototypes], np.int32),
        counts,
        counts,
        rows[: len(features)],
        np.array(features, np.int32),
    )
    return from_update(update)


def from_update(update):
    offer = Offer(
        round=1,
        base="0" * 64,
        blob=reference(b"update"),
        samples=max(1, int(update.prototype_counts.sum())),
        loss=1.0,
        accuracy=1.0,
        train_seconds=1.0,
        bytes_received=0,
    )
    return Contribution(offer, update)


def how(**fields):
    return TextTraining.model_validate(fields)


def rows_of(samples):
    """Every sample as (label, feature), with its weight."""
    pairs = zip(samples.labels.tolist(), samples.features.tolist(), strict=True)
    return {(label, tuple(feature)): w for (label, feature), w in zip(pairs, samples.weights.tolist(), strict=True)}


def row(contributions, client, index, kind="features"):
    update = contributions[client].update
    rows, labels = (update.features, update.labels) if kind == "features" else (update.prototypes, update.prototype_classes)
    return int(labels[index]), tuple(rows[index].tolist())


@pytest.fixture
def uploads():
    """Classes 0 and 1 have features; 2 and 3 only prototypes, 2 on two clients; nobody has class 4."""
    return {
        "bob": sent(features=(0, 0, 1), prototypes=((0, 40), (1, 7), (2, 30))),
        "ann": sent(features=(0,), prototypes=((0, 9), (3, 5), (2, 10))),
    }


def test_a_class_without_features_is_represented_by_its_prototypes(uploads):
    samples = TextSamples.gather(uploads, how(balance_classes=False))
    assert sorted(samples.labels.tolist()) == [0, 0, 0, 1, 2, 2, 3]
    found = rows_of(samples)
    for client, index in (("bob", 2), ("ann", 1), ("ann", 2)):
        label, feature = row(uploads, client, index, "prototypes")
        assert any(label == other and np.allclose(feature, f, atol=1e-6) for other, f in found)
    assert len(samples) == 7


def weight(samples, label, feature):
    near = [w for (other, f), w in rows_of(samples).items() if other == label and np.allclose(feature, f, atol=1e-6)]
    assert len(near) == 1
    return near[0]


@pytest.mark.parametrize("balanced", [False, True])
def test_prototypes_of_a_class_weigh_as_their_counts_and_on_average_as_one_feature(uploads, balanced):
    samples = TextSamples.gather(uploads, how(balance_classes=balanced))
    bob, ann = weight(samples, *row(uploads, "bob", 2, "prototypes")), weight(samples, *row(uploads, "ann", 2, "prototypes"))
    assert bob / ann == pytest.approx(30 / 10)
    alone = weight(samples, *row(uploads, "ann", 1, "prototypes"))
    feature = weight(samples, *row(uploads, "bob", 2))
    if balanced:
        assert alone == pytest.approx(feature) == pytest.approx(1 / 4)
    else:
        assert (bob + ann) / 2 == pytest.approx(alone) == pytest.approx(feature) == pytest.approx(1 / 7)


@pytest.mark.parametrize("remedy", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_weights_sum_to_one_and_are_shared_out_among_classes_or_rows(uploads, remedy, balanced):
    samples = TextSamples.gather(uploads, how(prototypes_for_missing=remedy, balance_classes=balanced))
    assert samples.weights.sum() == pytest.approx(1.0)
    present = {0: 3, 1: 1, 2: 2, 3: 1} if remedy else {0: 3, 1: 1}
    for label, number in present.items():
        mass = sum(w for w, other in zip(samples.weights, samples.labels, strict=True) if other == label)
        assert mass == pytest.approx(1 / len(present) if balanced else number / sum(present.values()))


@pytest.mark.parametrize("balanced", [False, True])
def test_features_of_a_class_weigh_alike_whoever_sent_them(uploads, balanced):
    samples = TextSamples.gather(uploads, how(balance_classes=balanced))
    weights = [weight(samples, *row(uploads, client, k)) for client, k in (("bob", 0), ("bob", 1), ("ann", 0))]
    assert weights == pytest.approx([weights[0]] * 3)


def test_without_the_remedy_only_features_are_learned_from(uploads):
    samples = TextSamples.gather(uploads, how(prototypes_for_missing=False))
    assert sorted(samples.labels.tolist()) == [0, 0, 0, 1]
    assert len(samples) == len(samples.features) == len(samples.weights) == 4


def test_a_class_with_features_takes_no_prototypes(uploads):
    labels = TextSamples.gather(uploads, how()).labels.tolist()
    assert (labels.count(0), labels.count(1)) == (3, 1)


def test_without_any_feature_all_prototypes_are_learned_from():
    silent = {"ann": sent(prototypes=((0, 30), (1, 2))), "bob": sent(prototypes=((0, 10),))}
    samples = TextSamples.gather(silent, how())
    assert sorted(zip(samples.labels.tolist(), samples.weights.tolist(), strict=True)) == [
        (0, pytest.approx(0.125)),
        (0, pytest.approx(0.375)),
        (1, pytest.approx(0.5)),
    ]


def test_without_any_feature_and_without_the_remedy_there_is_nothing_to_learn_from():
    silent = {"ann": sent(prototypes=((0, 30), (1, 2)))}
    assert len(TextSamples.gather(silent, how(prototypes_for_missing=False))) == 0


@pytest.mark.parametrize("length", [0.97, 1.04])
def test_rows_that_the_wire_left_nearly_unit_are_made_unit(length):
    uploads = {"ann": sent(features=(0, 1), prototypes=((0, 3), (2, 4)), length=length)}
    samples = TextSamples.gather(uploads, how())
    assert samples.features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(samples.features.astype(float), axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(samples.features[0], uploads["ann"].update.features[0] / length, atol=1e-6)


def test_a_row_of_zeros_stays_finite():
    update = Update(**{**sent(features=(0, 1)).update.__dict__, "features": np.zeros((2, 3), np.float32)})
    assert np.isfinite(TextSamples.gather({"ann": from_update(update)}, how()).features).all()


def test_the_order_of_arrival_leaves_no_trace_and_the_uploads_are_left_alone(uploads):
    before = {client: (c.update.prototype_counts.copy(), c.update.features.copy()) for client, c in uploads.items()}
    one = TextSamples.gather(uploads, how())
    other = TextSamples.gather(dict(reversed(uploads.items())), how())
    assert (one.features.tobytes(), one.labels.tobytes(), one.weights.tobytes()) == (
        other.features.tobytes(),
        other.labels.tobytes(),
        other.weights.tobytes(),
    )
    for client, (counts, features) in before.items():
        assert np.array_equal(uploads[client].update.prototype_counts, counts)
        assert np.array_equal(uploads[client].update.features, features)


def near(bank, labels, seed=0, noise=0.12):
    """Features as far from their class's embedding as those of pictures are."""
    rng = np.random.default_rng(seed)
    return unit(bank.embeddings[list(labels)] + rng.normal(0.0, noise, (len(labels), bank.embeddings.shape[1])))


def naive_losses(embeddings, scale, features, labels):
    """CE of softmax_c(s z.t_c), sample by sample, in float64."""
    losses = []
    for z, y in zip(features.astype(float), labels, strict=True):
        logits = [scale * sum(float(a) * float(b) for a, b in zip(z, t, strict=True)) for t in embeddings.astype(float)]
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(x - top) for x in logits)) - logits[int(y)])
    return losses


def naive_loss(embeddings, scale, samples):
    losses = naive_losses(embeddings, scale, samples.features, samples.labels)
    return sum(w * x for w, x in zip(samples.weights, losses, strict=True))


@pytest.fixture(scope="session")
def lesson(bank):
    """Samples of unequal weight, some of them hard: their features lean towards another class."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3], np.int32)
    features = unit(near(bank, labels) + 0.9 * near(bank, (labels + 1) % 4, seed=1))
    weights = np.linspace(1.0, 3.0, len(labels))
    return TextSamples(features, labels, weights / weights.sum())


@pytest.fixture(scope="session")
def trained(bank, lesson):
    """A text side after training: itself, the state before, and the loss."""
    side = TextSide(bank, LEARNING, seed=3)
    before = {name: tensor.clone() for name, tensor in side._model.state_dict().items()}
    return side, before, side.train(lesson)


def test_a_fresh_text_side_sees_the_classes_as_the_bank_does_to_the_bit(bank):
    fresh = TextSide(bank, LEARNING, seed=3).bank(5)
    assert fresh.embeddings.tobytes() == bank.embeddings.tobytes()
    assert {**fresh.__dict__, "embeddings": None} == {**bank.__dict__, "embeddings": None, "version": 5}


def test_so_it_does_with_several_templates(three_templates):
    fresh = TextSide(three_templates, LEARNING, seed=3).bank(1)
    assert fresh.embeddings.tobytes() == three_templates.embeddings.tobytes()


def test_the_loss_before_training_is_the_naive_weighted_cross_entropy(bank, lesson, trained):
    _, _, loss = trained
    assert loss.before == pytest.approx(naive_loss(bank.embeddings, bank.logit_scale, lesson), rel=1e-4)
    assert loss.samples == 8


def test_training_lowers_the_loss_and_the_loss_after_is_that_of_the_new_bank(lesson, trained):
    side, _, loss = trained
    new = side.bank(2)
    assert loss.after < 0.5 * loss.before
    assert loss.after == pytest.approx(naive_loss(new.embeddings, new.logit_scale, lesson), rel=1e-3)


def test_training_changes_all_lora_factors_and_nothing_else(trained):
    side, before, _ = trained
    factors = 0
    for name, tensor in side._model.state_dict().items():
        if "lora_" in name:
            factors += 1
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert factors == len(side.shapes) == 4 * 4 * 2


def test_embeddings_have_unit_length_after_training_and_have_moved(bank, trained):
    embeddings = trained[0].bank(2).embeddings
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings.astype(float), axis=1), 1.0, atol=1e-6)
    assert np.abs(embeddings - bank.embeddings).max(axis=1).min() > 1e-3


def test_the_adapter_is_the_whole_of_what_was_learned(bank, trained):
    side, _, _ = trained
    fresh = TextSide(bank, LEARNING, seed=4)
    fresh.load(side.adapter())
    assert fresh.bank(2).embeddings.tobytes() == side.bank(2).embeddings.tobytes()
    assert encode_adapter(fresh.adapter()) == encode_adapter(side.adapter())


def test_the_same_seed_learns_the_same_bits_on_any_number_of_threads_and_another_seed_others(bank, lesson, trained):
    try:
        torch.set_num_threads(2)
        again, other = (TextSide(bank, LEARNING, seed) for seed in (3, 4))
        assert again.train(lesson) == trained[2]
        other.train(lesson)
    finally:
        torch.set_num_threads(1)
    expected = trained[0].adapter()
    assert all(factor.tobytes() == expected[name].tobytes() for name, factor in again.adapter().items())
    assert again.bank(2).embeddings.tobytes() == trained[0].bank(2).embeddings.tobytes()
    assert other.bank(2).embeddings.tobytes() != trained[0].bank(2).embeddings.tobytes()


def test_several_templates_are_averaged_in_training_as_in_the_bank(three_templates, lesson):
    side = TextSide(three_templates, LEARNING.model_copy(update={"steps": 3}), seed=0)
    loss = side.train(lesson)
    assert loss.before == pytest.approx(
        naive_loss(three_templates.embeddings, three_templates.logit_scale, lesson), rel=1e-4
    )
    new = side.bank(2)
    assert loss.after < loss.before
    assert loss.after == pytest.approx(naive_loss(new.embeddings, new.logit_scale, lesson), rel=1e-3)


def test_a_sample_without_weight_teaches_nothing(bank, lesson):
    extended = TextSamples(
        np.concatenate([lesson.features, near(bank, [3])]),
        np.append(lesson.labels, np.int32(0)),
        np.append(lesson.weights, 0.0),
    )
    few = LEARNING.model_copy(update={"steps": 2})
    plain, with_it = TextSide(bank, few, seed=3), TextSide(bank, few, seed=3)
    plain.train(lesson)
    with_it.train(extended)
    np.testing.assert_allclose(with_it.bank(2).embeddings, plain.bank(2).embeddings, atol=1e-5)


def test_rank_projections_and_first_block_are_the_recipes(bank):
    shape = how(steps=1, rank=2, projections=("v_proj",), first_block=3)
    assert TextSide(bank, shape, seed=0).shapes == {
        "text_model.encoder.layers.3.self_attn.v_proj.lora_A": (2, 192),
        "text_model.encoder.layers.3.self_attn.v_proj.lora_B": (192, 2),
    }


def test_an_adapter_of_another_rank_is_refused(bank, trained):
    with pytest.raises(ModelError, match="another rank"):
        TextSide(bank, LEARNING.model_copy(update={"rank": 2}), seed=0).load(trained[0].adapter())


@pytest.mark.parametrize("balanced", [False, True])
def test_a_class_without_features_is_pushed_away_unless_its_prototypes_join(bank, balanced):
    # Class 2 is always mistaken for class 1, so that nobody sends a feature of it.
    labels = np.repeat(np.arange(2), 6).astype(np.int32)
    features = near(bank, labels)
    prototype = unit(bank.embeddings[[2]] + 1.1 * bank.embeddings[[1]])
    update = Update(
        {},
        np.concatenate([near(bank, [0, 1], noise=0.02), prototype]),
        np.array([0, 1, 2], np.int32),
        np.array([20, 20, 20], np.int32),
        np.array([6, 6, 0], np.int32),
        features,
        labels,
    )
    uploads = {"ann": from_update(update)}
    losses = {}
    for remedy in (True, False):
        training = LEARNING.model_copy(update={"prototypes_for_missing": remedy, "balance_classes": balanced})
        side = TextSide(bank, training, seed=0)
        side.train(TextSamples.gather(uploads, training))
        new = side.bank(2)
        (losses[remedy],) = naive_losses(new.embeddings, new.logit_scale, prototype, [2])
    (untrained,) = naive_losses(bank.embeddings, bank.logit_scale, prototype, [2])
    assert losses[True] < 0.5 * untrained
    assert losses[False] > untrained
