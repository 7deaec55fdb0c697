"""How much all disclosures together tell of one picture: Renyi differential privacy, by Google's dp-accounting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def epsilon_of(noise_multipliers: Iterable[float], delta: float) -> float:
    """Return epsilon at `delta` of Gaussian mechanisms, each one's noise over its sensitivity to one picture; 0 for none.

    Their Renyi divergences of each order add up, also where one mechanism's input depends on an earlier one's output
    (Mironov, arXiv 1702.07476); the best order's bound is converted by Canonne, Kamath and Steinke, arXiv 2004.00010. Raises
    ModuleNotFoundError without the extra `privacy`.
    """
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    for multiplier, count in sorted(Counter(noise_multipliers).items()):
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), count)
    return float(accountant.get_epsilon(delta))
