"""A device's round under differential privacy, trained for real: what leaves it, what it costs, and what a crash changes."""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_lora.lora import adapter_state, load_adapter, trained_names
from coordinator.checks import Expectation, Start, check_update
from edge_client.checkpoint import Checkpoint
from edge_client.encoder import ImageEncoder, encode
from edge_client.encoders import Encoders
from edge_client.errors import PlanRefusedError
from edge_client.outbox import Outbox
from edge_client.participate import carry_out, finished
from edge_client.participation import Participation, Train
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.budget import Budget
from edge_client.privacy.ledger import Ledger
from edge_client.privacy.mechanisms import class_sums, clipped_change, moved
from edge_client.train import derive_seed, local_steps
from protocol.buckets import bucket
from protocol.bus import MemoryBroker
from protocol.client_end import ClientEnd
from protocol.codec import decode_update, encode_adapter, encode_update
from protocol.link import Link
from protocol.messages import Privacy, Status
from protocol.transfer.parcel import pack

PRIVACY = Privacy(clip=0.5, noise_multiplier=0.01, delta=1e-5, epsilon=1e6)


def never():
    return False


@pytest.fixture(scope="module")
def encoders():
    """One model in memory for all trainers here."""
    return Encoders()


@pytest.fixture
def private(recipe):
    """The recipe of a private round of two steps on the last block; keyword arguments replace fields of its privacy."""

    def make(local_steps=2, least=3, **fields):
        update = {"features_per_class": 0, "local_steps": local_steps, "first_block": 5, "min_prototype_count": least}
        return recipe.model_copy(update={**update, "privacy": PRIVACY.model_copy(update=fields)})

    return make


@pytest.fixture
def run(make_trainer, make_ready, bank, encoders):
    def go(recipe, budget=None, number=1, **how):
        return make_trainer(budget=budget, encoders=encoders, **how).run(make_ready(bank, recipe, number), never)

    return go


def constant(monkeypatch, value):
    """Let both mechanisms give the same numbers whatever the pictures: all that leaves must then be the same too."""

    def noised(_self, _privacy, _work, _part, clean, _sensitivity):
        rng = np.random.default_rng(value)
        return rng.normal(size=clean.shape) * ([1.0] * (clean.shape[-1] - 1) + [9.0] if clean.ndim == 2 else 1.0)

    monkeypatch.setattr(Budget, "noised", noised)


def test_all_that_leaves_is_computed_from_what_the_mechanisms_give(run, private, home, tmp_path, monkeypatch):
    """Two devices with other pictures, another number of them, and classes that the other lacks: the same bytes go out."""
    other = tmp_path / "other"
    shutil.copytree(home / "two", other / "two")
    shutil.copytree(home / "two", other / "zero")  # and labels that are wrong
    next((other / "zero").iterdir()).unlink()
    constant(monkeypatch, 3)
    one, another = (pack(run(private(), source=str(place))) for place in (home, other))
    assert one == another
    assert len(decode_update(one.blob).prototypes) > 0
    constant(monkeypatch, 4)
    assert pack(run(private())) != one


def test_an_offer_tells_neither_loss_nor_accuracy_nor_time_nor_true_counts(run, private, make_ready, bank):
    result = run(private(noise_multiplier=2.0))
    offer = pack(result).offer
    assert (offer.loss, offer.accuracy, offer.train_seconds) == (None, None, None)
    update = decode_update(encode_update(result.update))
    assert (len(update.features), len(update.labels), len(update.prototype_correct)) == (0, 0, 0)
    assert offer.samples == bucket(max(1, int(update.prototype_counts.sum())))
    assert np.all(update.prototype_counts >= 3)
    assert update.prototype_counts.tolist() != [8, 8, 8]
    ready = make_ready(bank, private(noise_multiplier=2.0))
    shapes = {name: array.shape for name, array in ready.adapter.items()}
    assert check_update("ann", update, Expectation(ready.plan, {"ann": Start(ready.base, shapes)}, 256, 3)).accepted


