"""Training waits behind others, and the loop that speaks to the broker does not."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from edge_client.participate import participate
from edge_client.participation import Participation
from edge_client.priority import NICE, give_way
from edge_client.train import TrainingStopped
from protocol.messages import Status
from tests.edge_client.test_participate import Lab

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_training_waits_behind_the_loop_of_its_own_process(make_ready, bank):
    seen = {}

    class Observer:
        def run(self, ready, stopped):
            seen["training"], seen["its threads"] = niceness(), in_a_thread(niceness)
            raise TrainingStopped

    class Watched(Participation):
        def on(self, event):
            seen["loop"] = niceness()
            return super().on(event)

    before = niceness()
    lab = Lab(make_ready(bank))
    part = Watched(Status(state="online"))
    loop = threading.Thread(target=participate, args=(lab.client_link, lab.client_end, Observer(), part, lab.stop))
    loop.start()
    while loop.is_alive():
        lab._serve("never")
    loop.join()
    assert seen == {"training": max(before, NICE), "its threads": max(before, NICE), "loop": before}
    assert niceness() == before


def test_who_is_behind_already_stays_there():
    def twice():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        give_way()
        return niceness()

    assert in_a_thread(twice) == 15
