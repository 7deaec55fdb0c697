"""Ledger and budget: nothing is forgotten, nothing is spent twice, and noise is given out for what is written alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from edge_client.errors import LedgerError, PlanRefusedError
from edge_client.privacy import budget as module
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.budget import Budget, virtual_budget
from edge_client.privacy.ledger import Disclosure, Ledger
from edge_client.privacy.noise import Noise
from protocol.messages import Privacy

WORK, OTHER = "a" * 64, "b" * 64
CLEAN = np.linspace(-1.0, 1.0, 12).reshape(3, 4)
PRIVACY = Privacy(clip=1.0, noise_multiplier=2.0, delta=1e-5, epsilon=8.0)
BOTH = ("adapter", "prototypes")


def spend(budget, work=WORK, part="adapter", clean=CLEAN, privacy=PRIVACY):
    return budget.noised(privacy, work, part, clean, 1.0)


def limited(disclosures, slack=1.001, **fields):
    """The recipe's privacy with room for so many disclosures and no more."""
    return PRIVACY.model_copy(update={"epsilon": slack * epsilon_of([2.0] * disclosures, 1e-5), **fields})


def files(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_nothing_is_written_before_the_first_disclosure(tmp_path):
    budget = Budget.open(tmp_path / "state")
    budget.check(PRIVACY, WORK, BOTH)
    budget.check(None)
    assert budget.epsilon(1e-5) == 0.0
    assert files(tmp_path / "state") == []


def test_what_was_disclosed_is_found_by_the_next_start_and_costs_nothing_again(tmp_path):
    first = [spend(Budget.open(tmp_path), part=part) for part in BOTH]
    budget = Budget.open(tmp_path)
    assert [(d.work, d.part, d.noise_multiplier) for d in budget.ledger.disclosures] == [
        (WORK, "adapter", 2.0),
        (WORK, "prototypes", 2.0),
    ]
    spent = budget.epsilon(1e-5)
    assert spent == epsilon_of([2.0, 2.0], 1e-5)
    again = [spend(budget, part=part) for part in BOTH]
    assert [one.tobytes() for one in again] == [one.tobytes() for one in first]
    assert budget.epsilon(1e-5) == spent
    spend(budget, OTHER)
    assert Budget.open(tmp_path).epsilon(1e-5) == epsilon_of([2.0] * 3, 1e-5)


def test_only_the_owner_may_read_secret_and_ledger(tmp_path):
    spend(Budget.open(tmp_path))
    assert files(tmp_path) == ["ledger.json", "privacy.key"]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files(tmp_path)} == {0o600}


def test_no_two_results_have_the_same_noise():
    """Work, part, device, and the clean result itself: a training that is repeated to other bits is another disclosure."""
    nudged = CLEAN.copy()
    nudged[0, 0] = np.nextafter(nudged[0, 0], 1.0)
    budgets = [Budget(secret=bytes([n]) * 32) for n in range(2)]
    noise = [
        spend(budget, work, part, clean) - clean
        for budget in budgets
        for work in (WORK, OTHER)
        for part in BOTH
        for clean in (CLEAN, nudged)
    ]
    assert len({array.round(9).tobytes() for array in noise}) == len(noise) == 16
    assert [len(budget.ledger.disclosures) for budget in budgets] == [8, 8]


def test_the_noise_owes_nothing_to_what_others_know(tmp_path):
    """The federation's seed and plan are the same on all devices: without the secret nobody draws this noise."""
    one, other = (spend(Budget.open(tmp_path / name)) for name in ("one", "other"))
    assert np.abs(one - other).min() > 0


def test_the_disclosure_is_on_the_disk_before_its_noise_is_drawn(tmp_path, monkeypatch):
    seen = []

    def drawn(key):
        seen.append(len(Ledger(tmp_path / "ledger.json").disclosures))
        return Noise(key)

    monkeypatch.setattr(module, "Noise", drawn)
    budget = Budget.open(tmp_path)
    for work in (WORK, OTHER, WORK):
        spend(budget, work)
    assert seen == [1, 2, 2]


