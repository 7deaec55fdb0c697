"""What a round is for, and its plan: who starts from what, what is expected of updates, and of late ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from clip_lora.shapes import Shapes, Sizes, adapter_shapes
from coordinator.aggregate import Contribution
from coordinator.checks import Expectation, Late, Start
from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError
from coordinator.learning import Knowledge, Learner, Lesson
from coordinator.on_demand import OnDemand, each
from coordinator.records import Identity
from coordinator.state.store import Store
from protocol.bus import Action
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import COORDINATOR, MAX_MANIFEST, Envelope, encode
from protocol.errors import WireError
from protocol.messages import Recipe, RoundPlan, Status, TextBank


@dataclass(frozen=True)
class Phase:
    """What a round is for: what clients do, whether each starts from its own adapter, what is learned from their updates."""

    recipe: Recipe
    from_own: bool
    learn: Callable[[Mapping[str, Contribution], Knowledge], tuple[Knowledge, Lesson]]


class Planner:
    """Makes the plans of one federation. `run` and `start` name the run and the coordinator's start in it."""

    def __init__(self, config: CoordinatorConfig, sizes: Sizes, learner: Learner, end: CoordinatorEnd, store: Store) -> None:
        self.run, self.start = "", 0
        self.training = config.recipe.training(sizes.vision.blocks)
        self.last = config.rounds + config.recipe.rounds_after
        self._config = config
        self._sizes = sizes
        self._learner = learner
        self._end = end
        self._store = store

    def phase(self, number: int) -> Phase:
        """Return what a round is for: training, or after `rounds` of it the recipe's aligning and closing rounds."""
        training, recipe, personal = self.training, self._config.recipe, self._config.recipe.personal
        personalised = personal.query != "none"
        if number <= self._config.rounds:
            return Phase(training, personalised and personal.start == "own", self._learner.learn)
        # What was trained for an earlier round is of no use to the last ones.
        if recipe.aligns and number == self._config.rounds + 1:
            return Phase(training.model_copy(update={"local_steps": 0, "late_rounds": 0}), False, self._learner.align)
        changed = {"local_steps": personal.closing_steps, "features_per_class": 0, "late_rounds": 0}
        return Phase(training.model_copy(update=changed), personalised, self._learner.close)

    def identity(self, bank: TextBank) -> Identity:
        """Return what must stay the same from the first round to the last."""
        return Identity(
            federation=self._config.federation,
            model_digest=bank.model_digest,
            classes=bank.classes,
            rank=self.training.rank,
            alpha=self.training.alpha,
            projections=self.training.projections,
            first_block=self.training.first_block,
        )

    def shapes(self) -> Shapes:
        """Return the shapes of the global adapter."""
        return adapter_shapes(self._sizes, "vision", self.training)

    def rank(self, status: Status) -> int:
        """Return the rank that a client trains: factors can be averaged at one rank only, products at any."""
        limit, rank = status.max_rank, self.training.rank
        return min(rank, limit) if limit is not None and self._config.recipe.mixes_ranks else rank

    def suits(self, ranks: Mapping[str, int]) -> bool:
        """Whether a round may go on with these participants at these ranks."""
        return self._averages(ranks) and len(ranks) <= self._config.clients_per_round

    def _averages(self, ranks: Mapping[str, int]) -> bool:
        """Whether the recipe can average adapters of these ranks; the aggregation may have been changed since the draw."""
        return self._config.recipe.mixes_ranks or set(ranks.values()) <= {self.training.rank}

    def plan(self, number: int, known: Knowledge, ranks: Mapping[str, int]) -> tuple[Expectation, list[Action]]:
        """Serve class bank and adapters; return the plan, and what to say before it.

        Without participants it says that the federation is finished.
        """
        bank, actions = self._end.publish_bank(known.bank)
        common = self._end.serve_adapter(known.adapter)
        phase = self.phase(min(number, self.last))
        individual, starts, said = self._starts(number, phase.from_own, known, ranks, common.sha256)
        plan = RoundPlan.model_validate(
            {
                "run": self.run,
                "start": self.start,
                "round": number,
                "state": "open" if ranks else "finished",
                "classes": bank.sha256,
                "adapter": common,
                "individual": individual,
                "participants": tuple(ranks),
                "recipe": phase.recipe,
                "seed": self._config.seed,
                "deadline_s": self._config.deadline_s,
                "seal_to": self._end.seal_to,
            }
        )
        return Expectation(plan, starts, known.bank.embeddings.shape[1], len(known.bank.classes)), [*actions, *said]

    def late(self, number: int, expected: Expectation, known: Knowledge) -> dict[int, Late]:
        """Return what updates of earlier rounds are held to that may still come in this one."""
        late: dict[int, Late] = {}
        frozen = known.adapter if self.training.freeze_a else None
        for earlier in self._store.earlier(number, expected.plan.recipe.late_rounds):
            if not self._averages(earlier.ranks):
                continue
            shapes = self._shapes(earlier.ranks)
            starts = {client: Start(earlier.bases[client], shapes[rank], frozen) for client, rank in earlier.ranks.items()}
            discount = self._config.recipe.late_discount ** (number - earlier.plan.round)
            then = replace(expected, plan=earlier.plan, starts=starts)
            late[earlier.plan.round] = Late(then, earlier.counted, discount)
        return late

    def _shapes(self, ranks: Mapping[str, int]) -> dict[int, Shapes]:
        """Return the factors' shapes at each rank."""
        return {r: adapter_shapes(self._sizes, "vision", self.training.at_rank(r)) for r in set(ranks.values())}

    def _starts(
        self, number: int, from_own: bool, known: Knowledge, ranks: Mapping[str, int], common: str
    ) -> tuple[bool, dict[str, Start], list[Action]]:
        """Decide what each participant starts from, and how it is announced where it is not the global adapter for all."""
        shapes = self._shapes(ranks)
        if not from_own and set(ranks.values()) <= {self.training.rank}:
            frozen = known.adapter if self.training.freeze_a else None
            return False, {client: Start(common, shapes[rank], frozen) for client, rank in ranks.items()}, []
        if not from_own:
            known = replace(known, own={})
        starting = OnDemand(ranks, each(lambda client: known.start_of(client, ranks[client])))
        with self._store.models.intact():
            own = self._end.serve_client_adapters(self.run, number, starting)
        starts = {
            client: Start(own[client].adapter.sha256, shapes[rank], starting[client] if self.training.freeze_a else None)
            for client, rank in ranks.items()
        }
        return True, starts, self._end.publish_client_adapters(own)


def check_size(federation: str, plan: RoundPlan) -> None:
    """Raise FederationError if a plan is too long to travel: it names all its participants."""
    try:
        encode(Envelope(federation, COORDINATOR, plan, sequence=2**53))
    except WireError as error:
        names = sum(len(name) + 3 for name in plan.participants)
        room = MAX_MANIFEST - (len(plan.model_dump_json()) - names) - 512
        raise FederationError(
            f"the plan of round {plan.round} is too long with {len(plan.participants)} participants: set clients_per_round "
            f"to at most {max(1, room * len(plan.participants) // names)}, or give clients shorter ids"
        ) from error


def same(old: RoundPlan, new: RoundPlan) -> bool:
    """Whether updates for the old plan are updates for the new one."""
    one, other = (
        plan.model_dump(exclude={"start": True, "deadline_s": True, "adapter": {"chunk_size"}}) for plan in (old, new)
    )
    return one == other
