"""What pip is told on which platform, from hardware_profiles/platforms; and the file that tells it to the install step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hardware_profiles.platform import Package, Platform, load, names

Use = Literal["train", "infer"]
# Who trains also answers, reports to Prometheus if asked to, and can take part in a plan with differential privacy.
EXTRAS: dict[Use, tuple[str, ...]] = {"train": ("client", "metrics", "privacy"), "infer": ()}
ANSWERS = "infer"
PACKAGES: dict[Use, tuple[Package, ...]] = {"train": ("torch", "bitsandbytes"), "infer": ()}
TO: dict[Use, str] = {"train": "to train", "infer": "to answer"}


@dataclass(frozen=True)
class Source:
    """Where a use's packages come from on a platform with a processor (empty: any).

    `own` are packages by the index that they must come from, `extras` clipcast's own, `require` what else pip is told.
    `refuse`: that use does not exist there, and the platform's advice says what to do.
    """

    platform: Platform
    soc: str
    extras: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    require: tuple[str, ...]
    refuse: bool

    def lines(self) -> list[str]:
        """Return this as the install step reads it."""
        l4t = self.platform.l4t
        since, below = (l4t.since or "-", l4t.below or "-") if l4t else ("-", "-")
        return [
            f"platform {self.platform.name} {since} {below} {self.soc or '-'}",
            *([f"advice {self.platform.advice}"] if self.platform.advice else []),
            *(["refuse"] if self.refuse else []),
            f"extras {','.join(self.extras)}",
            *(f"from {index} {' '.join(packages)}" for index, packages in self.own.items()),
            f"require {' '.join(self.require)}",
        ]


def sources(use: Use, answering: tuple[str, ...]) -> Iterator[Source]:
    """Yield the sources on every platform; `answering` is what clipcast's extra `infer` requires."""
    for platform in map(load, names()):
        for soc in sorted({soc for wheel in platform.wheels for soc in wheel.socs}) or [""]:
            yield source(platform, soc, use, answering)


def source(platform: Platform, soc: str, use: Use, answering: tuple[str, ...]) -> Source:
    """Return where a use's packages come from.

    onnxruntime-gpu, which must not lie beside onnxruntime, takes its place where a build is on record that runs; the
    extra `infer` names onnxruntime, so what else it requires is named instead of it.
    """
    runtime: Package = "onnxruntime-gpu" if _gpu_runtime(platform, soc) else "onnxruntime"
    own: dict[str, tuple[str, ...]] = {}
    require: list[str] = []
    for package in (*PACKAGES[use], runtime):
        wheel = next(
            (found for found in platform.sources(package, soc or None) if found.runs != "no" and found.requirement), None
        )
        if wheel is None:
            require.append(package)
        elif wheel.index:
            own[wheel.index] = (*own.get(wheel.index, ()), wheel.requirement)
            require += wheel.also
        else:
            require += [wheel.requirement, *wheel.also]
    rest = [requirement for requirement in answering if not requirement.startswith("onnxruntime")]
    extras = EXTRAS[use] if runtime == "onnxruntime-gpu" else (*EXTRAS[use], ANSWERS)
    added = rest if runtime == "onnxruntime-gpu" else []
    return Source(platform, soc, extras, own, tuple(require + added), refuse=use == "train" and not platform.client)


def _gpu_runtime(platform: Platform, soc: str) -> bool:
    best = platform.sources("onnxruntime-gpu", soc or None)[:1]
    return any(wheel.runs == "yes" and wheel.requirement for wheel in best)