def test_the_limit_of_the_plan_stops_before_it_is_crossed(tmp_path):
    privacy = limited(3)
    budget = Budget.open(tmp_path)
    for number in range(3):
        budget.check(privacy, f"{number:064x}", ("adapter",))
        spend(budget, f"{number:064x}", privacy=privacy)
    with pytest.raises(PlanRefusedError, match=r"epsilon of .* the plan allows .* \(3 disclosures so far\)"):
        budget.check(privacy, WORK, ("prototypes",))
    with pytest.raises(PlanRefusedError):
        spend(budget, privacy=privacy)
    assert budget.epsilon(1e-5) <= privacy.epsilon
    assert len(Budget.open(tmp_path).ledger.disclosures) == 3


def test_a_round_is_refused_as_a_whole_if_only_half_of_it_would_fit():
    budget = Budget()
    budget.check(limited(1), WORK, ("prototypes",))
    with pytest.raises(PlanRefusedError):
        budget.check(limited(1), WORK, BOTH)


def test_a_training_that_is_repeated_is_not_refused_for_what_it_spent_before():
    budget, privacy = Budget(), limited(2)
    for part in BOTH:
        spend(budget, part=part, privacy=privacy)
    budget.check(privacy, WORK, BOTH)
    assert spend(budget, privacy=privacy).shape == CLEAN.shape
    with pytest.raises(PlanRefusedError):
        budget.check(privacy, OTHER, BOTH)
    with pytest.raises(PlanRefusedError):  # repeated to other bits
        spend(budget, clean=CLEAN + 1e-9, privacy=privacy)


def test_the_owner_has_the_last_word():
    generous = PRIVACY.model_copy(update={"epsilon": 1e6})
    owned = Budget(max_epsilon=1.001 * epsilon_of([2.0], 1e-5))
    spend(owned, privacy=generous)
    with pytest.raises(PlanRefusedError, match="this device's owner allows"):
        owned.check(generous, OTHER, ("adapter",))
    with pytest.raises(PlanRefusedError, match="no `privacy`, and this device's owner allows an epsilon of"):
        owned.check(None)


def test_a_plan_cannot_talk_the_owners_limit_down_with_a_large_delta():
    loose = PRIVACY.model_copy(update={"epsilon": 1e6, "delta": 1e-3})
    limit = 1.001 * epsilon_of([2.0], 1e-3)
    assert limit < epsilon_of([2.0], 1e-5)
    with pytest.raises(PlanRefusedError, match="delta of 1e-05"):
        Budget(max_epsilon=limit).check(loose, WORK, ("adapter",))
    Budget(max_epsilon=limit, max_delta=1e-3).check(loose, WORK, ("adapter",))


def test_a_cost_that_is_not_a_number_is_too_much(monkeypatch):
    monkeypatch.setattr(module, "epsilon_of", lambda *_: float("nan"))
    with pytest.raises(PlanRefusedError):
        Budget().check(PRIVACY, WORK, ("adapter",))


def test_plans_of_other_noise_and_delta_are_added_up():
    budget = Budget()
    spend(budget)
    spend(budget, OTHER, privacy=PRIVACY.model_copy(update={"noise_multiplier": 5.0, "clip": 9.0}))
    assert budget.epsilon(1e-6) == epsilon_of([2.0, 5.0], 1e-6)


