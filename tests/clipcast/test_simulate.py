"""Simulated federations: the same coordinator and clients, real quantised training on real digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_lora.towers import one_thread
from clipcast.simulate.evaluate import own_accuracy
from clipcast.simulate.pool import Pool
from clipcast.simulate.report import cells, markdown
from clipcast.simulate.run import Bench
from clipcast.simulate.settings import SimulateSettings, parse_shots
from clipcast.simulate.story import simulate
from coordinator.errors import FederationError
from edge_client.privacy.accounting import epsilon_of
from protocol.settings import SettingsError

SMALL = "+first_block=-1+local_steps=2+text.steps=5+personal.closing_steps=1"
KEYS = {
    "recipe", "seed", "partition", "shots", "bits", "global_accuracy", "personal_accuracy", "personal_all_classes",
    "bytes_up", "bytes_down", "seconds",
}  # fmt: skip
MakeSettings = Callable[..., SimulateSettings]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def make(tmp_path: Path) -> MakeSettings:
    def settings(**fields: object) -> SimulateSettings:
        good: dict[str, Any] = {
            "data": "digits", "model": "tiny-clip", "bits": 4, "recipes": (f"fedalign{SMALL}",), "seeds": 1, "clients": 4,
            "partition": "disjoint", "shots": 6, "rounds": 1, "out": tmp_path / "out", "test_pictures": 40,
        }  # fmt: skip
        return SimulateSettings(**{**good, **fields}).check()

    return settings


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock or a timer decided: seconds, and bytes of messages that were said again."""
    drop = {"seconds", "bytes_up", "bytes_down"}
    rows = [{key: value for key, value in row.items() if key not in drop} for row in rows]
    for row in rows:
        row["rounds"] = [{key: value for key, value in r.items() if key not in drop} for r in row["rounds"]]
    return rows


def test_under_disjoint_classes_fedalign_beats_fedlora(make: MakeSettings) -> None:
    """All of it: text side, query aggregation, closing round."""
    training = "+first_block=-2+local_steps=6"
    recipes = (f"fedlora{training}", f"fedalign{training}")
    fedlora, fedalign = simulate(make(recipes=recipes, shots=8, rounds=2, clients=5, test_pictures=200))
    assert fedalign["global_accuracy"] > fedlora["global_accuracy"] + 0.02
    assert fedalign["personal_accuracy"] > fedlora["personal_accuracy"] + 0.2
    assert fedalign["rounds"][-1]["attention"] is not None


def test_recipes_that_differ_in_their_text_side_only_are_judged_each_by_its_own(make: MakeSettings) -> None:
    """Same adapters, same version of the class bank, other embeddings."""
    recipes = tuple(f"fedalign{SMALL}+text.steps={steps}+text.aligning_round=false" for steps in (1, 40))
    both = simulate(make(recipes=recipes))
    alone = [simulate(make(recipes=(recipe,)))[0] for recipe in recipes]
    assert without_time(both) == without_time(alone)
    assert both[0]["rounds"][0]["global_accuracy"] != both[1]["rounds"][0]["global_accuracy"]


PRIVATE = "fedalign+features_per_class=0+privacy.clip=0.5+privacy.noise_multiplier=0.2+privacy.delta=1e-5"


def test_a_recipe_with_privacy_is_simulated_and_the_same_each_time(make: MakeSettings) -> None:
    """Each client's noise is its own, and every simulation's the same; the noise shows."""
    recipes = tuple(f"{PRIVATE}+privacy.epsilon=1000{SMALL}+privacy.clip={clip}" for clip in (0.05, 1.0))
    one, other = simulate(make(recipes=recipes))
    for row in (one, other):
        assert [r["loss"] for r in row["rounds"]] == [None] * 3
        assert [r["train_class_accuracy"] for r in row["rounds"]] == [{}] * 3
        spent = [epsilon_of([0.2] * disclosures, 1e-5) for disclosures in (2, 3, 5)]  # the aligning round takes no steps
        assert [r["epsilon"] for r in row["rounds"]] == pytest.approx(spent)
    assert one["clients"] != other["clients"]
    again = simulate(make(recipes=recipes[:1]))
    assert without_time(again) == without_time([one])


def test_a_simulation_whose_budget_is_spent_ends_and_says_whom_it_waited_for(make: MakeSettings) -> None:
    recipe = f"{PRIVATE}+privacy.epsilon=0.1{SMALL}"
    with pytest.raises(FederationError, match=r"3 rounds in a row without a quorum of 4; last waited for client-0001"):
        simulate(make(recipes=(recipe,), rounds=3))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(make: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--out .*file: no folder can be made there"):
        simulate(make(out=tmp_path / "file"))


def test_a_training_that_diverges_ends_its_federation_and_leaves_the_finished_runs(
    make: MakeSettings, tmp_path: Path
) -> None:
    settings = make(recipes=("zero-shot", f"fedlora{SMALL}+learning_rate=1e12"), rounds=3)
    with pytest.raises(FederationError, match="3 rounds in a row without a quorum of 4"):
        simulate(settings)
    assert [row["recipe"] for row in json.loads((tmp_path / "out" / "results.json").read_text())] == ["zero-shot"]


def test_what_is_written_and_what_a_run_says(make: MakeSettings, tmp_path: Path) -> None:
    rows = simulate(make(recipes=(f"fedalign{SMALL}", "zero-shot"), rounds=2))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == rows
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "results.md", "rounds.png", "clients.png", "attention.png",
    }  # fmt: skip
    fedalign, zero_shot = rows
    assert fedalign.keys() >= KEYS
    assert [r["round"] for r in fedalign["rounds"]] == [1, 2, 3, 4]  # the last are the aligning and the closing round
    assert fedalign["rounds"][1]["text"]["loss_after"] < fedalign["rounds"][1]["text"]["loss_before"]
    attention = fedalign["rounds"][1]["attention"]
    assert np.array(attention["weights"]).sum(axis=1) == pytest.approx(np.ones(4))
    assert fedalign["rounds"][2]["loss"] is None
    assert fedalign["rounds"][3]["global_accuracy"] == fedalign["rounds"][2]["global_accuracy"]
    assert len(fedalign["clients"]) == 4
    assert zero_shot["personal_all_classes"] == pytest.approx(zero_shot["global_accuracy"])
    assert zero_shot["rounds"][0]["attention"] is None


