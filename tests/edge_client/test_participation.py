"""A client's part as a state machine, through every order of events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.participation import Announce, Participation, Send, Train, Withdraw
from protocol.codec import reference
from protocol.events import Answered, Finished, LinkChanged, NotDrawn, PlanReady, Unreadable
from protocol.messages import Receipt, Recipe, RoundPlan, Status, TextBank, TrainingResult, Update
from protocol.transfer.parcel import pack

BANK = TextBank(1, ("cat", "dog"), ("a {}",), np.eye(2, 4, dtype=np.float32), 14.0, "tiny-clip", "d" * 64)
NONE = np.zeros(0, np.int32)
NOTHING = Update({}, np.zeros((0, 4)), NONE, NONE, NONE, np.zeros((0, 4)), NONE)


def ready(number, base=None, own=None, **fields):
    plan = RoundPlan(
        run="0123456789abcdef",
        start=1,
        round=number,
        state="open",
        classes="c" * 64,
        adapter=reference(base or b"adapter %d" % number),
        participants=("ann", "bob"),
        recipe=Recipe(),
        seed=0,
        deadline_s=60.0,
    )
    start = plan.adapter if own is None else reference(own)
    return PlanReady(plan.model_copy(update={"individual": own is not None, **fields}), BANK, {}, start.sha256)


def not_drawn(number):
    return NotDrawn(ready(number).plan.model_copy(update={"participants": ("bob",)}))


def finished(number):
    return Finished(ready(number).plan.model_copy(update={"state": "finished", "participants": ()}))


def result_of(event):
    return pack(TrainingResult(event.plan.round, event.base, NOTHING, 10, 0.5, 0.5, 1.0))


def answered(event, accepted=True, reason="accepted"):
    return Answered(Receipt(round=event.plan.round, sha256="a" * 64, accepted=accepted, reason=reason, detail="why"))


@pytest.fixture
def client():
    return Participation(Status(state="online", profile="generic-cpu", bits=4, device="cpu"))


def kinds(steps):
    return [type(step) for step in steps]


def patient(number, **fields):
    """A plan that takes updates of the round before it."""
    return ready(number, recipe=Recipe(late_rounds=1), **fields)


def late_result(event):
    return pack(TrainingResult(event.plan.round, event.base, NOTHING, 10, 0.5, 0.5, 1.0), event.plan.run)


def test_what_was_trained_for_the_last_round_is_offered_late_and_the_new_round_trained(client):
    client.on(patient(1))
    assert kinds(client.on(patient(2))) == [Withdraw]
    steps = client.trained(late_result(patient(1)))
    assert kinds(steps) == [Send, Announce, Train, Announce]
    assert (steps[0].work.parcel.offer.round, steps[2].ready.plan.round) == (1, 2)
    (said,) = client.on(answered(patient(1)))
    assert said.status.phase == "training"
    assert kinds(client.trained(late_result(patient(2)))) == [Send, Announce]


@pytest.mark.parametrize(
    ("newest", "kept"),
    [
        (patient(2), True),
        (NotDrawn(patient(2).plan.model_copy(update={"participants": ("bob",)})), True),
        (ready(2), False),
        (patient(3), False),
        (patient(2, run="another"), False),
        (finished(2), False),
    ],
    ids=["next", "next, not drawn", "one that takes none", "the one after", "another run", "the end"],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_an_unanswered_update_is_offered_as_long_as_the_newest_plan_takes_it(client, newest, kept, restarted):
    client.on(patient(1))
    (send, _) = client.trained(late_result(patient(1)))
    if restarted:
        client = Participation(Status(state="online"), send.work)
    steps = client.on(newest)
    assert (Withdraw in kinds(steps)) == (not kept)
    assert (Send in kinds(steps)) == (kept and restarted)
    assert (Train in kinds(steps)) == isinstance(newest, PlanReady)


def test_an_update_that_was_answered_is_not_offered_late(client):
    client.on(patient(1))
    client.trained(late_result(patient(1)))
    client.on(answered(patient(1)))
    assert kinds(client.on(patient(2))) == [Withdraw, Train, Announce]


def test_a_late_result_of_a_client_that_is_not_drawn_now_is_offered_all_the_same(client):
    client.on(patient(1))
    client.on(NotDrawn(patient(2).plan.model_copy(update={"participants": ("bob",)})))
    assert kinds(client.trained(late_result(patient(1)))) == [Send, Announce]


def phase(steps):
    status = steps[-1].status
    return status.phase, status.round, status.detail


def trains(steps):
    return [step.ready for step in steps if isinstance(step, Train)]


def test_a_plan_that_names_this_client_withdraws_trains_and_says_so(client):
    steps = client.on(ready(1))
    assert kinds(steps) == [Withdraw, Train, Announce]
    assert trains(steps) == [ready(1)]
    assert phase(steps) == ("training", 1, "")


def test_a_plan_for_others_is_waited_out(client):
    steps = client.on(not_drawn(1))
    assert kinds(steps) == [Withdraw, Announce]
    assert phase(steps) == ("waiting", 1, "not drawn for this round")


def test_a_client_that_is_not_drawn_again_says_nothing_more(client):
    client.on(not_drawn(1))
    assert kinds(client.on(not_drawn(2))) == [Withdraw]
    client.on(ready(3))
    assert phase(client.on(not_drawn(4))) == ("waiting", 4, "not drawn for this round")


def test_a_finished_training_is_sent(client):
    client.on(ready(1))
    steps = client.trained(result_of(ready(1)))
    assert kinds(steps) == [Send, Announce]
    assert steps[0].work.parcel == result_of(ready(1))
    assert phase(steps) == ("uploading", 1, "")


def test_a_status_keeps_what_the_device_is(client):
    status = client.on(ready(1))[-1].status
    assert (status.state, status.profile, status.bits, status.device) == ("online", "generic-cpu", 4, "cpu")


def test_a_training_that_came_to_nothing_is_told_and_the_next_plan_is_trained(client):
    client.on(ready(1))
    steps = client.missed("the budget is spent")
    assert kinds(steps) == [Announce]
    assert phase(steps) == ("failed", 1, "the budget is spent")
    assert trains(client.on(ready(2))) == [ready(2)]


def test_a_plan_that_came_during_a_training_that_came_to_nothing_is_trained(client):
    client.on(ready(1))
    assert trains(client.on(ready(2))) == []
    steps = client.missed("diverged")
    assert phase(steps[:1]) == ("failed", 1, "diverged")
    assert trains(steps) == [ready(2)]
    assert phase(steps) == ("training", 2, "")


def test_a_training_that_came_to_nothing_after_its_round_is_told_and_no_more(client):
    client.on(ready(1))
    client.on(not_drawn(2))
    assert kinds(client.missed("diverged")) == [Announce]


@pytest.mark.parametrize(("accepted", "told"), [(True, "update accepted"), (False, "update rejected: not-finite why")])
def test_a_receipt_ends_the_round_and_is_announced(client, accepted, told):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    steps = client.on(answered(ready(1), accepted, "accepted" if accepted else "not-finite"))
    assert kinds(steps) == [Announce]
    assert phase(steps) == ("waiting", 1, told)


def test_the_plan_of_an_answered_update_is_not_trained_again(client):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    client.on(answered(ready(1)))
    assert trains(client.on(ready(1))) == []
    assert trains(client.on(ready(2))) == [ready(2)]


def test_the_next_round_from_the_same_adapter_is_another_plan(client):
    client.on(ready(1, base=b"same"))
    client.trained(result_of(ready(1, base=b"same")))
    client.on(answered(ready(1, base=b"same")))
    assert trains(client.on(ready(2, base=b"same"))) == [ready(2, base=b"same")]


def test_a_duplicate_plan_during_training_starts_nothing_and_its_result_is_sent(client):
    client.on(ready(1))
    assert kinds(client.on(ready(1))) == [Withdraw]
    assert kinds(client.trained(result_of(ready(1)))) == [Send, Announce]


def test_a_duplicate_plan_while_the_update_travels_is_ignored(client):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    assert client.on(ready(1)) == []


def test_a_newer_plan_during_training_drops_the_old_result_and_starts_the_new_one(client):
    client.on(ready(1))
    assert trains(client.on(ready(2))) == []
    steps = client.trained(result_of(ready(1)))
    assert trains(steps) == [ready(2)]
    assert Send not in kinds(steps)
    assert kinds(client.trained(result_of(ready(2)))) == [Send, Announce]


def test_of_several_newer_plans_only_the_last_is_trained(client):
    client.on(ready(1))
    for number in (2, 3, 4):
        assert trains(client.on(ready(number))) == []
    assert trains(client.trained(result_of(ready(1)))) == [ready(4)]


def test_a_newer_plan_for_others_drops_the_old_result(client):
    client.on(ready(1))
    assert phase(client.on(not_drawn(2)))[0] == "waiting"
    assert client.trained(result_of(ready(1))) == []
    assert trains(client.on(ready(3))) == [ready(3)]


def test_a_plan_with_another_class_bank_but_the_same_adapter_drops_the_old_result(client):
    client.on(ready(1))
    changed = ready(1, classes="e" * 64)
    client.on(changed)
    steps = client.trained(result_of(ready(1)))
    assert Send not in kinds(steps)
    assert trains(steps) == [changed]


def test_another_adapter_of_its_own_in_the_same_round_drops_the_old_result(client):
    client.on(ready(1, own=b"one"))
    changed = ready(1, own=b"two")
    assert trains(client.on(changed)) == []
    steps = client.trained(result_of(ready(1, own=b"one")))
    assert Send not in kinds(steps)
    assert trains(steps) == [changed]


def test_another_global_adapter_leaves_a_result_that_started_from_its_own(client):
    client.on(ready(1, own=b"mine", base=b"one"))
    assert trains(client.on(ready(1, own=b"mine", base=b"two", start=2))) == []
    assert kinds(client.trained(result_of(ready(1, own=b"mine")))) == [Send, Announce]


def test_an_update_that_travels_is_withdrawn_when_the_next_round_is_without_this_client(client):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    assert kinds(client.on(not_drawn(2))) == [Withdraw, Announce]
    assert trains(client.on(ready(3))) == [ready(3)]


def test_a_restarted_coordinator_gets_the_same_result_again_without_training(client):
    client.on(ready(1, own=b"mine"))
    client.trained(result_of(ready(1, own=b"mine")))
    client.on(answered(ready(1)))
    again = client.on(ready(1, own=b"mine", start=2))
    assert kinds(again) == [Withdraw, Send, Announce]
    assert again[1].work.parcel == result_of(ready(1, own=b"mine"))


def test_what_was_trained_before_a_restart_is_offered_again_and_not_trained():
    before = Participation(Status(state="online"))
    before.on(ready(1))
    (sent, _) = before.trained(result_of(ready(1)))
    after = Participation(Status(state="online"), sent.work)
    steps = after.on(ready(1))
    assert kinds(steps) == [Withdraw, Send, Announce]
    assert steps[1].work == sent.work
    assert after.on(ready(1)) == []
    assert trains(after.on(ready(2))) == [ready(2)]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"recipe": Recipe(local_steps=99)}, {"run": "fedcba9876543210"}])
def test_a_plan_of_the_same_round_that_would_train_otherwise_is_other_work(client, changed):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    again = ready(1, **changed)
    assert trains(client.on(again)) == [again]


def test_another_deadline_is_the_same_work(client):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    assert client.on(ready(1, deadline_s=5.0)) == []


def test_a_finished_federation_drops_the_result_and_a_new_plan_starts_again(client):
    client.on(ready(1))
    steps = client.on(finished(1))
    assert kinds(steps) == [Withdraw, Announce]
    assert phase(steps) == ("waiting", 1, "federation finished")
    assert client.trained(result_of(ready(1))) == []
    assert trains(client.on(ready(2))) == [ready(2)]


def test_a_failed_training_is_announced_with_its_reason_and_round(client):
    client.on(ready(3))
    steps = client.failed("no such folder " * 100)
    assert kinds(steps) == [Announce]
    assert phase(steps) == ("failed", 3, ("no such folder " * 100)[:500])


def test_a_message_that_cannot_be_read_is_announced_and_stops_no_training(client):
    client.on(ready(1))
    steps = client.on(Unreadable("a plan of another version"))
    assert kinds(steps) == [Announce]
    assert phase(steps)[0] == "failed"
    assert "a plan of another version" in phase(steps)[2]
    assert kinds(client.trained(result_of(ready(1)))) == [Send, Announce]


def test_the_first_round_of_a_new_run_from_the_same_adapter_is_another_plan(client):
    client.on(ready(1))
    client.trained(result_of(ready(1)))
    client.on(answered(ready(1)))
    again = ready(1, run="fedcba9876543210")
    assert trains(client.on(again)) == [again]


@pytest.mark.parametrize("up", [True, False])
def test_a_link_that_comes_or_goes_changes_nothing(client, up):
    client.on(ready(1))
    assert client.on(LinkChanged(up=up)) == []
    assert kinds(client.trained(result_of(ready(1)))) == [Send, Announce]


def key(event):
    return event.plan.round, event.base


ORDERS = st.lists(
    st.one_of(
        st.tuples(st.just("plan"), st.integers(1, 4), st.none() | st.sampled_from([b"one", b"two"])),
        st.tuples(st.just("not-drawn"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["finished", "answered", "refused", "link", "trained", "failed"])),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=300)
@given(order=ORDERS)
def test_in_any_order_one_training_runs_at_a_time_and_only_results_of_the_current_plan_are_sent(order):
    client = Participation(Status(state="online"))
    running: PlanReady | None = None
    current: PlanReady | None = None
    sent: PlanReady | None = None
    for what, *details in order:
        match what:
            case "plan":
                number, own = details
                current, sent = ready(number, own=own), None
                steps = client.on(current)
            case "not-drawn" | "finished":
                current, sent = None, None
                steps = client.on(not_drawn(*details) if details else finished(4))
            case "answered" | "refused" if sent is not None:
                steps, sent = client.on(answered(sent, accepted=what == "answered")), None
            case "link":
                steps = client.on(LinkChanged(up=True))
            case "trained" | "failed" if running is not None:
                steps = client.trained(result_of(running)) if what == "trained" else client.failed("broken")
                ended, running = running, None
                due = what == "trained" and current is not None and key(current) == key(ended)
                assert any(isinstance(step, Send) for step in steps) == due
            case _:
                continue
        for step in steps:
            if isinstance(step, Train):
                assert running is None, "two trainings at once"
                assert step.ready == current, "trains a plan that is not the current one"
                running = step.ready
            elif isinstance(step, Send):
                assert current is not None
                assert (step.work.parcel.offer.round, step.work.parcel.offer.base) == key(current)
                sent = current


def test_why_a_training_waits_is_told_once_and_that_it_goes_on(client):
    assert client.held("90 C") == []
    client.on(ready(1))
    (told,) = client.held("90 C")
    assert (told.status.phase, told.status.round, told.status.detail) == ("training", 1, "waits: 90 C")
    assert client.held("90 C") == []
    (told,) = client.held("")
    assert (told.status.phase, told.status.detail) == ("training", "")
    assert client.held("") == []


def test_a_new_training_is_not_said_to_wait(client):
    client.on(ready(1))
    client.held("90 C")
    client.trained(result_of(ready(1)))
    client.on(ready(2))
    assert client.held("") == []
