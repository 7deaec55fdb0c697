"""THE LOOP of a device: await a plan, train, upload, again."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from edge_client.errors import DataError, PlanRefusedError, ShutOutError
from edge_client.monitor.guard import Guard
from edge_client.outbox import Outbox
from edge_client.participation import Announce, Leave, Participation, Send, Step, Train, Withdraw
from edge_client.priority import give_way
from edge_client.train import TrainingStopped
from edge_client.trainer import Trainer
from edge_client.work import Work
from protocol.client_end import ClientEnd
from protocol.errors import WireError
from protocol.events import ClientEvent, LinkChanged, Noticed
from protocol.link import Link
from protocol.messages import Offer, TrainingResult

log = logging.getLogger(__name__)

POLL_S = 1.0


def participate(
    link: Link[ClientEvent],
    end: ClientEnd,
    trainer: Trainer,
    client: Participation,
    stop: threading.Event,
    outbox: Outbox | None = None,
    guard: Guard | None = None,
) -> None:
    """Take part until `stop` is set.

    The training runs beside the loop and behind it, so that the link stays alive; `guard` may hold it. Raises what the
    training raised, after everybody has been told.
    """
    training: Future[TrainingResult] | None = None
    stopped = stop.is_set if guard is None else partial(guard.hold, stop)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="training", initializer=give_way) as pool:
        try:
            while not stop.is_set():
                steps: list[Step] = []
                for event in link.poll(POLL_S):
                    tell(event)
                    steps += client.on(event)
                if training is not None and training.done():
                    problem = training.exception()
                    if isinstance(problem, TrainingStopped):
                        break
                    if problem is not None and not isinstance(problem, PlanRefusedError):
                        carry_out(client.failed(public(problem)), link, end, guard=guard)
                        raise problem
                    steps += finished(client, end, training)
                    training = None
                if training is not None and guard is not None:
                    steps += client.held(guard.reason)
                for step in steps:
                    if isinstance(step, Train):
                        training = pool.submit(trainer.run, step.ready, stopped)
                        training.add_done_callback(lambda _: link.wake())
                carry_out(steps, link, end, outbox, guard)
        finally:
            stop.set()
            link.bus.close(end.farewell())


def public(problem: BaseException) -> str:
    """Return what others may know of a failure: not what folders and pictures are called here."""
    if isinstance(problem, DataError | OSError):
        return "its pictures cannot be used: see its log"
    return str(problem)


def tell(event: ClientEvent) -> None:
    """Tell the operator what matters."""
    match event:
        case LinkChanged(up=False, reason=reason):
            log.warning("lost the broker (%s), connecting again", reason)
        case Noticed(notice=notice):
            log.warning("the coordinator says: %s (%s)", notice.detail, notice.reason)
        case _:
            log.debug("%s", event)


def finished(client: Participation, end: ClientEnd, training: Future[TrainingResult]) -> list[Step]:
    """Return what follows from a training that is done; raises what it raised, but for PlanRefusedError.

    One that diverged, or that the device refused, is told; the client stays.
    """
    plan = client.training
    assert plan is not None
    try:
        return client.trained(end.pack(training.result(), plan))
    except (WireError, PlanRefusedError) as error:
        log.error("nothing to offer: %s", error)  # noqa: TRY400 - no bug, no traceback
        return client.missed(str(error))


def carry_out(
    steps: list[Step], link: Link[ClientEvent], end: ClientEnd, outbox: Outbox | None = None, guard: Guard | None = None
) -> None:
    """Do what concerns the wire and the disk."""
    for step in steps:
        match step:
            case Send(work=work):
                offer = work.parcel.offer
                log.info("round %d: offering, %s", offer.round, _told(offer))
                if outbox is not None:
                    _keep(outbox, work)
                link.do(end.offer(work.parcel))
            case Withdraw():
                end.withdraw()
            case Announce(status=status):
                log.info("%s %s", status.phase, status.detail)
                link.do(end.announce(status if guard is None else status.model_copy(update={"board": guard.board()})))
            case Leave(problem=problem):
                raise ShutOutError(problem)
            case Train():
                pass


def _told(offer: Offer) -> str:
    if offer.loss is None or offer.accuracy is None:
        return f"epsilon {offer.epsilon or 0.0:.3f} so far"
    return f"loss {offer.loss:.3f}, accuracy {offer.accuracy:.3f}"


def _keep(outbox: Outbox, work: Work) -> None:
    try:
        outbox.keep(work)
    except OSError as error:  # it can be offered all the same; a restart would train it again, to the same bits
        log.error("the update is in memory only: %s. Make room in the state folder", error)  # noqa: TRY400
