"""The two terms of the loss against loops over samples and pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.losses import alignment_loss, orthogonal_loss

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


def unit(rows, seed, width=6):
    draw = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(draw, dim=-1)


def naive_cross_entropy(features, labels, bank, logit_scale):
    total = 0.0
    for feature, label in zip(features.tolist(), labels, strict=True):
        logits = [logit_scale * sum(f * t for f, t in zip(feature, row, strict=True)) for row in bank.tolist()]
        top = max(logits)
        total += math.log(sum(math.exp(logit - top) for logit in logits)) + top - logits[label]
    return total / len(labels)


def naive_orthogonal(features, labels):
    alike, apart = [], []
    rows = features.tolist()
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            cosine = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            (alike if labels[i] == labels[j] else apart).append(cosine)
    first = 1.0 - sum(alike) / len(alike) if alike else 0.0
    return first + (abs(sum(apart) / len(apart)) if apart else 0.0)


@settings(deadline=None, max_examples=40)
@given(labels=LABELS, seed=st.integers(0, 1000), logit_scale=st.sampled_from([1.0, 14.3, 100.0]))
def test_the_alignment_loss_equals_a_loop_over_samples(labels, seed, logit_scale):
    features, bank = unit(len(labels), seed), unit(4, seed + 1)
    loss = alignment_loss(features, torch.tensor(labels), bank, logit_scale)
    assert loss.item() == pytest.approx(naive_cross_entropy(features, labels, bank, logit_scale), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(labels=LABELS, seed=st.integers(0, 1000))
def test_the_orthogonal_loss_equals_a_loop_over_pairs(labels, seed):
    features = unit(len(labels), seed)
    loss = orthogonal_loss(features, torch.tensor(labels))
    assert loss.item() == pytest.approx(naive_orthogonal(features, labels), rel=1e-9, abs=1e-9)


def test_one_sample_has_no_pairs_and_no_orthogonal_loss():
    assert orthogonal_loss(unit(1, 0), torch.tensor([2])).item() == 0.0


def test_a_batch_of_one_class_has_only_the_first_term():
    features = unit(4, 1)
    expected = 1.0 - (features @ features.T)[torch.ones(4, 4, dtype=torch.bool).triu(1)].mean()
    assert orthogonal_loss(features, torch.zeros(4, dtype=torch.long)).item() == pytest.approx(expected.item())


def test_a_batch_without_a_repeated_class_has_only_the_second_term():
    features = unit(4, 2)
    expected = (features @ features.T)[torch.ones(4, 4, dtype=torch.bool).triu(1)].mean().abs()
    assert orthogonal_loss(features, torch.arange(4)).item() == pytest.approx(expected.item())


def test_equal_features_in_a_class_and_orthogonal_classes_cost_nothing():
    features = torch.eye(3, 6)[[0, 0, 1, 1, 2]]
    assert orthogonal_loss(features, torch.tensor([0, 0, 1, 1, 2])).item() == 0.0


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2], [0, 0, 1, 1]], ids=["one", "alike", "apart", "mixed"])
def test_the_sum_of_both_losses_has_a_finite_gradient_for_every_feature(labels):
    raw = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    features = torch.nn.functional.normalize(raw, dim=-1)
    y = torch.tensor(labels)
    (alignment_loss(features, y, unit(4, 9).float(), 14.0) + 0.1 * orthogonal_loss(features, y)).backward()
    assert torch.isfinite(raw.grad).all()
    assert (raw.grad.abs().sum(dim=1) > 0).all()


def test_a_step_against_the_gradient_of_the_orthogonal_loss_pulls_a_class_together_and_classes_apart():
    raw = torch.randn(6, 6, generator=torch.Generator().manual_seed(4), requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    before = orthogonal_loss(torch.nn.functional.normalize(raw, dim=-1), labels)
    before.backward()
    after = orthogonal_loss(torch.nn.functional.normalize(raw - 0.1 * raw.grad, dim=-1), labels)
    assert after < before
