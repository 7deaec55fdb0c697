"""The device's loop against a real coordinator's end, over the bus in memory, with real training."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_client.errors import DataError
from edge_client.participate import participate
from edge_client.participation import Participation
from edge_client.train import TrainingStopped
from protocol.bus import MemoryBroker
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import ClientSeen, OfferMade, PlanReady, UpdateArrived
from protocol.link import Link
from protocol.messages import Status, Verdict


class Lab:
    """A coordinator's end with one plan published, and one client's loop in a thread."""

    def __init__(self, ready, link_type=Link):
        broker = MemoryBroker()
        self.end = CoordinatorEnd("lab", random.Random(0))
        self.link = Link(broker.connect(), self.end)
        self.link.poll(1.0)
        bank, actions = self.end.publish_bank(ready.bank)
        self.plan = ready.plan.model_copy(update={"classes": bank.sha256, "adapter": self.end.serve_adapter(ready.adapter)})
        self.link.do([*actions, *self.end.publish_plan(self.plan)])
        self.client_end = ClientEnd("lab", "ann", random.Random(1))
        self.client_link = link_type(broker.connect(self.client_end.will()), self.client_end)
        self.stop = threading.Event()
        self.statuses: list[Status] = []
        self.updates: list[UpdateArrived] = []

    def run(self, trainer, leave_when="never"):
        """Accept every update until the client's loop has ended; it is told to leave when it announces `leave_when`."""
        part = Participation(Status(state="online"))
        with ThreadPoolExecutor(1) as pool:
            loop = pool.submit(participate, self.client_link, self.client_end, trainer, part, self.stop)
            give_up = time.monotonic() + 60.0
            try:
                while not loop.done():
                    assert time.monotonic() < give_up, "the client's loop did not end within 60 s"
                    self._serve(leave_when)
            finally:
                self.stop.set()
                self.client_link.wake()
            self._serve(leave_when)
            return loop.exception()

    def _serve(self, leave_when):
        for event in self.link.poll(0.05):
            if isinstance(event, ClientSeen):
                self.statuses.append(event.status)
                if event.status.detail == leave_when:
                    self.stop.set()
                    self.client_link.wake()
            elif isinstance(event, OfferMade):
                self.end.fetch(event.client, event.offer)
            elif isinstance(event, UpdateArrived):
                self.updates.append(event)
                self.link.do(self.end.answer(event.client, event.offer, Verdict(accepted=True)))

    def phases(self):
        """The phases that were announced, repetitions dropped."""
        phases = [status.phase for status in self.statuses]
        return [phase for number, phase in enumerate(phases) if number == 0 or phases[number - 1] != phase]


def test_a_round_is_trained_uploaded_answered_and_the_client_leaves_in_good_order(make_ready, make_trainer, bank):
    lab = Lab(make_ready(bank))
    assert lab.run(make_trainer(), leave_when="update accepted") is None
    assert [event.client for event in lab.updates] == ["ann"]
    assert lab.updates[0].offer.base == lab.plan.adapter.sha256
    assert lab.updates[0].offer.samples == 24
    assert lab.phases() == ["waiting", "training", "uploading", "waiting", "stopped"]
    assert lab.statuses[-1].state == "offline"


def test_a_failed_training_is_announced_with_its_reason_and_raised(make_ready, make_trainer, bank, tmp_path):
    lab = Lab(make_ready(bank))
    problem = lab.run(make_trainer(source=str(tmp_path / "absent")))
    assert isinstance(problem, DataError)
    failed = [status for status in lab.statuses if status.phase == "failed"]
    assert [(status.round, status.detail) for status in failed] == [(1, "its pictures cannot be used: see its log")]
    assert str(tmp_path) in str(problem)  # told here, and to nobody else
    assert (lab.statuses[-1].state, lab.statuses[-1].phase) == ("offline", "stopped")


class EndsItsTrainingFirst(Link):
    """Once a plan is ready it asks to stop and comes back only when the training has ended, as an unlucky SIGTERM does."""

    def __init__(self, bus, end):
        super().__init__(bus, end)
        self.stop: threading.Event | None = None
        self.awake = threading.Event()
        self.planned = False

    def poll(self, timeout):
        if self.planned:
            self.stop.set()
            assert self.awake.wait(60.0), "the training did not end"
            return []
        events = super().poll(timeout)
        self.planned = any(isinstance(event, PlanReady) for event in events)
        return events

    def wake(self):
        self.awake.set()
        super().wake()


def test_a_stop_that_ends_the_training_before_the_loop_looks_is_no_failure(make_ready, make_trainer, bank, recipe):
    endless = recipe.model_copy(update={"local_steps": 1_000_000})
    lab = Lab(make_ready(bank, endless), EndsItsTrainingFirst)
    lab.client_link.stop = lab.stop
    problem = lab.run(make_trainer())
    assert not isinstance(problem, TrainingStopped)
    assert "failed" not in lab.phases()
    assert problem is None


class Diverging:
    """A real trainer whose first result is spoilt as a diverged training spoils it."""

    def __init__(self, trainer):
        self._trainer = trainer

    def run(self, ready, stopped):
        result = self._trainer.run(ready, stopped)
        broken = {name: np.full_like(array, np.nan) for name, array in result.update.adapter.items()}
        return dataclasses.replace(result, update=dataclasses.replace(result.update, adapter=broken))


def test_a_diverged_training_is_announced_and_the_client_stays(make_ready, make_trainer, bank, recipe):
    lab = Lab(make_ready(bank, recipe))
    reason = "not finite"
    trainer = Diverging(make_trainer())
    with ThreadPoolExecutor(1) as pool:
        part = Participation(Status(state="online"))
        loop = pool.submit(participate, lab.client_link, lab.client_end, trainer, part, lab.stop)
        give_up = time.monotonic() + 60.0
        while not any(status.phase == "failed" and reason in status.detail for status in lab.statuses):
            assert time.monotonic() < give_up, "no failure was announced within 60 s"
            lab._serve("never")
        assert not loop.done()
        lab.stop.set()
        lab.client_link.wake()
        assert loop.exception(30.0) is None
    assert not lab.updates