def test_a_simulation_gives_the_same_results_again_and_with_other_processes(make: MakeSettings) -> None:
    first = without_time(simulate(make(seeds=2)))
    assert without_time(simulate(make(seeds=2, jobs=2))) == first
    assert first[0]["clients"] != first[1]["clients"]


def test_ray_gives_the_same_results(make: MakeSettings) -> None:
    ray = pytest.importorskip("ray")
    local = without_time(simulate(make()))
    try:
        assert without_time(simulate(make(engine="ray"))) == local
    finally:
        ray.shutdown()


def test_more_threads_than_the_cluster_has_are_refused(make: MakeSettings) -> None:
    ray = pytest.importorskip("ray")
    try:
        with pytest.raises(SettingsError, match=r"--threads 9999: the Ray cluster has \d+ CPUs"):
            simulate(make(engine="ray", threads=9999))
    finally:
        ray.shutdown()


def test_clients_without_anything_in_common_share_one_base(make: MakeSettings) -> None:
    bench = Bench.open(make())
    *_, row = bench.run(f"fedalign{SMALL}", 0)
    assert isinstance(row, dict)
    training = bench.judge.encoders
    assert len(training._loaded) == 1


def test_shots_are_drawn_by_class_over_all_clients_and_by_seed(make: MakeSettings) -> None:
    pool = Pool.open(make())
    shares = pool.shares(5, "iid", 7, 0)
    labels = np.concatenate([pool.labels(share) for share in shares])
    assert np.bincount(labels).tolist() == [7] * 10
    names = {picture.name for share in shares for picture in share}
    assert len(names) == 70
    assert names != {picture.name for share in pool.shares(5, "iid", 7, 1) for picture in share}
    assert not names & {picture.name for picture in pool.test}


def test_validation_pictures_come_from_the_training_pictures(make: MakeSettings) -> None:
    test, validation = Pool.open(make(test_pictures=None)), Pool.open(make(test_pictures=None, split="validation"))
    untouched = {picture.name for picture in test.test}
    used = {picture.name for picture in (*validation.train, *validation.test)}
    assert used == {picture.name for picture in test.train}
    assert not used & untouched


def test_own_accuracy_weighs_classes_as_the_client_holds_them() -> None:
    shares = np.array([0.5, 1.0, np.nan, 0.0])
    assert own_accuracy(shares, np.array([0, 0, 0, 1])) == pytest.approx(0.625)
    assert own_accuracy(shares, np.array([2, 1])) == 1.0  # a class without test pictures says nothing


def test_the_table_gives_mean_and_deviation_over_seeds() -> None:
    row = {"personal_accuracy": 0.5, "personal_all_classes": 0.25, "bytes_up": 1500.0, "bytes_down": 2500.0, "seconds": 2.0}
    rows = [{"recipe": "a", "global_accuracy": 0.4, **row}, {"recipe": "a", "global_accuracy": 0.6, **row}]
    (line,) = cells(rows)
    assert line == ("a", "50.0 ± 14.1", "50.0 ± 0.0", "25.0 ± 0.0", "2", "2", "2.0")
    assert markdown(rows).splitlines()[2] == "| a | 50.0 ± 14.1 | 50.0 ± 0.0 | 25.0 ± 0.0 | 2 | 2 | 2.0 |"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipes": ("fedavg",)}, "no recipe 'fedavg'"),
        ({"recipes": ("fedalign+mu",)}, "write KEY=VALUE"),
        ({"recipes": ("fedalign+mue=1",)}, "mue"),
        ({"recipes": ("local", "local")}, "each once"),
        ({"bits": 5}, "choose 4, 8 or 32"),
        ({"partition": "random"}, "write iid"),
        ({"recipes": ("fedalign+mue=1",)}, "unknown key 'mue': remove it or correct its spelling"),
        ({"recipes": ("fedalign+name=local",)}, "what comes before the first"),
        ({"recipes": ("fedalign+personal.tau_q=1e-320",)}, "personal.tau_q"),
        ({"engine": "spark"}, "local or ray"),
        ({"engine": "ray", "jobs": 2}, "exclude each other"),
        ({"split": "train"}, "test or validation"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(make: MakeSettings, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make(**fields)


@pytest.mark.parametrize(("text", "shots"), [("all", None), ("16", 16)])
def test_shots(text: str, shots: int | None) -> None:
    assert parse_shots(text) == shots


@pytest.mark.parametrize("text", ["", "0", "-1", "some", "1.5"])
def test_shots_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="--shots"):
        parse_shots(text)
