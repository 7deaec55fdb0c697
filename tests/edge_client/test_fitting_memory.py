"""What fits into the memory that there is at this moment, told by files of our making; it moves no bit by chance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_client.checkpoint import Checkpoint
from edge_client.config import Placement
from edge_client.errors import PlanRefusedError
from edge_client.memory import KEEPING, MARGIN_MIB, Room, ample, fitted, held_mib, room_for, shape_of
from hardware_profiles.plan import FRAMEWORK_MIB, KNOWN, Training, predict
from protocol.codec import encode_update
from protocol.messages import Recipe

L14 = KNOWN["openai/clip-vit-large-patch14"]
RECIPE = Recipe(batch_size=16)
PLACEMENT = Placement(8, 32, 16, "cpu")
HELD = FRAMEWORK_MIB["cpu"]
GROUP = "sys/fs/cgroup/system.slice/clipcast.service"
UNIT = {"proc/self/cgroup": "0::/system.slice/clipcast.service\n"}
MIB = 1024 * 1024


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def memory(available_mib):
    return {
        "proc/meminfo": f"MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: {int(available_mib * 1024)} kB\n",
        "proc/self/status": f"Name:\tclipcast\nVmRSS: 999999 kB\nRssAnon:\t{HELD * 1024} kB\n",
    }


def group(limit, used, files=0, name="memory.max", folder=GROUP):
    stat = f"anon 5\ninactive_file {files}\nactive_file {files}\nshmem 7\n"
    other = {"memory.max": "memory.high", "memory.high": "memory.max"}[name]
    said = {name: limit, other: "max", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"{folder}/{file}": text for file, text in said.items()}


def test_without_a_limit_what_the_system_has_available_counts(tmp_path):
    root = write(tmp_path, {**memory(1500), **group("max", 99), **UNIT})
    room = room_for("cpu", root)
    assert (room.mib, room.limit) == (1500, "MemAvailable")
    assert held_mib("cpu", root) == HELD


@pytest.mark.parametrize(("name", "setting"), [("memory.max", "MemoryMax="), ("memory.high", "MemoryHigh=")])
def test_a_units_limit_counts_less_what_it_uses_but_for_pages_of_files(tmp_path, name, setting):
    files = {
        **memory(5000),
        **group(1000 * MIB, 800 * MIB, 50 * MIB, name),
        **UNIT,
    }
    room = room_for("cpu", write(tmp_path, files))
    assert (room.mib, room.limit) == (300, name)
    assert setting in room.cure


def test_a_limit_of_an_outer_group_counts_too_and_one_beyond_its_limit_leaves_nothing(tmp_path):
    outer = group(100 * MIB, 150 * MIB, folder="sys/fs/cgroup/system.slice")
    files = {
        **memory(5000),
        **outer,
        **group(900 * MIB, 10 * MIB),
        **UNIT,
    }
    assert room_for("cpu", write(tmp_path, files)).mib == 0


def test_in_a_container_the_limit_stands_at_the_top(tmp_path):
    files = {**memory(5000), **group(70 * MIB, 0, folder="sys/fs/cgroup"), "proc/self/cgroup": "0::/\n"}
    assert room_for("cpu", write(tmp_path, files)).mib == 70


def test_an_older_kernels_groups_and_a_system_that_says_nothing_set_no_limit(tmp_path):
    assert room_for("cpu", tmp_path) is None
    older = write(tmp_path, {**memory(900), "proc/self/cgroup": "4:memory:/system.slice\n1:name=systemd:/\n"})
    assert room_for("cpu", older).mib == 900


def test_this_machine_says_what_it_has():
    assert room_for("cpu").mib > 0
    assert held_mib("cpu") > 50


def needs(batch, *, checkpointing=False):
    training = Training(4, 4, 0, batch, 8, "float32", "cpu", checkpointing, pictures=10)
    return predict(L14, training).total - HELD + MARGIN_MIB


def fit(mib, placement=PLACEMENT):
    return fitted(placement, RECIPE, 16, L14, 10, Room(mib, "MemAvailable", "stop something"), HELD)


def test_what_fits_stays_as_it_is_placed():
    assert fit(needs(16)) is PLACEMENT
    assert fitted(PLACEMENT, RECIPE, 16, L14, 10, None, HELD) is PLACEMENT


def test_freed_memory_is_kept_only_where_there_is_plenty():
    predicted = predict(L14, Training(4, 4, 0, 16, 8, "float32", "cpu", pictures=10)).total

    def kept(mib, placement=PLACEMENT):
        return ample(placement, RECIPE, 16, L14, 10, Room(mib, "MemAvailable", "stop something"), HELD)

    plenty = KEEPING * predicted - HELD + MARGIN_MIB
    assert kept(plenty)
    assert not kept(plenty - 1)
    assert not kept(1e6, replace(PLACEMENT, device="cuda", dtype="float16"))
    assert not ample(PLACEMENT, RECIPE, 16, L14, 10, None, HELD)


def test_blocks_are_computed_again_before_the_batch_gets_smaller_and_the_bits_stay():
    found = fit(needs(16) - 1)
    assert (found.batch_size, found.checkpointing, found.numerics()) == (32, True, PLACEMENT.numerics())
    assert found.fallback.startswith("blocks computed again on the way back: ")
    found = fit(needs(16, checkpointing=True) - 1)
    assert (found.batch_size, found.checkpointing, found.numerics()) == (8, True, PLACEMENT.numerics())
    assert found.fallback.startswith("batches of 8: ")
    assert "MemAvailable" in found.fallback


def test_what_was_other_than_asked_before_is_still_told():
    placement = replace(PLACEMENT, fallback="the CPU instead of the GPU: no CUDA")
    assert fit(needs(16) - 1, placement).fallback.startswith("the CPU instead of the GPU: no CUDA; blocks computed again")


def test_where_nothing_fits_it_is_said_what_is_needed_what_there_is_and_what_to_do():
    least = needs(1, checkpointing=True)
    assert fit(least).batch_size == 1
    with pytest.raises(PlanRefusedError) as caught:
        fit(least - 1)
    for words in (f"takes {least - MARGIN_MIB:.0f} MiB more", f"there are {least - 1:.0f} (MemAvailable)", "stop something"):
        assert words in str(caught.value)


@pytest.fixture
def long_ready(make_ready, bank, recipe):
    """Eight steps of 24 pictures: epochs end after three of eight pictures, or six of four."""
    return make_ready(bank, recipe.model_copy(update={"local_steps": 16}))


@pytest.fixture
def available(tmp_path):
    """Let a system have room for tiny-clip in batches of so many pictures; whole, or with blocks computed again."""

    def system(batch, *, checkpointing=False):
        training = Training(4, 4, 0, batch, 4, "float32", "cpu", checkpointing, pictures=24)
        return write(tmp_path / "root", memory(predict(shape_of("tiny-clip"), training).total - HELD + MARGIN_MIB + 0.1))

    return system


def never():
    return False


def test_a_round_is_trained_smaller_while_there_is_no_room_and_as_placed_when_there_is(
    make_trainer, make_ready, bank, available
):
    told = []
    trainer = make_trainer(root=available(4, checkpointing=True), report=told.append)
    small = encode_update(trainer.run(make_ready(bank), never).update)
    assert small == encode_update(make_trainer(batch_size=4).run(make_ready(bank), never).update)
    available(8)
    whole = encode_update(trainer.run(make_ready(bank, number=2), never).update)
    assert whole == encode_update(make_trainer().run(make_ready(bank, number=2), never).update)
    assert [text[:12] for text in told] == ["batches of 4", ""]


def test_blocks_computed_again_for_want_of_room_change_no_bit(make_trainer, make_ready, bank, available):
    told = []
    trainer = make_trainer(root=available(8, checkpointing=True), report=told.append)
    again = encode_update(trainer.run(make_ready(bank), never).update)
    assert again == encode_update(make_trainer().run(make_ready(bank), never).update)
    assert len(told) == 1


def test_without_room_for_the_smallest_nothing_is_loaded_and_the_client_stays(make_trainer, make_ready, bank, tmp_path):
    class Untouched:
        def get(self, *_):
            raise AssertionError("the model was loaded")

    trainer = make_trainer(root=write(tmp_path, memory(MARGIN_MIB)), encoders=Untouched())
    with pytest.raises(PlanRefusedError, match="too little memory"):
        trainer.run(make_ready(bank), never)


def stop_after(steps):
    left = iter(range(steps))

    def stopped():
        if next(left, None) is None:
            raise KeyboardInterrupt
        return False

    return stopped


@pytest.mark.parametrize(
    ("before", "later", "size", "steps"),
    [
        ((4, True), (8, False), 4, 16 - 6),  # there is room again: it goes on in the batches that it was begun in
        ((8, False), (8, True), 8, 16 - 6),  # less room: it goes on, with blocks computed again
        ((8, False), (4, True), 4, 16),  # no room for such batches: it is another training, from its beginning
    ],
)
def test_a_half_done_round_goes_on_in_its_own_batches_or_begins_anew(
    make_trainer, long_ready, tmp_path, available, before, later, size, steps
):
    path = tmp_path / "checkpoint"
    trainer = make_trainer(root=available(before[0], checkpointing=before[1]), checkpoint=Checkpoint(path, every_s=0.0))
    with pytest.raises(KeyboardInterrupt):
        trainer.run(long_ready, stop_after(8))
    taken = []
    root = available(later[0], checkpointing=later[1])
    again = make_trainer(root=root, checkpoint=Checkpoint(path)).run(long_ready, lambda: bool(taken.append(1)))
    assert len(taken) == steps
    calm = make_trainer(batch_size=size).run(long_ready, never)
    assert encode_update(again.update) == encode_update(calm.update)


def test_where_memory_runs_out_all_the_same_it_is_half_of_the_batch_that_was_used(make_trainer, make_ready, bank):
    """The device would take 32; the recipe asks for 8: half of 32 would be no less."""
    told, sizes = [], []
    trainer = make_trainer(report=told.append)
    encoder, _ = trainer.prepare(bank, make_ready(bank).plan.recipe)
    head = encoder.head

    def narrow(hidden):
        sizes.append(len(hidden))
        if len(hidden) > 4:
            raise RuntimeError("CUDA out of memory")
        return head(hidden)

    encoder.head = narrow
    trainer.run(make_ready(bank), never)
    assert told == ["batches of 4: memory ran out (CUDA out of memory)"]
    assert sizes[0] == 8
    assert max(sizes[1:]) == 4  # also where nothing is trained: looking at all pictures takes no more than a step
