"""What a doctor finds by doing it: on this machine, and where something of it is broken."""

from __future__ import annotations

import sys
from dataclasses import replace

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_client.doctor.answering import examine_answering
from edge_client.doctor.examination import examine
from edge_client.doctor.training import examine_training
from edge_client.inference.providers import GRAPH, executes
from hardware_profiles.detect import detect
from hardware_profiles.profile import load

CPU = "CPUExecutionProvider"


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture
def this_machine():
    return replace(detect(), profile=load("generic-cpu"))


def test_the_graph_is_a_product_of_two_matrices():
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 13)]
    assert helper.make_model(graph, opset_imports=opset, ir_version=7).SerializeToString() == GRAPH
    onnx.checker.check_model(onnx.load_from_string(GRAPH), full_check=True)


def test_this_machine_can_do_its_part(this_machine, tmp_path):
    found = by_name(examine(this_machine, None, tmp_path))
    assert not [finding for finding in found.values() if finding.state == "fail"]
    for name in ("CPU, a product of matrices", "4-bit layer on cpu", "8-bit layer on cpu", CPU):
        assert found[name].state == "ok", found[name]


def test_a_gpu_that_torch_does_not_see_is_a_failure_and_the_layers_are_tried_on_the_cpu(this_machine):
    found = by_name(examine_training(replace(this_machine, profile=load("jetson-orin-nano-8gb"))))
    assert found["torch's build"].state == "fail"
    assert found["GPU, a product of matrices"].state == "fail"
    assert found["4-bit layer on cpu"].state == "ok"


@pytest.mark.parametrize(("bits", "state"), [(4, "fail"), (8, "warn")])
def test_a_layer_that_does_not_run_is_worse_if_the_profile_asks_for_it(this_machine, monkeypatch, bits, state):
    def broken(*_: object):
        raise RuntimeError("Error named symbol not found at line 62")

    monkeypatch.setattr({4: "bitsandbytes.nn.Linear4bit.forward", 8: "bitsandbytes.nn.Linear8bitLt.forward"}[bits], broken)
    found = by_name(examine_training(this_machine))[f"{bits}-bit layer on cpu"]
    assert (found.state, found.measured) == (state, "Error named symbol not found at line 62")
    assert "pip install 'bitsandbytes" in found.cure


@pytest.mark.parametrize(
    ("profile", "is_client", "state", "words"),
    [
        ("generic-cpu", False, "ok", "this device answers only. To train: pip install torch"),
        ("generic-cpu", True, "fail", "a client trains"),
        ("jetson-xavier-nx-8gb", False, "ok", "this device answers only"),
    ],
)
def test_a_device_without_torch_answers_only(this_machine, monkeypatch, profile, is_client, state, words):
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = examine_training(replace(this_machine, profile=load(profile)), is_client=is_client)
    assert (finding.name, finding.state) == ("torch", state)
    assert words in finding.measured


def test_a_torch_that_does_not_load_is_a_failure_where_one_would_train(this_machine, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "torch":
                raise ImportError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    (finding,) = examine_training(this_machine)
    assert (finding.state, finding.measured) == ("fail", "cannot be loaded: libcudart.so.13: cannot open shared object file")
    assert finding.cure == "pip install torch"


def test_a_provider_that_was_not_built_in_is_worse_if_it_is_the_last(monkeypatch):
    found = by_name(examine_answering(("CUDAExecutionProvider", CPU), "the cure"))
    assert (found["CUDAExecutionProvider"].state, found[CPU].state) == ("warn", "ok")
    assert found["CUDAExecutionProvider"].cure == "the cure"
    monkeypatch.setattr(onnxruntime, "get_available_providers", list)
    assert by_name(examine_answering((CPU,), ""))[CPU].state == "fail"


def test_a_provider_that_is_listed_and_does_not_execute_is_found_out(monkeypatch):
    """As on a Jetson with the public index's wheel: onnxruntime falls back to the CPU and says so only in its log."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda model, options, **_: session(model, options, providers=[CPU])
    )
    assert executes("CUDAExecutionProvider") == f"listed, but {CPU} executes instead"


def test_a_provider_whose_library_fails_is_a_problem_in_one_line(monkeypatch):
    def broken(*_: object, **__: object):
        raise RuntimeError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    assert executes(CPU) == "libcudart.so.13: cannot open shared object file"


def test_two_packages_of_one_module_are_a_failure(monkeypatch):
    monkeypatch.setattr("edge_client.doctor.answering._version", lambda _: "1.0")
    finding = by_name(examine_answering((CPU,), "pip install 'onnxruntime'"))["onnxruntime"]
    assert finding.state == "fail"
    assert finding.cure.startswith("`pip uninstall onnxruntime onnxruntime-gpu`")
    assert finding.cure.endswith("then pip install 'onnxruntime'")


@pytest.mark.parametrize(("trains", "state", "words"), [(True, "ok", "trains only"), (False, "fail", "cannot answer")])
def test_a_device_without_onnxruntime_trains_only_or_is_of_no_use(monkeypatch, trains, state, words):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (finding,) = examine_answering((CPU,), "the cure", trains=trains)
    assert finding.state == state
    assert words in finding.measured
    assert "the cure" in finding.measured + finding.cure
