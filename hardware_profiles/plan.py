"""How much memory a training takes, by part, and which settings fit a device. Plain arithmetic, no torch.

What is counted is memory that cannot be given back: weights, gradients, what is kept for the way back, and what Python and
its libraries allocate. Pages of files that are mapped (libraries, a checkpoint while it is read) are not.
`benchmarks/memory.py` prints prediction beside measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from hardware_profiles.facts import ProfileError
from hardware_profiles.profile import Profile

Bits = Literal[4, 8, 32]
MIB = 1024 * 1024
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# NF4 with double quantisation: half a byte a weight, a byte for each block of 64, and 4 bytes for 256 of these.
BYTES_OF_BITS = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
# What is allocated before a model is loaded, by torch, transformers, peft and bitsandbytes.
# The GPU's also holds the CUDA context and its libraries, 0.5 to 1.5 GB by public reports: nothing of that was measured.
FRAMEWORK_MIB = {"cpu": 335, "cuda": 1200}
FEWER: dict[Bits, tuple[Bits, ...]] = {4: (4,), 8: (8, 4), 32: (32,)}  # to be tried where what is wanted does not fit
KEPT_MIB = 512.0  # at most this much of the pictures stays in memory
SYSTEM_MIB = 600  # of a device that runs nothing else and shows no desktop
SPARE = 0.1  # of a device's memory: pictures being decoded, the broker's connection, what prediction misses


@dataclass(frozen=True)
class TowerShape:
    """What an image tower's memory depends on."""

    blocks: int
    width: int
    hidden: int  # of the MLP
    patch: int
    side: int  # of the pictures
    projection: int

    @property
    def tokens(self) -> int:
        """Number of tokens of a picture: its patches and the class token."""
        return (self.side // self.patch) ** 2 + 1

    @property
    def quantisable(self) -> int:
        """Number of weights in the blocks' linear layers: what bitsandbytes quantises."""
        return self.blocks * (4 * self.width**2 + 2 * self.width * self.hidden)

    @property
    def others(self) -> int:
        """Number of weights that stay as they are: embeddings, norms, biases, the last projection."""
        embeddings = (3 * self.patch**2 + self.tokens + 1) * self.width
        of_block = 4 * self.width + self.hidden + self.width + 4 * self.width
        return embeddings + self.blocks * of_block + 4 * self.width + self.width * self.projection


# Of OpenAI's models, by name: known without a download.
KNOWN = {
    "openai/clip-vit-base-patch32": TowerShape(12, 768, 3072, 32, 224, 512),
    "openai/clip-vit-base-patch16": TowerShape(12, 768, 3072, 16, 224, 512),
    "openai/clip-vit-large-patch14": TowerShape(24, 1024, 4096, 14, 224, 768),
    "openai/clip-vit-large-patch14-336": TowerShape(24, 1024, 4096, 14, 336, 768),
}


@dataclass(frozen=True)
class Training:
    """What is trained, and how: a recipe's shape of the adapter, and the device's own choices."""

    rank: int
    projections: int
    first_block: int
    batch: int
    bits: Bits
    dtype: Literal["float32", "float16", "bfloat16"]
    device: Literal["cpu", "cuda"]
    checkpointing: bool = False
    pictures: int = 0


@dataclass(frozen=True)
class Memory:
    """MiB by part."""

    framework: float
    weights: float
    adapter: float
    gradients: float
    optimiser: float
    activations: float
    pictures: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return float(sum(asdict(self).values()))


def predict(shape: TowerShape, training: Training) -> Memory:
    """Return what a training takes at its peak."""
    value = BYTES[training.dtype]
    per_weight = BYTES_OF_BITS.get(training.bits, value)
    adapted = shape.blocks - training.first_block
    factors = adapted * training.projections * 2 * training.rank * shape.width
    return Memory(
        framework=FRAMEWORK_MIB[training.device],
        weights=(shape.quantisable * per_weight + shape.others * value) / MIB,
        adapter=4 * factors / MIB,
        gradients=4 * factors / MIB,
        optimiser=8 * factors / MIB,
        activations=_activations(shape, training) / MIB,
        pictures=min(training.pictures * _picture(shape, training) / MIB, KEPT_MIB),
    )


def _picture(shape: TowerShape, training: Training) -> int:
    """Return bytes of a picture as it is kept: its pixels, or what enters the first adapted block, in float32."""
    return 4 * shape.tokens * shape.width if training.first_block else 3 * shape.side**2


def _activations(shape: TowerShape, training: Training) -> float:
    """Return bytes: what each adapted block keeps for the way back, and what the one under way needs besides.

    For each token a block keeps eight times its width and twice its MLP's: the input, its two norms' outputs or inputs,
    queries, keys, values, the attention's output twice (once in another order) and, of the MLP, what enters the activation
    and its sigmoid. LoRA's factors are float32: half precision is cast for each adapted projection. An 8-bit layer keeps
    its input in float16. Of the last block only keys and values count for all tokens.
    """
    value, tokens = BYTES[training.dtype], shape.tokens * training.batch
    casts = 0 if value == 4 else 4 * training.projections * shape.width
    of_8_bits = 2 * (5 * shape.width + shape.hidden) if training.bits == 8 else 0
    whole = value * (8 * shape.width + 2 * shape.hidden) + casts + of_8_bits
    last = value * 4 * shape.width + casts
    blocks = shape.blocks - training.first_block - 1
    if training.checkpointing:  # one block's, and the others' inputs
        kept = blocks * value * shape.width + max(last, whole if blocks else 0)
    else:
        kept = blocks * whole + last
    return tokens * (kept + 3 * value * shape.hidden)


def fit(shape: TowerShape, wanted: Training, budget_mib: float) -> Training | None:
    """Return the nearest to what is wanted that fits, or None.

    The batch is kept as long as anything else helps: blocks computed again cost time, 4 bits instead of 8 some accuracy, a
    smaller batch other gradients.
    """
    tried = smaller(wanted, FEWER[wanted.bits])
    return next((training for training in tried if predict(shape, training).total <= budget_mib), None)


def smaller(wanted: Training, bits: tuple[Bits, ...]) -> Iterator[Training]:
    """Yield what is wanted, and then what takes less and less of a device, in the order in which it is to be tried."""
    batch = wanted.batch
    while batch >= 1:
        for few in bits:
            for checkpointing in dict.fromkeys((wanted.checkpointing, True)):
                yield replace(wanted, batch=batch, bits=few, checkpointing=checkpointing)
        batch //= 2


@dataclass(frozen=True)
class Plan:
    """What fits a device, what it takes, and what there is for it, in MiB. `saved` is what quantising saves of float16."""

    training: Training
    memory: Memory
    budget: float
    saved: float


def plan(profile: Profile, shape: TowerShape, wanted: Training, memory_mib: int | None = None) -> Plan:
    """Choose bits, batch and checkpointing for a device of `memory_mib` (default: the least that the profile's have).

    Raises ProfileError, with what to do instead, if the device cannot train or nothing fits.
    """
    profile.check_trains()
    memory = memory_mib or profile.identity.mem_total_mib[0]
    if not memory:
        raise ProfileError(f"profile {profile.name} is of any size: say how much memory there is, with --memory MiB")
    budget = memory * (1 - SPARE) - SYSTEM_MIB
    training = fit(shape, wanted, budget)
    if training is None:
        least = predict(shape, replace(wanted, batch=1, bits=FEWER[wanted.bits][-1], checkpointing=True))
        raise ProfileError(
            f"it does not fit: with a batch of 1 training takes {least.total:.0f} MiB, of which the weights "
            f"{least.weights:.0f}; {profile.title} has {budget:.0f} of {memory} left for it. Take a smaller model, or adapt "
            f"the last blocks only (`first_block` in the recipe)"
        )
    found = predict(shape, training)
    plain = predict(shape, replace(training, bits=32, dtype="float16")).weights
    return Plan(training, found, budget, plain - found.weights)
