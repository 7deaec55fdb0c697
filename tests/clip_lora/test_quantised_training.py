"""Training a really quantised tower: only the adapter moves, the loss falls, and looking first does no harm."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clip_lora.lora import adapter_state, attach, load_adapter
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_image_tower
from protocol.messages import Recipe

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def bank():
    return normalize(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)), dim=-1)


def loss_of(model, pictures, bank):
    return cross_entropy(20.0 * normalize(model(pixel_values=pictures).image_embeds, dim=-1) @ bank.T, LABELS)


def adapted(config, bits):
    model = attach(load_image_tower("tiny-clip", bits), config, "vision", Recipe())
    load_adapter(model, initial_adapter(adapter_shapes(config, "vision", Recipe()), 0))
    return model


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("bits", [4, 8])
def test_training_changes_only_the_factors_and_lowers_the_loss_of_a_fixed_batch(config, pictures, bank, bits):
    model = adapted(config, bits)
    before, start = frozen(model), adapter_state(model)
    assert any("quant" in name or "SCB" in name for name in before)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = loss_of(model, pictures, bank)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after, end = frozen(model), adapter_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all((end[name] != start[name]).any() for name in start)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_look_without_gradients_changes_neither_the_features_nor_the_gradients(config, pictures, bank, bits):
    # In eval mode bitsandbytes packs 4-bit weights for its CPU kernels on such a look, and the backward pass then fails.
    untouched, looked_at = adapted(config, bits), adapted(config, bits)
    with torch.no_grad():
        seen = looked_at(pixel_values=pictures).image_embeds
    assert torch.equal(looked_at(pixel_values=pictures).image_embeds.detach(), seen)
    for model in (untouched, looked_at):
        loss_of(model, pictures, bank).backward()
    for one, other in zip(trainable(untouched), trainable(looked_at), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_points_downhill(config, pictures, bank, bits):
    model = adapted(config, bits)
    loss = loss_of(model, pictures, bank)
    loss.backward()
    with torch.no_grad():
        slope = sum(float(p.grad.square().sum()) for p in trainable(model))
        step = 0.02 / slope
        for parameter in trainable(model):
            parameter.sub_(step * parameter.grad)
        fallen = loss.item() - loss_of(model, pictures, bank).item()
    assert fallen == pytest.approx(0.02, rel=0.5)
