"""Epsilon against dp-accounting called by hand, and against the closed form for Gaussian mechanisms."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.privacy.accounting import epsilon_of

ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
schedules = st.lists(st.floats(0.3, 50.0), max_size=40) | st.builds(
    lambda z, k: [z] * k, st.sampled_from([0.5, 1.0, 4.0, 20.0]), st.integers(0, 300)
)
deltas = st.sampled_from([1e-3, 1e-5, 1e-6, 1e-9])


def closed_form(multipliers, delta):
    """Renyi divergence of order a is a * sum 1 / (2 z^2); the best order of those that dp-accounting tries."""
    total = math.fsum(1 / (2 * z * z) for z in multipliers)
    found = []
    for a in ORDERS:
        divergence = a * total
        if delta**2 + math.expm1(-divergence) > 0:  # delta <= sqrt(1 - exp(-KL))
            return 0.0
        found.append(divergence + math.log1p(-1 / a) - math.log(delta * a) / (a - 1))
    return max(0.0, min(found))


@given(schedules, deltas)
def test_epsilon_is_what_dp_accounting_says_of_the_schedule(multipliers, delta):
    accountant = dp_accounting.rdp.RdpAccountant()
    for multiplier in multipliers:
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier))
    assert epsilon_of(multipliers, delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-6, abs=1e-6)


@given(schedules, deltas)
def test_epsilon_is_the_closed_form_of_the_gaussian_mechanism(multipliers, delta):
    assert epsilon_of(multipliers, delta) == pytest.approx(closed_form(multipliers, delta), rel=1e-6, abs=1e-6)


@given(st.floats(0.5, 20.0), st.integers(1, 50), deltas)
def test_epsilon_is_no_less_than_the_exact_one(multiplier, count, delta):
    exact = dp_accounting.get_epsilon_gaussian(multiplier / math.sqrt(count), delta)
    assert epsilon_of([multiplier] * count, delta) >= exact - 1e-9


@given(schedules, st.floats(0.3, 50.0), deltas)
def test_a_disclosure_more_never_costs_less_and_the_order_does_not_matter(multipliers, another, delta):
    before = epsilon_of(multipliers, delta)
    assert epsilon_of([*multipliers, another], delta) >= before
    assert epsilon_of([another, *multipliers], delta) == epsilon_of([*multipliers, another], delta)


@given(st.lists(st.sampled_from([1e-3, 1e6]), max_size=3000), st.sampled_from([1e-3, 1e-12, 1e-300]))
def test_epsilon_is_a_number_whatever_a_plan_asks_for(multipliers, delta):
    assert 0.0 <= epsilon_of(multipliers, delta) < math.inf


def test_nothing_disclosed_costs_nothing():
    assert epsilon_of([], 1e-5) == 0.0
