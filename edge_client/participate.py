"""THE LOOP of a device: await a plan, train, upload, again."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from edge_client.participation import Announce, Participation, Send, Step, Train, Withdraw
from edge_client.train import Trainer, TrainingStopped
from protocol.client_end import ClientEnd
from protocol.errors import WireError
from protocol.events import ClientEvent
from protocol.link import Link
from protocol.messages import TrainingResult

log = logging.getLogger(__name__)

POLL_S = 1.0


def participate(
    link: Link[ClientEvent], end: ClientEnd, trainer: Trainer, client: Participation, stop: threading.Event
) -> None:
    """Take part until `stop` is set. The training runs beside the loop, so that the link stays alive.

    Raises what the training raised, after everybody has been told.
    """
    training: Future[TrainingResult] | None = None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="training") as pool:
        try:
            while not stop.is_set():
                steps: list[Step] = []
                for event in link.poll(POLL_S):
                    log.debug("%s", event)
                    steps += client.on(event)
                if training is not None and training.done():
                    problem = training.exception()
                    if isinstance(problem, TrainingStopped):
                        break
                    if problem is not None:
                        carry_out(client.failed(str(problem)), client, link, end)
                        raise problem
                    steps += client.trained(training.result())
                    training = None
                for step in steps:
                    if isinstance(step, Train):
                        training = pool.submit(trainer.run, step.ready, stop.is_set)
                        training.add_done_callback(lambda _: link.wake())
                carry_out(steps, client, link, end)
        finally:
            stop.set()
            link.bus.close(end.farewell())


def carry_out(steps: list[Step], client: Participation, link: Link[ClientEvent], end: ClientEnd) -> None:
    """Do what concerns the wire."""
    for step in steps:
        match step:
            case Send(result=result):
                log.info("round %d: loss %.3f, accuracy %.3f, offering", result.round, result.loss, result.accuracy)
                try:
                    link.do(end.offer(result))
                except WireError as error:  # diverged: this round goes on without us, the next may do better
                    log.error("round %d: nothing to offer: %s", result.round, error)  # noqa: TRY400 - no bug, no traceback
                    carry_out(client.failed(str(error)), client, link, end)
                    return
            case Withdraw():
                end.withdraw()
            case Announce(status=status):
                log.info("%s %s", status.phase, status.detail)
                link.do(end.announce(status))
            case Train():
                pass
