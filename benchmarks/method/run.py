"""The evidence for the method: what each part is worth, on real photographs. `make bench-method` runs it all.

Writes results.json (every run) and results.md (the tables) beside this file after each block of runs, so that a long run
can be read, or stopped, half way; blocks and rows that are not run again stay as they were. `--quick` runs one seed of the
first block only, and writes quick.json and quick.md.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from clipcast.simulate.report import markdown, spread
from clipcast.simulate.settings import SimulateSettings, parse_shots
from clipcast.simulate.story import headline, simulate

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data" / "cifar10"
# The image side is adapted in the last two of tiny-clip's six blocks in all recipes but feddtl: the others' output is kept.
COMMON = "+first_block=-2"
# A client has one or two pictures of a class in some of the settings. They are public, and the clients virtual.
ALL_PROTOTYPES = "+min_prototype_count=1"
CLOSING = "+personal.closing_steps=20"
LADDER = {
    "zero-shot": "zero-shot",
    "local-only": "local",
    "fedlora": "fedlora",
    "+ server text training": "fedalign+mu=0+personal.query=none+personal.closing_steps=0",
    "+ query aggregation": "fedalign+mu=0",
    "+ L_orth (= fedalign)": "fedalign",
    "feddtl": "feddtl",
}
ENDS = {
    "R1 (default)": "fedalign",
    "R2": "fedalign+personal.query=R2",
    "R3": "fedalign+personal.query=R3",
    "tau_q = inf": "fedalign+personal.tau_q=inf",
    "identity": "fedalign+personal.query=identity",
}
BITS = {"fedlora": "fedlora", "fedalign": "fedalign"}


@dataclass(frozen=True)
class Block:
    """One table: recipes that are compared under the same conditions."""

    title: str
    recipes: dict[str, str]
    partition: str
    shots: str
    bits: Literal[4, 8, 32] = 4
    seeds: int | None = None  # default: --seeds
    training_rounds: int | None = None

    @property
    def specs(self) -> dict[str, str]:
        """Label -> recipe. Few pictures want few steps a round, or every client learns its own by heart."""
        if self.shots == "all":
            training, own, text = "+local_steps=12", CLOSING, "+features_per_class=200+text.steps=100"
        else:
            training, own, text = "+local_steps=4", "", ""
        settings = {
            "zero-shot": COMMON,
            "local": COMMON + training + own,
            "fedlora": COMMON + training,
            "fedalign": COMMON + training + text + own,
            "feddtl": training + text,  # adapts the last three blocks, by its preset
        }
        specs = {}
        for label, recipe in self.recipes.items():
            name, plus, overrides = recipe.partition("+")
            specs[label] = name + ALL_PROTOTYPES + settings[name] + plus + overrides  # what comes last wins
        return specs

    @property
    def rounds(self) -> int:
        """Number of rounds, closing round aside."""
        if self.training_rounds is not None:
            return self.training_rounds
        return 2 if self.shots == "all" else 3


MORE_STEPS = {"fedlora, 15 local steps": "fedlora+local_steps=15", "fedalign, 15 local steps": "fedalign+local_steps=15"}
# Differences of tenths of a point need more seeds than the rest.
QUANTISED = tuple(
    Block(f"{bits}-bit base, disjoint classes, 16 pictures a class", BITS, "disjoint", "16", bits, 10) for bits in (32, 8, 4)
)
# The ladder's few rounds and steps are what serves fedalign: what do they cost the baseline?
LONGER = (
    Block("Eight rounds, disjoint classes, all pictures", BITS, "disjoint", "all", training_rounds=8),
    Block("More local steps, disjoint classes, 16 pictures a class", MORE_STEPS, "disjoint", "16"),
)
BLOCKS = (
    Block("Disjoint classes, 16 pictures a class", LADDER, "disjoint", "16"),
    Block("Disjoint classes, all pictures", LADDER, "disjoint", "all"),
    *QUANTISED,
    Block("Readings of the query, disjoint classes, 16 pictures a class", ENDS, "disjoint", "16"),
    Block("Dirichlet(0.1), 16 pictures a class", LADDER, "dirichlet:0.1", "16"),
    Block("Dirichlet(0.1), all pictures", LADDER, "dirichlet:0.1", "all"),
    Block("IID, 16 pictures a class", LADDER, "iid", "16"),
    Block("IID, all pictures", LADDER, "iid", "all"),
    Block("Readings of the query, Dirichlet(0.1), 16 pictures a class", ENDS, "dirichlet:0.1", "16"),
    *LONGER,
)


def main() -> None:
    """Run the blocks and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of the first block")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train/ and test/, one sub-folder a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-pictures", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--blocks", help="numbers of the blocks to run, from 0, separated by commas; default: all")
    parser.add_argument("--rows", help="labels of the rows to run, separated by commas; default: all")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    wanted = range(len(BLOCKS)) if options.blocks is None else [int(number) for number in options.blocks.split(",")]
    path = options.out / ("quick.json" if options.quick else "results.json")
    results = {} if options.quick or not path.exists() else json.loads(path.read_text())
    for block in [BLOCKS[0]] if options.quick else [BLOCKS[number] for number in wanted]:
        results[block.title] = measure(block, options, results.get(block.title, {}).get("runs", []))
        results = {block.title: results[block.title] for block in BLOCKS if block.title in results}
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """Return the summary and all tables as Markdown."""
    parts = ["# What each part of the method is worth\n"]
    ladders = [block for block in BLOCKS if block.recipes is LADDER and block.title in results]
    for key, what in (
        ("global_accuracy", "The global model, all classes"),
        ("personal_accuracy", "Own models, own classes"),
    ):
        heads = [what, *(f"{block.partition}, {block.shots}" for block in ladders)]
        lines = [heads, ["---"] * len(heads)]
        for label in LADDER:
            runs = [[run for run in results[block.title]["runs"] if run["label"] == label] for block in ladders]
            lines.append([label, *(spread([100 * run[key] for run in of_block]) if of_block else "" for of_block in runs)])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    parts += [bits_table(results)]
    parts += [f"## {title}\n\n{found['about']}\n\n{found['table']}" for title, found in results.items()]
    return "\n".join(parts)