def test_what_leaves_is_the_clean_result_with_the_noise_of_the_two_mechanisms(run, private, make_ready, bank, dataset):
    """The same round by hand: train, clip, add this secret's noise, look at the pictures through the noisy adapter."""
    budget = Budget(secret=b"\x07" * 32)
    recipe = private()
    result = run(recipe, budget)
    work = budget.ledger.disclosures[0].work
    encoder = ImageEncoder("tiny-clip", 4, "cpu", recipe)
    start = make_ready(bank, recipe).adapter
    load_adapter(encoder.model, start)
    local_steps(encoder, dataset, bank, recipe, derive_seed(7, 1, "ann"), 32)
    clean = adapter_state(encoder.model)
    names = trained_names(encoder.model)
    assert names == sorted(start)
    change = clipped_change(start, clean, names, 0.5)
    noisy = Budget(secret=b"\x07" * 32).noised(PRIVACY, work, "adapter", change, 2 * 0.5)
    place = 0
    for name in names:
        size = start[name].size
        expected = start[name] + noisy[place : place + size].reshape(start[name].shape)
        np.testing.assert_allclose(result.update.adapter[name], expected, rtol=1e-5, atol=1e-6)
        assert np.all(result.update.adapter[name] != clean[name])
        place += size
    noise = noisy - change
    assert noise.std() == pytest.approx(0.01 * 2 * 0.5, rel=0.05)
    load_adapter(encoder.model, result.update.adapter)
    alone = np.concatenate([encode(encoder, dataset, [index]) for index in range(len(dataset))])
    sums = class_sums(alone, dataset.labels, 3)
    noisy = Budget(secret=b"\x07" * 32).noised(PRIVACY, work, "prototypes", sums, 2**0.5)
    assert result.update.prototype_counts.tolist() == np.rint(noisy[:, -1]).tolist()
    unit = noisy[:, :-1] / np.linalg.norm(noisy[:, :-1], axis=1, keepdims=True)
    np.testing.assert_allclose(result.update.prototypes, unit, atol=1e-5)
    assert result.epsilon == epsilon_of([0.01, 0.01], 1e-5)


def test_a_frozen_factor_leaves_as_it_came(run, private, bank, make_ready):
    recipe = private(noise_multiplier=1.0).model_copy(update={"freeze_a": True})
    update = run(recipe).update
    start = make_ready(bank, recipe).adapter
    for name, factor in update.adapter.items():
        assert np.array_equal(factor, start[name]) == name.endswith("lora_A")


def test_a_factor_that_training_left_where_it_was_gets_noise_like_the_others(run, private, make_ready, bank, dataset):
    """The first step cannot move A, as B is 0: without noise on it, everybody would know so."""
    recipe = private(local_steps=1)
    start = make_ready(bank, recipe).adapter
    encoder = ImageEncoder("tiny-clip", 4, "cpu", recipe)
    load_adapter(encoder.model, start)
    local_steps(encoder, dataset, bank, recipe, 0, 32)
    still = [name for name, factor in adapter_state(encoder.model).items() if np.array_equal(factor, start[name])]
    assert still == [name for name in sorted(start) if name.endswith("lora_A")]
    update = run(recipe).update
    noise = np.concatenate([(update.adapter[name] - start[name]).ravel() for name in still])
    assert noise.std() == pytest.approx(0.01 * 2 * 0.5, rel=0.05)


def test_a_round_without_local_steps_discloses_prototypes_alone(run, private, make_ready, bank):
    budget = Budget()
    result = run(private(local_steps=0), budget)
    assert [disclosure.part for disclosure in budget.ledger.disclosures] == ["prototypes"]
    assert encode_adapter(result.update.adapter) == encode_adapter(make_ready(bank, private(local_steps=0)).adapter)
    assert result.epsilon == epsilon_of([0.01], 1e-5)


def test_a_training_that_diverged_leaves_as_noise_alone(run, private, make_ready, bank):
    """To fail, as without privacy, would tell that these pictures make it diverge."""
    budget = Budget(secret=b"\x07" * 32)
    recipe = private().model_copy(update={"learning_rate": 1e30})
    adapter = run(recipe, budget).update.adapter
    start = make_ready(bank, recipe).adapter
    nothing = np.zeros(sum(factor.size for factor in start.values()))
    noise = budget.noised(PRIVACY, budget.ledger.disclosures[0].work, "adapter", nothing, 2 * 0.5)
    assert len(budget.ledger.disclosures) == 2  # the same disclosure
    assert all(np.array_equal(adapter[name], factor) for name, factor in moved(start, noise, sorted(start)).items())


def test_noise_that_makes_the_adapter_useless_still_gives_an_answer(run, private):
    update = run(private(noise_multiplier=1e4)).update
    assert np.isfinite(update.prototypes).all()


def test_the_limit_stops_a_round_before_it_is_trained_and_later_plans_may_go_on(
    run, private, make_trainer, make_ready, bank
):
    budget = Budget()
    one_round = private(epsilon=1.001 * epsilon_of([0.01, 0.01], 1e-5))
    run(one_round, budget)
    taken = []
    trainer = make_trainer(budget=budget)
    with pytest.raises(PlanRefusedError, match="the plan allows"):
        trainer.run(make_ready(bank, one_round, 2), lambda: bool(taken.append(1)))
    assert taken == []
    assert len(budget.ledger.disclosures) == 2
    assert trainer.run(make_ready(bank, private(), 2), never).epsilon == epsilon_of([0.01] * 4, 1e-5)