DAMAGE = {
    "torn": lambda text: text[:-10],
    "empty": lambda _: "",
    "not JSON": lambda _: "epsilon 3",
    "an entry less": lambda text: json.dumps({**json.loads(text), "disclosures": json.loads(text)["disclosures"][:1]}),
    "another multiplier": lambda text: text.replace("2.0", "3.0"),
    "no list": lambda text: json.dumps({**json.loads(text), "disclosures": None}),
    "an unknown key": lambda text: json.dumps({**json.loads(text), "more": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_ledger_stops_the_client_and_is_left_as_it_is(tmp_path, damage):
    budget = Budget.open(tmp_path)
    for part in BOTH:
        spend(budget, part=part)
    path = tmp_path / "ledger.json"
    damaged = damage(path.read_text())
    path.write_text(damaged)
    with pytest.raises(LedgerError, match=r"ledger\.json cannot be read: .* Restore its last state"):
        Budget.open(tmp_path)
    assert path.read_text() == damaged


def test_a_ledger_that_may_not_be_read_stops_the_client(tmp_path):
    (tmp_path / "ledger.json").mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        Budget.open(tmp_path)


def test_a_ledger_that_is_gone_while_its_secret_is_there_stops_the_client(tmp_path):
    spend(Budget.open(tmp_path))
    (tmp_path / "ledger.json").unlink()
    with pytest.raises(LedgerError, match="nobody knows how much"):
        Budget.open(tmp_path)
    (tmp_path / "privacy.key").unlink()
    assert Budget.open(tmp_path).epsilon(1e-5) == 0.0


@pytest.mark.parametrize("text", ["", "zz", "ab" * 31, "ä" * 64])
def test_a_damaged_secret_stops_the_client(tmp_path, text):
    spend(Budget.open(tmp_path))
    (tmp_path / "privacy.key").write_text(text)
    with pytest.raises(LedgerError, match=r"privacy\.key .*Restore it, or remove it"):
        Budget.open(tmp_path)


def test_a_secret_that_was_lost_makes_the_same_result_another_disclosure(tmp_path):
    first = spend(Budget.open(tmp_path))
    (tmp_path / "privacy.key").unlink()
    budget = Budget.open(tmp_path)
    assert spend(budget).tobytes() != first.tobytes()
    assert len(budget.ledger.disclosures) == 2


def test_a_disk_that_takes_no_more_gives_no_noise(tmp_path, monkeypatch):
    budget = Budget.open(tmp_path)
    spend(budget)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(PlanRefusedError, match=r"ledger cannot be kept.*No space left"):
            spend(budget, OTHER)
    assert len(budget.ledger.disclosures) == len(Budget.open(tmp_path).ledger.disclosures) == 1
    spend(budget, OTHER)
    assert len(Budget.open(tmp_path).ledger.disclosures) == 2


def test_a_power_cut_at_any_durable_operation_forgets_nothing_that_got_noise(tmp_path, monkeypatch):
    class PowerCutError(Exception):
        pass

    places = {"fsync": os, "replace": Path, "unlink": Path}
    for cut in range(60):
        folder, left, drawn = tmp_path / str(cut), cut, []
        with monkeypatch.context() as patch:

            def counted(original):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise PowerCutError
                    return original(*args, **kwargs)

                return call

            for name, owner in places.items():
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                for work in (WORK, OTHER):
                    drawn.append(spend(Budget.open(folder), work).tobytes())
            except PowerCutError:
                pass
        budget = Budget.open(folder)
        assert len(budget.ledger.disclosures) >= len(drawn)
        again = [spend(budget, work).tobytes() for work in (WORK, OTHER)]
        assert again[: len(drawn)] == drawn
        assert len(Budget.open(folder).ledger.disclosures) == 2
        if left >= 0:
            assert cut > 10
            return
    raise AssertionError("it never came through")


def test_a_virtual_clients_noise_is_its_own_and_the_same_in_every_run():
    """Whatever name the run was given; and no two of its rounds have the same."""
    budgets = [virtual_budget(name) for name in ("ann", "bob", "ann")]
    draws = [spend(budget, work).tobytes() for budget, work in zip(budgets, (WORK, WORK, OTHER), strict=True)]
    assert draws[0] == draws[2] != draws[1]
    assert spend(budgets[0], OTHER).tobytes() != draws[0]


def test_a_disclosure_is_written_as_read():
    disclosure = Disclosure(work=WORK, part="adapter", mark=OTHER, noise_multiplier=0.1 + 0.2)
    assert Disclosure.model_validate_json(disclosure.model_dump_json()) == disclosure
