"""One TOML describes a device; settings win over the profile."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from clip_lora.towers import default_device
from edge_client.config import TEMPLATE, ClientConfig, load
from edge_client.device import new_client, place
from edge_client.errors import DataError, LedgerError
from hardware_profiles.profile import load as load_profile
from protocol.settings import SettingsError

MINIMAL = 'id = "ann"\nfederation = "lab"\ndata = "pictures"\n'


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "client.toml"
        file.write_text(text)
        return file

    return write


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def filled(data="digits"):
    return TEMPLATE.format(file="c.toml", id="ann", federation="lab", data=data, broker="mqtt://localhost:1883")


def config(**fields):
    return ClientConfig(id="ann", federation="lab", data="digits", **fields)


def test_the_template_loads_and_leaves_everything_else_to_the_defaults(write):
    file = write(filled())
    assert load(file) == config(state=file.parent / "ann-state")


def test_the_commented_lines_of_the_template_are_settings_that_load(write):
    uncommented = re.compile(r"^# (?=.* = |\[)")
    lines = [uncommented.sub("", line) for line in filled().splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("ca_file"))
    loaded = load(write(text))
    assert (loaded.profile, loaded.bits, loaded.batch_size, loaded.threads) == ("generic-cpu", 4, 16, 2)
    assert (loaded.device, loaded.model, loaded.broker.username) == ("cuda", "/opt/models/clip", "ann")
    assert loaded.enrolment is not None
    assert loaded.enrolment.token_file.name == "claim.token"


def test_pictures_are_relative_to_the_file_and_digits_are_no_folder(write, tmp_path):
    assert load(write(MINIMAL)).data == str(tmp_path / "pictures")
    assert load(write(MINIMAL.replace("pictures", "/data/all"))).data == "/data/all"
    assert load(write(MINIMAL.replace("pictures", "digits"))).data == "digits"


def test_a_relative_model_folder_is_relative_to_the_file(write, tmp_path):
    assert load(write(MINIMAL + 'model = "./clip"\n')).model == str(tmp_path / "clip")


BAD = {
    "unknown-key": (MINIMAL + "batchsize = 3\n", "unknown key 'batchsize'"),
    "no-id": (MINIMAL.replace("id", "name", 1), "key 'id' is missing"),
    "id-with-a-slash": (MINIMAL.replace("ann", "a/b"), "id"),
    "sixteen-bits": (MINIMAL + "bits = 16\n", "bits"),
    "no-batch": (MINIMAL + "batch_size = 0\n", "batch_size"),
    "no-pictures-a-prototype": (MINIMAL + "min_prototype_count = 0\n", "min_prototype_count"),
    "no-epsilon": (MINIMAL + "max_epsilon = 0.0\n", "max_epsilon"),
    "endless-epsilon": (MINIMAL + "max_epsilon = inf\n", "max_epsilon"),
    "delta-of-one-in-ten": (MINIMAL + "max_delta = 0.1\n", "max_delta"),
    "unknown-device": (MINIMAL + 'device = "tpu"\n', "device"),
    "broker-without-scheme": (MINIMAL + '[broker]\nurl = "localhost"\n', "mqtt://HOST"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused_naming_file_and_key(write, text, sentence):
    file = write(text)
    with pytest.raises(SettingsError) as caught:
        load(file)
    assert sentence in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(SettingsError, match="clipcast client init"):
        load(tmp_path / "absent.toml")


def test_without_settings_the_profile_decides():
    profile = load_profile("generic-cpu")
    placement = place(config(), profile)
    assert (placement.bits, placement.batch_size) == (profile.bits, profile.batch_size)
    assert (placement.max_rank, placement.device) == (profile.max_rank, "cpu")


def test_settings_win_over_the_profile():
    jetson = load_profile("jetson-orin-nano-8gb")
    placement = place(config(bits=8, batch_size=3, device="cpu", threads=1), jetson)
    assert (placement.bits, placement.batch_size, placement.device) == (8, 3, "cpu")
    assert placement.max_rank == jetson.max_rank
    assert torch.get_num_threads() == 1


def test_the_smallest_class_that_may_leave_comes_from_the_settings():
    profile = load_profile("generic-cpu")
    assert place(config(), profile).min_prototype_count == 1
    assert place(config(min_prototype_count=20), profile).min_prototype_count == 20


def test_threads_come_from_the_profile_and_zero_leaves_them_alone():
    torch.set_num_threads(1)
    place(config(), load_profile("generic-cpu"))
    assert torch.get_num_threads() == 1
    profile = load_profile("generic-cpu").model_copy(update={"threads": 2})
    place(config(), profile)
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(default_device() == "cuda", reason="this machine has the GPU that the test does without")
@pytest.mark.parametrize("asked", ["by-the-profile", "by-the-settings"])
def test_a_gpu_that_torch_cannot_see_is_reported_and_not_used(caplog, asked):
    caplog.set_level(logging.WARNING, logger="edge_client.device")
    by_profile = asked == "by-the-profile"
    profile = load_profile("jetson-orin-nano-8gb" if by_profile else "generic-cpu")
    placement = place(config(device=None if by_profile else "cuda"), profile)
    assert (placement.device, placement.dtype) == ("cpu", "auto" if by_profile else profile.dtype)
    assert placement.fallback.startswith("the CPU instead of the GPU: ")
    assert placement.fallback in caplog.text
    assert "clipcast doctor" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_that_does_not_run_here_is_reported_and_not_used(monkeypatch, bits):
    def named_symbol_not_found(*_: object, **__: object):
        raise RuntimeError("Error named symbol not found at line 62 in file ops.cu\nand so on")

    layer = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    monkeypatch.setattr(f"bitsandbytes.nn.{layer}.forward", named_symbol_not_found)
    placement = place(config(bits=bits), load_profile("generic-cpu"))
    assert placement.bits == 32
    assert f"instead of {bits} bits: Error named symbol not found at line 62 in file ops.cu" in placement.fallback
    assert "\n" not in placement.fallback
    told: list[str] = []
    _, _, status = new_client(config(bits=bits), load_profile("generic-cpu"), report=told.append)
    assert (status.bits, told) == (32, [placement.fallback])


def test_what_runs_here_is_used_and_trying_it_moves_no_random_numbers():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    assert place(config(), load_profile("generic-cpu")).fallback == ""
    assert torch.equal(torch.rand(3), wanted)


def test_a_new_client_says_what_it_is():
    _, part, status = new_client(config(bits=8), load_profile("generic-cpu"))
    assert (status.state, status.phase) == ("online", "waiting")
    profile = load_profile("generic-cpu")
    assert (status.profile, status.bits, status.device) == ("generic-cpu", 8, "cpu")
    assert status.max_rank == profile.max_rank
    told = part.failed("x")[0].status
    assert (told.profile, told.max_rank) == ("generic-cpu", profile.max_rank)


def test_the_state_folder_is_the_clients_own_and_lies_beside_the_settings(write, tmp_path):
    assert load(write(MINIMAL)).state == tmp_path / "ann-state"
    assert load(write(MINIMAL + 'state = "kept"\n')).state == tmp_path / "kept"
    assert load(write(MINIMAL + 'state = "/var/lib/clipcast"\n')).state == Path("/var/lib/clipcast")


def test_a_ledger_that_cannot_be_read_is_told_before_a_round_begins(tmp_path):
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(LedgerError, match=r"ledger\.json cannot be read"):
        new_client(config(state=tmp_path), load_profile("generic-cpu"))


def test_pictures_that_are_not_there_are_told_before_a_round_begins(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        new_client(ClientConfig(id="ann", federation="lab", data=str(tmp_path / "none")), load_profile("generic-cpu"))
