"""What the coordinator makes of a round's updates: steps 4 to 6 of docs/method.md, in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from clip_lora.algebra import rank_of
from coordinator.aggregate import Choice, Contribution, aggregate, choose
from coordinator.judgement import Yardstick, defended
from coordinator.model import LocalModel, Model
from coordinator.on_demand import OnDemand, each
from coordinator.personal import Attention, at_rank, below, personalise
from coordinator.recipe import FederationRecipe
from coordinator.text_samples import TextLoss, TextSamples
from protocol.codec import decode_adapter, encode_adapter
from protocol.messages import Adapter, TextBank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Knowledge:
    """What a federation knows after a round: class bank, global adapter, text adapter, clients' own adapters.

    Adapters have the values that are stored (float16), so that a restarted coordinator computes the same bits. Clients' own
    ones are in memory one at a time: made, or read from the store, when they are asked for.
    """

    bank: TextBank
    adapter: Adapter
    text: Adapter | None = None
    own: Mapping[str, Adapter] = field(default_factory=dict)

    def start_of(self, client: str, rank: int) -> Adapter:
        """Return the adapter that a client of this rank starts its next round from."""
        return at_rank(self.own.get(client, self.adapter), rank)


@dataclass(frozen=True)
class Lesson:
    """How a round's learning went: None for what the recipe leaves out.

    `renewed` names whose own adapters are new, `clipped` whose updates were scaled down.
    """

    text: TextLoss | None
    attention: Attention | None
    class_accuracy: dict[str, float]
    renewed: tuple[str, ...] = ()
    choice: Choice | None = None
    clipped: tuple[str, ...] = ()


class Learner:
    """Turns contributions into knowledge by a recipe."""

    def __init__(self, bank: TextBank, recipe: FederationRecipe, seed: int, model: Model | None = None) -> None:
        """Make ready to learn; raises ModelError. `text_shapes` are those of the text adapter, None if it is not trained."""
        self._recipe = recipe
        self._model = LocalModel(bank.model) if model is None else model
        self.text_shapes = self._model.begin(bank, recipe.text, seed) if recipe.text.steps else None

    def learn(self, contributions: Mapping[str, Contribution], known: Knowledge) -> tuple[Knowledge, Lesson]:
        """Train the text side, average, personalise.

        What came late counts in the average alone: its features and prototypes are those of an adapter that is gone.
        """
        recipe = self._recipe
        everything, clipped = self._defended(contributions)
        contributions = {client: part for client, part in everything.items() if part.discount == 1.0}
        bank, text, loss = self._train_text(contributions, known)
        malicious = recipe.defence.malicious(len(everything))
        choice = choose(everything, recipe.aggregation, malicious)
        if choice.note:
            log.warning("%s", choice.note)
        chosen = {client: part for client, part in everything.items() if client not in choice.left_out}
        common = stored(aggregate(chosen, choice.method, recipe.rank, known.adapter, malicious))
        renewed: Mapping[str, Adapter] = {}
        attention = None
        if recipe.personal.query != "none":
            personal, attention = personalise(contributions, recipe, bank.embeddings, common)
            # Below the cut everybody has the global adapter, and that is new for the absent too.
            absent = self._cut(known.own, common) if recipe.personal.cut else {}
            renewed = _first_of(personal, absent)
        lesson = Lesson(loss, attention, class_accuracy(contributions, bank), tuple(sorted(renewed)), choice, clipped)
        return Knowledge(bank, common, text, _with(renewed, known.own)), lesson

    def align(self, contributions: Mapping[str, Contribution], known: Knowledge) -> tuple[Knowledge, Lesson]:
        """Train the text side alone, on features as the final global adapter sees them."""
        contributions, _ = self._defended(contributions)
        bank, text, loss = self._train_text(contributions, known)
        return replace(known, bank=bank, text=text), Lesson(loss, None, class_accuracy(contributions, bank))

    def close(self, contributions: Mapping[str, Contribution], known: Knowledge) -> tuple[Knowledge, Lesson]:
        """Take what the closing round's clients trained, or a query makes of it, as their own adapters; all else stays."""
        contributions, clipped = self._defended(contributions)
        trained = OnDemand(contributions, each(lambda client: contributions[client].update.adapter))
        own, attention = self._cut(trained, known.adapter), None
        if self._recipe.personal.query != "none" and self._recipe.personal.ex_query:
            personal, attention = personalise(contributions, self._recipe, known.bank.embeddings, known.adapter)
            own = _first_of(personal, own)
        lesson = Lesson(None, attention, class_accuracy(contributions, known.bank), tuple(own), None, clipped)
        return replace(known, own=_with(own, known.own)), lesson

    def _defended(self, contributions: Mapping[str, Contribution]) -> tuple[Mapping[str, Contribution], tuple[str, ...]]:
        """Return the contributions as they may count, and whose were scaled down."""
        counted, clipped = defended(contributions, self._recipe.defence, Yardstick.of(self._recipe))
        return counted, tuple(clipped)

    def _cut(self, own: Mapping[str, Adapter], common: Adapter) -> Mapping[str, Adapter]:
        """Return clients' adapters with the global one in the blocks below the cut (docs/method.md, step 1)."""
        cut = self._recipe.personal.cut

        def make(client: str) -> Adapter:
            adapter = own[client]
            return below(cut, at_rank(common, rank_of(adapter)), adapter) if cut else adapter

        return OnDemand(own, each(make))

    def _train_text(
        self, contributions: Mapping[str, Contribution], known: Knowledge
    ) -> tuple[TextBank, Adapter | None, TextLoss | None]:
        if self.text_shapes is None:
            return known.bank, known.text, None
        samples = TextSamples.gather(contributions, self._recipe.text)
        if not len(samples):
            return known.bank, known.text, None
        start = known.text if self._recipe.text.continued else None
        return self._model.teach(samples, start, known.bank.version + 1)


NO_LESSON = Lesson(None, None, {})


def stored(adapter: Adapter) -> Adapter:
    """Return the adapter as it comes back from disk or wire."""
    return decode_adapter(encode_adapter(adapter))


def _first_of(one: Mapping[str, Adapter], other: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """Return the union of clients' adapters; where both have a client's, that of `one`."""
    return OnDemand({*one, *other}, each(lambda client: one[client] if client in one else other[client]))


def _with(renewed: Mapping[str, Adapter], old: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """Return clients' own adapters after a round: the renewed ones as they are stored, the others as they were."""
    return _first_of(OnDemand(renewed, each(lambda client: stored(renewed[client]))), old)


def class_accuracy(contributions: Mapping[str, Contribution], bank: TextBank) -> dict[str, float]:
    """Return by class the share of the clients' own pictures that they predicted correctly, after training.

    Of classes that have a prototype, and of clients that tell: under `privacy` none does.
    """
    seen, correct = np.zeros(len(bank.classes), np.int64), np.zeros(len(bank.classes), np.int64)
    for contribution in contributions.values():
        update = contribution.update
        if not len(update.prototype_correct):
            continue
        np.add.at(seen, update.prototype_classes, update.prototype_counts)
        np.add.at(correct, update.prototype_classes, update.prototype_correct)
    return {name: float(correct[c] / seen[c]) for c, name in enumerate(bank.classes) if seen[c]}
