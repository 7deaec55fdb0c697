"""What a machine can really do is tried, not believed."""

from __future__ import annotations

import sys

import pytest
import torch

from edge_client.probes import kernel, out_of_memory, quantised


def test_a_cpu_multiplies():
    assert kernel("cpu") == ""


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_trains_through_quantised_layers(bits, dtype):
    assert quantised(bits, "cpu", dtype) == ""


def test_a_device_that_is_not_there_is_a_problem_in_one_line():
    for problem in (kernel("cuda:99"), quantised(4, "cuda:99", torch.float32)):
        assert problem
        assert "\n" not in problem


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_with_a_wrong_gradient_is_a_problem(monkeypatch, bits):
    layer = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    monkeypatch.setattr(f"bitsandbytes.nn.{layer}.forward", lambda _, x: x * 100.0)
    assert "gradient" in quantised(bits, "cpu", torch.float32)


def test_without_bitsandbytes_that_is_the_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantised(4, "cpu", torch.float32).startswith("bitsandbytes cannot be loaded: ")


def test_memory_that_ran_out_is_told_from_other_failures():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("an illegal memory access was encountered"))
    assert not out_of_memory(ValueError("out of memory"))
