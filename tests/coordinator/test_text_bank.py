"""Class embeddings against a naive twin: one prompt at a time through transformers' whole CLIP, no padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from clip_lora.errors import ModelError
from clip_lora.towers import locate, model_facts
from coordinator.text_bank import make_bank
from protocol.codec import decode_bank, encode_bank

CLASSES = ["cat", "espresso machine", "steam locomotive", "zero"]
TEMPLATES = ["a photo of a {}", "a blurry picture of one {} taken from far away", "{}"]


@pytest.fixture(scope="module")
def embed():
    model = CLIPModel.from_pretrained(locate("tiny-clip"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(locate("tiny-clip"))

    def unit(prompt):
        with torch.no_grad():
            pooled = model.text_model(**tokenizer(prompt, return_tensors="pt")).pooler_output
            row = model.text_projection(pooled)[0].double().numpy()
        return row / np.linalg.norm(row)

    return unit


def test_the_bank_of_one_template_is_the_unit_embedding_of_each_prompt(embed):
    bank = make_bank("tiny-clip", CLASSES, TEMPLATES[:1])
    twin = np.stack([embed(TEMPLATES[0].format(name)) for name in CLASSES])
    np.testing.assert_allclose(bank.embeddings, twin, atol=1e-5)


def test_several_templates_are_averaged_as_unit_vectors_and_made_unit_again(embed):
    bank = make_bank("tiny-clip", CLASSES, TEMPLATES)
    for row, name in zip(bank.embeddings, CLASSES, strict=True):
        mean = np.zeros(256)
        for template in TEMPLATES:
            mean += embed(template.format(name)) / len(TEMPLATES)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES], ids=["one", "three"])
def test_every_embedding_has_unit_length_and_classes_differ(templates):
    bank = make_bank("tiny-clip", CLASSES, templates)
    assert bank.embeddings.shape == (4, 256)
    assert bank.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(bank.embeddings, axis=1), 1.0, atol=1e-6)
    assert (bank.embeddings @ bank.embeddings.T)[~np.eye(4, dtype=bool)].max() < 0.99


def test_the_bank_carries_the_facts_of_its_model_and_survives_the_wire():
    bank, facts = make_bank("tiny-clip", CLASSES, TEMPLATES, version=7), model_facts("tiny-clip")
    assert (bank.version, bank.classes, bank.templates) == (7, tuple(CLASSES), tuple(TEMPLATES))
    assert (bank.logit_scale, bank.model, bank.model_digest) == (facts.logit_scale, facts.name, facts.digest)
    assert encode_bank(decode_bank(encode_bank(bank))) == encode_bank(bank)


def test_the_same_words_give_the_same_bits():
    assert encode_bank(make_bank("tiny-clip", CLASSES, TEMPLATES)) == encode_bank(make_bank("tiny-clip", CLASSES, TEMPLATES))


def test_a_class_keeps_its_embedding_whatever_the_other_classes_are():
    alone, among = make_bank("tiny-clip", ["cat"], TEMPLATES), make_bank("tiny-clip", CLASSES, TEMPLATES)
    np.testing.assert_array_equal(alone.embeddings[0], among.embeddings[0])


def test_a_prompt_longer_than_the_tower_reads_is_cut():
    bank = make_bank("tiny-clip", ["very " * 60 + "long name", "cat"], ["a photo of a {}"])
    np.testing.assert_allclose(np.linalg.norm(bank.embeddings, axis=1), 1.0, atol=1e-6)


def test_a_model_that_is_not_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        make_bank(str(tmp_path), CLASSES, TEMPLATES)


def test_the_number_of_threads_leaves_no_trace_in_the_bits():
    threads = torch.get_num_threads()
    try:
        banks = []
        for count in (1, 2):
            torch.set_num_threads(count)
            banks.append(make_bank("tiny-clip", ("zero", "one"), ("a photo of a {}",)).embeddings.tobytes())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert banks[0] == banks[1]