def test_the_same_round_again_costs_nothing_and_gives_the_same_bits(run, private, tmp_path):
    results = [run(private(), Budget.open(tmp_path)) for _ in range(2)]
    assert encode_update(results[0].update) == encode_update(results[1].update)
    assert results[0].epsilon == results[1].epsilon == epsilon_of([0.01, 0.01], 1e-5)
    other = run(private(), Budget.open(tmp_path), number=2)
    assert other.epsilon == epsilon_of([0.01] * 4, 1e-5)


def test_another_picture_under_the_same_name_size_and_time_is_another_disclosure(
    make_trainer, make_ready, bank, private, home, tmp_path
):
    """The training's key does not see it: with the same noise, the difference of the two would be without any."""
    for file in home.rglob("*.png"):
        place = tmp_path / file.relative_to(home).with_suffix(".bmp")
        place.parent.mkdir(exist_ok=True)
        with Image.open(file) as picture:
            picture.save(place)  # bitmaps of one size have one length
    file, donor = sorted((tmp_path / "two").iterdir())[:2]
    budget, ready = Budget(), make_ready(bank, private(local_steps=3))  # an epoch: every picture is seen
    first = make_trainer(budget=budget, source=str(tmp_path)).run(ready, never)
    before = file.stat()
    file.write_bytes(donor.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = make_trainer(budget=budget, source=str(tmp_path)).run(ready, never)
    assert len({disclosure.work for disclosure in budget.ledger.disclosures}) == 1
    assert len(budget.ledger.disclosures) == 4
    assert second.epsilon == epsilon_of([0.01] * 4, 1e-5) > first.epsilon


class PowerCutError(Exception):
    """Everything ends here."""


class Life:
    """One life of a client's process on its state folder: it gets a plan, trains unless its outbox has it, and offers."""

    def __init__(self, folder, make_trainer, encoders):
        self.offered = None
        self.trained = 0
        self._folder, self._make, self._encoders = folder, make_trainer, encoders

    def live(self, ready):
        outbox = Outbox(self._folder)
        try:
            budget = Budget.open(self._folder)
            part = Participation(Status(state="online"), outbox.load())
            end = ClientEnd("lab", "ann", random.Random(0))
            link = Link(MemoryBroker().connect(), end)
            steps = part.on(ready)
            if any(isinstance(step, Train) for step in steps):
                self.trained += 1
                checkpoint = Checkpoint(self._folder / "checkpoint", every_s=0.0)
                trainer = self._make(budget=budget, checkpoint=checkpoint, encoders=self._encoders)
                done = Future()
                done.set_result(trainer.run(ready, never))
                steps = finished(part, end, done)
            try:
                carry_out(steps, link, end, outbox)
            finally:
                self.offered = end._upload.parcel
        finally:
            outbox.close()


def cut_after(patch, operations):
    """Cut the power at the durable operation after so many; return how many there were at last."""
    counted = [0]

    def counting(original):
        def call(*args, **kwargs):
            counted[0] += 1
            if counted[0] > operations:
                raise PowerCutError
            return original(*args, **kwargs)

        return call

    for name, owner in {"fsync": os, "replace": Path, "unlink": Path}.items():
        patch.setattr(owner, name, counting(getattr(owner, name)))
    return counted


def test_a_power_cut_at_any_durable_operation_of_a_round_discloses_nothing_twice(
    make_trainer, make_ready, bank, private, encoders, tmp_path, monkeypatch
):
    """Train, ledger, noise, ledger, noise, outbox, offer: the next life ends in the bits that the first may have shown."""
    ready = make_ready(bank, private())
    for cut in range(80):
        folder = tmp_path / str(cut)
        first = Life(folder, make_trainer, encoders)
        with monkeypatch.context() as patch:
            counted = cut_after(patch, cut)
            try:
                first.live(ready)
            except PowerCutError:
                assert first.offered is None or len(Ledger(folder / "ledger.json").disclosures) == 2
        before = Ledger(folder / "ledger.json").disclosures
        second = Life(folder, make_trainer, encoders)
        second.live(ready)
        after = Ledger(folder / "ledger.json").disclosures
        assert after[: len(before)] == before
        assert [disclosure.part for disclosure in after] == ["adapter", "prototypes"]
        if first.offered is not None:
            assert (second.trained, second.offered) == (0, first.offered)
        shutil.rmtree(folder / "outbox")  # and once more from nothing but the secret
        third = Life(folder, make_trainer, encoders)
        third.live(ready)
        assert (third.trained, third.offered) == (1, second.offered)
        assert Ledger(folder / "ledger.json").disclosures == after
        if counted[0] <= cut:
            assert cut > 20
            return
    raise AssertionError("it never came through")
