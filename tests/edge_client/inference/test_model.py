"""A loaded artefact: answers, adapters, other classes; providers that execute; and what is refused."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from clip_lora.preprocess import load_preprocessing
from edge_client.errors import InferenceError
from edge_client.inference.answering import Answering, Outcome
from edge_client.inference.model import METADATA, Model
from edge_client.inference.pictures import Pixels
from edge_client.inference.providers import CPU, TENSORRT, Runtime, engine_folder, executes, runtime_for, with_options
from export.flavours import Flavour
from export.graph import preprocessing_graph
from export.lora import adapter_file
from hardware_profiles.profile import load as load_profile
from protocol.codec import sha256
from protocol.messages import TextBank
from tests.edge_client.inference.exported import CLASSES
from tests.export.making import bank_of, trained_adapter

Models = dict[Flavour, Path]


def test_a_model_says_what_it_is_and_answers(models: Models, photograph: Pixels) -> None:
    model = Model.open(models["int8"])
    assert model.labels == CLASSES
    assert (model.facts.flavour, model.facts.federation, model.facts.round) == ("int8", "lab", 3)
    scores = model.run(np.stack([photograph, photograph[::-1]]))
    assert scores.probabilities.shape == (2, 4)
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scores.embeddings, axis=1), 1.0, atol=1e-5)


def test_an_adapter_changes_the_answers_without_another_session(models: Models, photograph: Pixels) -> None:
    base = Model.open(models["adapter"])
    trained = base.with_adapter(models["adapter"].with_suffix(".onnx_adapter"), None)
    assert trained._session is base._session
    merged = Model.open(models["fp32"]).run(photograph[None]).embeddings
    np.testing.assert_allclose(trained.run(photograph[None]).embeddings, merged, atol=1e-4)
    assert float((base.run(photograph[None]).embeddings @ merged.T)[0, 0]) < 0.9999


def test_many_threads_and_adapters_at_once_and_adapters_that_are_let_go(models: Models, photograph: Pixels) -> None:
    base, file = Model.open(models["adapter"]), models["adapter"].with_suffix(".onnx_adapter")
    wanted = [base.run(photograph[None]).embeddings, base.with_adapter(file, None).run(photograph[None]).embeddings]

    def ask(turn: int) -> bool:
        model = base.with_adapter(file, None) if turn % 2 else base
        return bool(np.allclose(model.run(photograph[None]).embeddings, wanted[turn % 2], atol=1e-5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(80)))


def test_an_adapter_of_another_base_and_what_is_none_are_refused(models: Models, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.onnx_adapter"
    foreign.write_bytes(adapter_file(trained_adapter("tiny-clip"), 2.0, "0" * 64, 1))
    base = Model.open(models["adapter"])
    with pytest.raises(InferenceError, match=r"foreign\.onnx_adapter is an adapter for another base"):
        base.with_adapter(foreign, None)
    foreign.write_bytes(b"nothing of the kind")
    with pytest.raises(InferenceError, match="cannot be read as an adapter"):
        base.with_adapter(foreign, None)
    with pytest.raises(InferenceError, match="none: no such adapter"):
        base.with_adapter(tmp_path / "none", None)
    with pytest.raises(InferenceError, match="flavour int8 takes no adapter"):
        Model.open(models["int8"], adapter=foreign)


def test_other_classes_are_answered_and_classes_of_another_model_refused(models: Models, photograph: Pixels) -> None:
    bank = bank_of("tiny-clip", ("cat", "ship", "tree", "house", "bird"))
    model = Model.open(models["int8"], classes=bank)
    assert model.labels == bank.classes
    assert model.run(photograph[None]).probabilities.shape == (1, 5)
    sharper = TextBank(**{**vars(bank), "logit_scale": 2 * bank.logit_scale})
    cosines = model.run(photograph[None]).embeddings @ bank.embeddings.T
    wanted = np.exp(2 * bank.logit_scale * (cosines - cosines.max()))
    said = model.with_adapter(None, sharper).run(photograph[None]).probabilities
    np.testing.assert_allclose(said, wanted / wanted.sum(), atol=1e-4)
    with pytest.raises(InferenceError, match="their embeddings mean nothing to it"):
        model.with_adapter(None, TextBank(**{**vars(bank), "model_digest": "0" * 64}))


def test_an_answer_that_is_not_finite_is_none(models: Models, photograph: Pixels) -> None:
    bank = bank_of("tiny-clip", CLASSES)
    overflown = replace(bank, embeddings=np.full_like(bank.embeddings, np.inf))
    with pytest.raises(InferenceError, match="answer is not finite"):
        Model.open(models["fp32"], classes=overflown).run(photograph[None])


def test_files_that_are_no_artefacts_are_named(models: Models, tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=r"none\.onnx: no such file. `clipcast export` makes one"):
        Model.open(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(InferenceError, match=r"broken\.onnx: onnxruntime cannot load it"):
        Model.open(tmp_path / "broken.onnx")
    (tmp_path / "cut.onnx").write_bytes(models["int8"].read_bytes()[:200_000])
    with pytest.raises(InferenceError, match=r"cut\.onnx: onnxruntime cannot load it"):
        Model.open(tmp_path / "cut.onnx")
    onnx.save(preprocessing_graph(load_preprocessing("tiny-clip"), 10), tmp_path / "foreign.onnx")
    with pytest.raises(InferenceError, match="was not exported by clipcast"):
        Model.open(tmp_path / "foreign.onnx")
    model = onnx.load(models["int8"])
    next(entry for entry in model.metadata_props if entry.key == METADATA).value = '{"labels": 7}'
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(InferenceError, match="what it says of itself cannot be read"):
        Model.open(tmp_path / "odd.onnx")


def test_a_file_that_refers_to_another_is_refused(models: Models, tmp_path: Path) -> None:
    model = onnx.load(models["fp32"])
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(10_000_000))
    largest = max(model.graph.initializer, key=lambda value: len(value.raw_data))
    onnx.external_data_helper.set_external_data(largest, str(secret))
    largest.ClearField("raw_data")
    largest.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InferenceError, match="onnxruntime cannot load it"):
        Model.open(tmp_path / "model.onnx")


def test_answers_are_best_first_and_an_observer_hears_of_each(models: Models, photograph: Pixels) -> None:
    answering, heard = Answering(Model.open(models["int8"]), 7), list[Outcome]()
    answering.observe(heard.append)
    answer = answering.classify(photograph, top=9)
    assert set(answer.labels) == set(CLASSES)
    assert list(answer.probabilities) == sorted(answer.probabilities, reverse=True)
    assert answer.version == heard[0].version == 7
    assert answer.milliseconds == 1000 * heard[0].seconds > 0
    assert heard[0].scores is not None
    with pytest.raises(InferenceError, match=r"pictures of shape \(1, 5\)"):
        answering.classify(np.zeros(5, np.uint8))
    assert heard[1].error is not None


def test_a_switch_takes_effect_between_answers(models: Models, photograph: Pixels) -> None:
    first, second = Model.open(models["int8"]), Model.open(models["fp32"])
    answering = Answering(first, 1)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(answering.classify, photograph) for _ in range(20)]
        answering.switch(second, 2)
        answers += [pool.submit(answering.classify, photograph) for _ in range(20)]
        versions = [answer.result().version for answer in answers]
    assert versions[-20:] == [2] * 20
    assert set(versions) <= {1, 2}


def test_a_provider_that_is_listed_but_executes_nothing_is_told_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """onnxruntime's wheel for CPUs lists AzureExecutionProvider, which computes no matrices."""
    assert "AzureExecutionProvider" in onnxruntime.get_available_providers()
    assert executes("AzureExecutionProvider") == f"listed, but {CPU} executes instead"
    assert executes(CPU) == ""
    profile = load_profile("jetson-orin-nano-8gb")
    azure = profile.model_copy(update={"onnx_providers": ("AzureExecutionProvider", *profile.onnx_providers)})
    with caplog.at_level(logging.WARNING):
        runtime = runtime_for(azure)
    assert runtime.providers == (CPU,)
    assert f"AzureExecutionProvider is not used: listed, but {CPU} executes instead" in caplog.text
    assert f"{TENSORRT} is not used: this onnxruntime was built without it" in caplog.text
    assert len(runtime.skipped) == len(azure.onnx_providers) - 1
    with pytest.raises(InferenceError, match="AzureExecutionProvider does not execute here"):
        runtime_for(profile, "AzureExecutionProvider")


def test_engines_are_kept_by_model_and_tensorrt_is_told_the_shapes(tmp_path: Path) -> None:
    assert engine_folder(tmp_path, "a" * 64) != engine_folder(tmp_path, "b" * 64)
    assert engine_folder(tmp_path, "a" * 64) == engine_folder(tmp_path, "a" * 64)
    (tensorrt, cpu) = with_options(Runtime((TENSORRT, CPU), cache=tmp_path), b"a model")
    assert cpu == (CPU, {})
    assert tensorrt[1]["trt_engine_cache_path"] == str(engine_folder(tmp_path, sha256(b"a model")))
    assert engine_folder(tmp_path, sha256(b"a model")).is_dir()
    assert engine_folder(tmp_path, sha256(b"a model")).stat().st_mode & 0o777 == 0o700


def test_a_session_uses_as_many_threads_as_it_is_told(models: Models) -> None:
    options = Model.open(models["int8"], Runtime(threads=1))._session.get_session_options()
    assert options.intra_op_num_threads == 1