def bits_table(results: dict[str, Any]) -> str:
    """Return each quantised base's difference to the 32-bit one in points: mean over the seeds ± standard error."""
    found = {block.bits: results[block.title]["runs"] for block in QUANTISED if block.title in results}
    if 32 not in found:
        return ""
    lines = [["Minus the 32-bit base, points", "seeds", "global", "own models, own classes"], ["---"] * 4]
    for bits in sorted(found.keys() - {32}):
        for recipe in BITS:
            one, other = ({run["seed"]: run for run in found[width] if run["label"] == recipe} for width in (bits, 32))
            seeds = sorted(one.keys() & other.keys())
            line = [f"{recipe}, {bits}-bit", str(len(seeds))]
            for key in ("global_accuracy", "personal_accuracy"):
                gaps = [100 * (one[seed][key] - other[seed][key]) for seed in seeds]
                line.append(f"{mean(gaps):+.2f} ± {stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else "")
            lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def measure(block: Block, options: argparse.Namespace, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """Run a block: what was run where, the table, and every run without its rounds."""
    chosen = options.rows.split(",") if options.rows else list(block.specs)
    specs = {label: block.specs[label] for label in chosen}
    settings = SimulateSettings(
        data=str(options.data),
        model="tiny-clip",
        bits=block.bits,
        recipes=tuple(specs.values()),
        seeds=1 if options.quick else block.seeds or options.seeds,
        clients=10,
        partition=block.partition,
        shots=parse_shots(block.shots),
        rounds=block.rounds,
        out=options.out / "last",
        jobs=options.jobs,
        test_pictures=options.test_pictures,
    ).check()
    label = {spec: name for name, spec in specs.items()}
    rows = [{"label": label[row["recipe"]], **row} for row in simulate(settings)]
    rows += [row for row in earlier if row["label"] not in chosen]
    rows.sort(key=lambda row: list(block.specs).index(row["label"]))
    about = headline(settings).removeprefix(str(options.data)).removeprefix(": ")
    return {
        "about": f"{options.data.name}: {about}",
        "table": markdown([{**row, "recipe": row["label"]} for row in rows]),
        "runs": [{key: value for key, value in row.items() if key != "rounds"} for row in rows],
    }


if __name__ == "__main__":
    main()
