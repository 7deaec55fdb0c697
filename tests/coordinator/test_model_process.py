"""The model in a process of its own: the same answers and errors, and no trace of it when either process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from clip_lora.errors import ModelError
from coordinator.errors import FederationError
from coordinator.model import LocalModel
from coordinator.model_process import ModelProcess
from coordinator.recipe import TextTraining
from coordinator.text_samples import TextSamples
from protocol.codec import encode_adapter, encode_bank
from tests.conftest import wait_until

ASKED = (("zero", "one"), ("a photo of a {}",))
HOW = TextTraining(steps=2)


@pytest.fixture(scope="module")
def apart():
    with ModelProcess("tiny-clip") as model:
        yield model


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"  # a dead one that nobody has waited for


def test_it_answers_with_the_bits_of_one_in_this_process(apart):
    here = LocalModel("tiny-clip")
    assert apart.sizes() == here.sizes()
    bank = here.bank(*ASKED)
    assert encode_bank(apart.bank(*ASKED)) == encode_bank(bank)
    assert apart.begin(bank, HOW, 0) == here.begin(bank, HOW, 0)
    rows = np.eye(4, bank.embeddings.shape[1], dtype=np.float32)
    samples = TextSamples(rows, np.array([0, 1, 0, 1], np.int32), np.full(4, 0.25))
    start = None
    for version in (2, 3):
        one, other = apart.teach(samples, start, version), here.teach(samples, start, version)
        assert (encode_bank(one[0]), encode_adapter(one[1]), one[2]) == (
            encode_bank(other[0]),
            encode_adapter(other[1]),
            other[2],
        )
        start = one[1]


def test_what_it_raises_is_raised_here_and_it_goes_on(apart):
    with pytest.raises(ModelError, match=r"cannot load model|holds no config"), ModelProcess("/absent/model") as other:
        other.sizes()
    with pytest.raises(ModelError, match="blocks"):
        apart.begin(apart.bank(*ASKED), HOW.model_copy(update={"first_block": 99}), 0)
    assert apart.sizes()


def test_if_it_is_killed_that_is_told_and_the_next_question_starts_another_one():
    with ModelProcess("tiny-clip") as model:
        sizes = model.sizes()
        model._process.kill()
        with pytest.raises(FederationError, match="ended with code -9"):
            model.sizes()
        model.close()
        assert model.sizes() == sizes
        pid = model._process.pid
    assert not is_alive(pid)


def test_if_it_is_stopped_that_is_told_and_ends(monkeypatch, caplog):
    monkeypatch.setattr("coordinator.model_process.TOLD_S", 0.05)
    with ModelProcess("tiny-clip") as model:
        model.sizes()
        caplog.clear()
        monkeypatch.setattr("coordinator.model_process.LIMIT_S", 0.2)
        os.kill(model._process.pid, signal.SIGSTOP)
        with pytest.raises(FederationError, match="has not answered"):
            model.sizes()
    assert "the model is at work" in caplog.text


def test_it_does_not_outlive_a_parent_that_is_killed():
    program = textwrap.dedent("""
        import time
        from coordinator.model_process import ModelProcess
        if __name__ == "__main__":
            model = ModelProcess("tiny-clip")
            model.sizes()
            print(model._process.pid, flush=True)
            time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(child), what="the child to end")
