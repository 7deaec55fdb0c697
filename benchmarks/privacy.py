"""What differential privacy costs: the global model's accuracy at several epsilons, with and without noisy adapters.

One round of training on real photographs, shared out evenly; prints a table. A round with local steps and the aligning
round disclose three noisy results, one without any a single one: the noise is chosen so that epsilon is the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import mean

from clipcast.simulate.report import Row, spread
from clipcast.simulate.settings import SimulateSettings
from clipcast.simulate.story import headline, simulate

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
BASE = "fedalign+first_block=-2+features_per_class=0+text.steps=100+personal.query=none+personal.closing_steps=0"
STEPS, NO_STEPS = "+local_steps=12", "+local_steps=0+text.aligning_round=false"
NOISE = (1.0, 4.0, 10.0, 30.0)


def private(clip: float, noise: float) -> str:
    """Return the part of a recipe that turns privacy on, with a limit that is never reached."""
    return f"+privacy.clip={clip:g}+privacy.noise_multiplier={noise:.4g}+privacy.delta=1e-5+privacy.epsilon=1e9"


RECIPES = {
    "zero-shot": "zero-shot",
    "adapters and prototypes": BASE + STEPS,
    "prototypes alone": BASE + NO_STEPS,
    **{f"prototypes alone, noise {z:g}": BASE + NO_STEPS + private(1.0, z) for z in NOISE},
    **{
        f"adapters (clip 0.1) and prototypes, noise {3**0.5 * z:.3g}": BASE + STEPS + private(0.1, 3**0.5 * z) for z in NOISE
    },
}


def main() -> None:
    """Run every recipe and print what it gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train/ and test/, one sub-folder a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        settings = SimulateSettings(
            data=str(options.data),
            model="tiny-clip",
            bits=4,
            recipes=tuple(RECIPES.values()),
            seeds=options.seeds,
            clients=10,
            partition="iid",
            shots=None,
            rounds=1,
            out=Path(out),
            jobs=options.jobs,
            test_pictures=500,
        ).check()
        rows = simulate(settings)
    print(headline(settings).removeprefix(f"{options.data}: "), end="\n\n")
    print("| what leaves a device | epsilon at 1e-5 | global model, % |\n| --- | --- | --- |")
    for label, recipe in RECIPES.items():
        print(line(label, [row for row in rows if row["recipe"] == recipe]))


def line(label: str, rows: list[Row]) -> str:
    """Return a recipe's line of the table."""
    spent = [row["rounds"][-1]["epsilon"] for row in rows]
    epsilon = "" if None in spent else f"{mean(spent):.2f}"
    return f"| {label} | {epsilon} | {spread([100 * row['global_accuracy'] for row in rows])} |"


if __name__ == "__main__":
    main()
