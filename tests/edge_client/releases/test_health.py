"""How a trial is judged, and what is measured for it; and the smoke picture."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_client.errors import InferenceError
from edge_client.inference.answering import Answering, Outcome
from edge_client.inference.model import Model, Scores
from edge_client.inference.pictures import Pixels
from edge_client.releases.health import KEPT, Figures, Watch, judge, smaller
from edge_client.releases.smoke import smoke_problem
from export.flavours import Flavour
from protocol.release.manifests import Health, Smoke
from protocol.release.smoke import pack_embedding

HEALTH = Health(window_s=60, min_answers=10, max_error_share=0.1, max_latency_ratio=2.0, min_agreement=0.5)
WELL = Figures(seconds=61, answers=10, errors=0, latency=0.02, latency_before=0.01, agreement=0.5)


def test_a_window_without_trouble_ends_well() -> None:
    assert judge(HEALTH, WELL) == (True, None, "")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"seconds": 59}, (False, None)),
        ({"answers": 9}, (False, None)),
        ({"errors": 2}, (True, "errors")),
        ({"errors": 1}, (True, None)),
        ({"seconds": 1, "answers": 5, "errors": 1}, (True, "errors")),
        ({"seconds": 1, "answers": 4, "errors": 4}, (False, None)),
        ({"latency": 0.021}, (True, "slow")),
        ({"latency": None}, (True, None)),
        ({"latency_before": None, "latency": 9.0}, (True, None)),
        ({"agreement": 0.49}, (True, "disagrees")),
        ({"agreement": None}, (True, None)),
    ],
)
def test_each_limit_counts(change: dict[str, float], verdict: tuple[bool, str | None]) -> None:
    assert judge(HEALTH, Figures(**{**vars(WELL), **change}))[:2] == verdict


figures = st.builds(
    Figures,
    seconds=st.floats(0, 1000),
    answers=st.integers(0, 50),
    errors=st.integers(0, 50),
    latency=st.none() | st.floats(0, 10),
    latency_before=st.none() | st.floats(0, 10),
    agreement=st.none() | st.floats(0, 1),
)


@given(figures)
def test_a_trial_that_goes_on_has_no_reason_and_one_that_ends_early_has_errors(found: Figures) -> None:
    over, reason, detail = judge(HEALTH, found)
    assert over or reason is None
    assert bool(reason) == bool(detail)
    if over and (found.seconds < HEALTH.window_s or found.answers < HEALTH.min_answers):
        assert reason == "errors"


def outcome(version: int, label: int = 0, seconds: float = 0.01, side: int = 4) -> Outcome:
    shares = np.zeros((1, 4), np.float32)
    shares[0, label] = 1
    return Outcome(np.zeros((side, side, 3), np.uint8), version, seconds, Scores(shares, np.ones((1, 8), np.float32)))


def test_what_was_measured_before_the_switch_is_what_after_it_is_compared_with() -> None:
    watch = Watch()
    for seconds in (0.01, 0.02, 0.03):
        watch.note(outcome(1, seconds=seconds))
    watch.begin(2)
    watch.note(outcome(1, seconds=9.0))  # it was under way at the switch
    watch.note(outcome(2, seconds=0.05))
    watch.note(Outcome(np.zeros((4, 4, 3), np.uint8), 2, 0.0, error=InferenceError("no")))
    assert watch.figures(7.0) == Figures(7.0, 2, 1, 0.05, 0.02, None)


def test_a_model_that_went_leaves_no_measure_behind() -> None:
    watch = Watch()
    watch.note(outcome(1, seconds=0.1))
    watch.begin(2)
    for _ in range(200):
        watch.note(outcome(2, seconds=0.5))
    watch.back()
    watch.begin(3)
    assert watch.figures(0.0).latency_before == 0.1
    watch.note(outcome(3, seconds=0.2))
    watch.end()
    watch.begin(4)
    assert watch.figures(0.0).latency_before == 0.2


def test_recent_pictures_are_few_and_small() -> None:
    watch = Watch()
    watch.begin(2)
    for _ in range(100):
        watch.note(outcome(2, side=3000))
    assert len(watch._pictures) == KEPT
    assert sum(image.nbytes for image, _ in watch._pictures) < KEPT * 512 * 512 * 3
    assert smaller(np.zeros((3000, 200, 3), np.uint8)).shape == (500, 34, 3)
    assert smaller(np.zeros((512, 200, 3), np.uint8)).shape == (512, 200, 3)


def test_agreement_is_asked_of_the_model_before(models: dict[Flavour, Path], photograph: Pixels) -> None:
    before, now = Model.open(models["fp32"]), Model.open(models["int8"])
    answering, watch = Answering(now, 2), Watch()
    answering.observe(watch.note)
    watch.begin(2)
    for turned in (photograph, photograph[::-1], photograph[:, ::-1]):
        answering.classify(turned)
    assert watch.compare(now, before) == 1.0
    wrong = (int(now.run(photograph[None]).probabilities[0].argmax()) + 1) % 4
    watch.note(outcome(2, wrong))
    watch._pictures[-1] = (photograph[::2, ::2], wrong)
    assert watch.compare(now, before) == 0.75
    assert Watch().compare(now, before) is None


def png(image: Pixels) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def a_smoke(model: Model, image: Pixels) -> Smoke:
    scores = model.run(image[None])
    label = model.labels[int(scores.probabilities[0].argmax())]
    return Smoke(picture=png(image), label=label, embedding=pack_embedding(scores.embeddings[0]))


def test_a_model_passes_its_own_smoke_picture_in_any_flavour_and_another_does_not(
    models: dict[Flavour, Path], photograph: Pixels
) -> None:
    small = np.ascontiguousarray(photograph[::16, ::16])
    smoke = a_smoke(Model.open(models["fp32"]), small)
    assert smoke_problem(Model.open(models["fp32"]), smoke) == ""
    assert smoke_problem(Model.open(models["int8"]), smoke) == ""
    base = Model.open(models["adapter"])  # without its adapter it is another model
    assert smoke_problem(base, smoke.model_copy(update={"min_cosine": 0.9999})).startswith("cosine ")
    said = smoke_problem(Model.open(models["int8"]), smoke.model_copy(update={"label": "submarine"}))
    assert "'submarine' was expected" in said
    assert "cannot be read" in smoke_problem(base, smoke.model_copy(update={"picture": "AAAA"}))
    assert "values, 3 were expected" in smoke_problem(base, smoke.model_copy(update={"embedding": "f39/"}))
