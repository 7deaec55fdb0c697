"""What goes up after a round, against loops; and the local steps themselves, on a 4-bit tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clip_lora.lora import adapter_state, load_adapter
from edge_client.data import Dataset
from edge_client.encoder import ImageEncoder
from edge_client.losses import alignment_loss
from edge_client.train import TrainingStopped, accuracy, derive_seed, encode, local_steps, summarise


@pytest.fixture(scope="module")
def features(encoder, dataset):
    return encode(encoder, dataset)


@pytest.fixture(scope="session")
def start(make_ready, bank):
    """The adapter that the shared encoder has."""
    return make_ready(bank).adapter


@pytest.fixture(scope="module")
def shuffled(dataset):
    """The same pictures with labels that are partly wrong and of classes 0 and 2 only."""
    labels = np.random.default_rng(1).choice([0, 2], len(dataset)).astype(np.int32)
    return Dataset(dataset.pictures, labels, dataset.preprocessing)


@pytest.fixture
def fresh(make_ready, bank, recipe):
    """An encoder of its own, for tests that train."""
    encoder = ImageEncoder("tiny-clip", 4, "cpu", recipe)
    load_adapter(encoder.model, make_ready(bank).adapter)
    return encoder


def nearest(row, bank):
    cosines = [float(row @ text) for text in bank.embeddings]
    return cosines.index(max(cosines))


def test_features_are_unit_vectors_one_a_picture_whatever_the_batch(encoder, dataset, features):
    assert features.shape == (24, 256)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)
    with torch.no_grad():
        for index in (0, 11, 23):
            alone = encoder.features(dataset.pixels([index]))[0].numpy()
            np.testing.assert_allclose(features[index], alone, atol=1e-4)


@pytest.mark.parametrize("labelled", ["dataset", "shuffled"])
def test_prototypes_are_unit_class_means_over_all_samples_with_their_counts(
    request, encoder, features, bank, recipe, start, labelled
):
    data = request.getfixturevalue(labelled)
    update, share = summarise(encoder, data, bank, recipe, 0, start)
    present = sorted(set(data.labels.tolist()))
    assert update.prototype_classes.tolist() == present
    counts = zip(update.prototype_counts, update.prototype_correct, strict=True)
    for row, (count, correct), label in zip(update.prototypes, counts, present, strict=True):
        members = [feature for feature, own in zip(features, data.labels, strict=True) if own == label]
        mean = np.zeros(256)
        for member in members:
            mean += member
        assert count == len(members)
        assert correct == sum(nearest(member, bank) == label for member in members)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    assert update.prototype_correct.sum() == pytest.approx(share * len(data))


@pytest.mark.parametrize("least", [1, 5, 6, 12, 25])
def test_classes_of_too_few_samples_have_neither_prototype_nor_counts(encoder, dataset, bank, recipe, start, least):
    labels = np.array([0] * 5 + [2] * 12 + [1] * 7, np.int32)
    data = Dataset(dataset.pictures, labels, dataset.preprocessing)
    told = {}
    for how in (1, least):
        update, _ = summarise(encoder, data, bank, recipe.model_copy(update={"min_prototype_count": how}), 0, start)
        rows = zip(update.prototype_counts, update.prototype_correct, update.prototypes, strict=True)
        told[how] = {c: (n, right, row.tobytes()) for c, (n, right, row) in zip(update.prototype_classes, rows, strict=True)}
        assert update.prototypes.shape == (len(update.prototype_classes), 256)
    counts = {0: 5, 1: 7, 2: 12}
    assert told[least] == {c: told[1][c] for c, count in counts.items() if count >= least}


@pytest.mark.parametrize("cap", [0, 1, 3, 1000])
@pytest.mark.parametrize("labelled", ["dataset", "shuffled"])
def test_uploaded_features_are_of_correctly_predicted_samples_at_most_the_cap_of_each_class(
    request, encoder, features, bank, recipe, start, labelled, cap
):
    data = request.getfixturevalue(labelled)
    how = recipe.model_copy(update={"features_per_class": cap, "features_of": "correct"})
    update, share = summarise(encoder, data, bank, how, 0, start)
    correct = [nearest(row, bank) == label for row, label in zip(features, data.labels, strict=True)]
    assert 0 < sum(correct) < len(correct)
    assert share == pytest.approx(sum(correct) / len(correct))
    for label in range(3):
        possible = [row for row, own, right in zip(features, data.labels, correct, strict=True) if right and own == label]
        sent = update.features[update.labels == label]
        assert len(sent) == min(cap, len(possible))
        found = {next(i for i, row in enumerate(possible) if np.allclose(row, one, atol=1e-4)) for one in sent}
        assert len(found) == len(sent)
    assert update.features.shape == (len(update.labels), 256)


@pytest.mark.parametrize("cap", [1, 3, 1000])
def test_features_of_all_are_of_any_samples_at_most_the_cap_of_each_class(
    encoder, dataset, features, bank, recipe, start, cap
):
    how = recipe.model_copy(update={"features_per_class": cap, "features_of": "all"})
    update, _ = summarise(encoder, dataset, bank, how, 0, start)
    for label in range(3):
        possible = features[dataset.labels == label]
        sent = update.features[update.labels == label]
        assert len(sent) == min(cap, len(possible))
        found = {next(i for i, row in enumerate(possible) if np.allclose(row, one, atol=1e-4)) for one in sent}
        assert len(found) == len(sent)


def test_which_features_are_drawn_depends_on_the_seed_only(encoder, dataset, bank, recipe, start):
    one = recipe.model_copy(update={"features_per_class": 1})
    draws = [summarise(encoder, dataset, bank, one, seed, start)[0].features.tobytes() for seed in range(8)]
    assert summarise(encoder, dataset, bank, one, 0, start)[0].features.tobytes() == draws[0]
    assert len(set(draws)) > 1


def test_features_are_those_of_the_start_or_of_the_trained_adapter_for_the_same_correct_pictures(
    fresh, dataset, features, bank, recipe, start
):
    local_steps(fresh, dataset, bank, recipe.model_copy(update={"local_steps": 5}), seed=3, batch_limit=32)
    learned, after = adapter_state(fresh.model), encode(fresh, dataset)
    sent = {
        origin: summarise(
            fresh, dataset, bank, recipe.model_copy(update={"features_from": origin, "features_of": "correct"}), 0, start
        )
        for origin in ("start", "trained")
    }
    rows = {"start": features, "trained": after}
    picked = {}
    for origin, (update, _) in sent.items():
        picked[origin] = [int(np.abs(rows[origin] - row).max(axis=1).argmin()) for row in update.features]
        np.testing.assert_allclose(update.features, rows[origin][picked[origin]], atol=1e-4)
        assert all(np.array_equal(update.adapter[name], array) for name, array in learned.items())
    assert picked["start"] == picked["trained"]
    assert len(picked["start"]) > 2
    assert all(nearest(after[index], bank) == dataset.labels[index] for index in picked["start"])
    assert np.abs(sent["start"][0].features - sent["trained"][0].features).max() > 0.01
    np.testing.assert_array_equal(sent["start"][0].prototypes, sent["trained"][0].prototypes)
    assert sent["start"][1] == sent["trained"][1]
    assert all(np.array_equal(array, learned[name]) for name, array in adapter_state(fresh.model).items())


def test_accuracy_is_the_share_of_nearest_class_embeddings(encoder, dataset, features, bank):
    right = sum(nearest(row, bank) == label for row, label in zip(features, dataset.labels, strict=True))
    assert accuracy(encoder, dataset, bank) == pytest.approx(right / 24)


def test_local_steps_move_the_adapter_and_lower_the_loss_on_the_devices_pictures(fresh, dataset, bank, recipe):
    def loss():
        y = torch.from_numpy(dataset.labels.astype(np.int64))
        return alignment_loss(torch.from_numpy(encode(fresh, dataset)), y, torch.from_numpy(bank.embeddings), 14.0).item()

    start, before = adapter_state(fresh.model), loss()
    metrics = local_steps(fresh, dataset, bank, recipe.model_copy(update={"local_steps": 10}), seed=3, batch_limit=32)
    end = adapter_state(fresh.model)
    assert metrics.steps == 10
    assert loss() < 0.9 * before
    assert all((end[name] != start[name]).any() for name in start)


def test_no_local_steps_leave_the_adapter_and_report_no_loss(fresh, dataset, bank, recipe):
    start = adapter_state(fresh.model)
    metrics = local_steps(fresh, dataset, bank, recipe.model_copy(update={"local_steps": 0}), seed=3, batch_limit=32)
    assert (metrics.loss, metrics.steps) == (0.0, 0)
    assert all(np.array_equal(array, start[name]) for name, array in adapter_state(fresh.model).items())


class Recording(Dataset):
    """A dataset that remembers which pictures were asked for."""

    def pixels(self, indices):
        self.__dict__.setdefault("asked", []).append(list(indices))
        return super().pixels(indices)


@pytest.mark.parametrize("taken", [0, 1])
def test_pictures_are_encoded_again_from_the_start_only_if_there_were_steps(encoder, dataset, bank, recipe, start, taken):
    data = Recording(dataset.pictures, dataset.labels, dataset.preprocessing)
    summarise(encoder, data, bank, recipe.model_copy(update={"local_steps": taken, "features_from": "start"}), 0, start)
    asked = [index for batch in data.asked for index in batch]
    assert sorted(set(asked)) == list(range(24))
    assert (len(asked) > 24) == (taken > 0)


@pytest.mark.parametrize(("wanted", "limit", "sizes"), [(10, 32, [10, 10, 4, 10]), (16, 9, [9, 9, 6, 9])])
def test_an_epoch_sees_every_picture_once_in_batches_below_recipe_and_device_limit(
    fresh, dataset, bank, recipe, wanted, limit, sizes
):
    data = Recording(dataset.pictures, dataset.labels, dataset.preprocessing)
    local_steps(fresh, data, bank, recipe.model_copy(update={"local_steps": 4, "batch_size": wanted}), 3, limit)
    assert [len(batch) for batch in data.asked] == sizes
    assert sorted(index for batch in data.asked[:3] for index in batch) == list(range(24))


def test_training_stops_between_two_steps_when_asked(fresh, dataset, bank, recipe):
    data = Recording(dataset.pictures, dataset.labels, dataset.preprocessing)
    answers = iter([False, False, True])
    with pytest.raises(TrainingStopped):
        local_steps(fresh, data, bank, recipe.model_copy(update={"local_steps": 1000}), 3, 32, lambda: next(answers))
    assert len(data.asked) == 2


def test_seeds_differ_between_federations_rounds_and_clients_and_do_not_change():
    seeds = {derive_seed(f, n, c) for f in range(3) for n in range(3) for c in ("ann", "bob", "1:ann")}
    assert len(seeds) == 27
    assert derive_seed(7, 1, "ann") == derive_seed(7, 1, "ann")
    assert all(0 <= seed < 2**56 for seed in seeds)


def test_mu_adds_the_orthogonal_loss_to_what_is_trained(make_ready, bank, dataset, recipe):
    def trained(mu):
        encoder = ImageEncoder("tiny-clip", 4, "cpu", recipe)
        load_adapter(encoder.model, make_ready(bank).adapter)
        metrics = local_steps(encoder, dataset, bank, recipe.model_copy(update={"mu": mu, "local_steps": 2}), 3, 32)
        return metrics.loss, adapter_state(encoder.model)

    (plain, one), (costlier, other) = trained(0.0), trained(5.0)
    assert costlier > plain
    assert any(not np.array_equal(one[name], other[name]) for name in one)
