"""Every profile in the folder is whole, honest about its facts, and found by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import hardware_profiles.facts
from hardware_profiles import platform
from hardware_profiles.facts import FOLDER, Fact, ProfileError, names_in
from hardware_profiles.platform import Platform, platform_of
from hardware_profiles.profile import Profile, load, load_soc, names
from hardware_profiles.versions import Range, release

TRAIN = (
    *("orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb"),
    *("agx-orin-64gb-industrial", "thor-t4000", "thor-t5000"),
)


@pytest.fixture(params=names())
def profile(request) -> Profile:
    return load(request.param)


@pytest.fixture(params=platform.names())
def a_platform(request) -> Platform:
    return platform.load(request.param)


def facts_of(record) -> Iterator[Fact]:
    """Every fact in a record, however deep."""
    if isinstance(record, Fact):
        yield record
    elif isinstance(record, BaseModel):
        yield from facts_of([getattr(record, name) for name in type(record).model_fields])
    elif isinstance(record, dict):
        yield from facts_of(list(record.values()))
    elif isinstance(record, list | tuple):
        for part in record:
            yield from facts_of(part)


@pytest.mark.parametrize(
    ("tier", "boards"),
    [
        ("train", {*(f"jetson-{name}" for name in TRAIN), "raspberry-pi-5", "generic-cpu", "generic-cuda"}),
        ("inference", {"jetson-xavier-nx-8gb", "jetson-xavier-nx-16gb", "jetson-agx-xavier"}),
        ("unsupported", {"jetson-nano-4gb", "jetson-tx2"}),
    ],
)
def test_the_boards_of_a_tier(tier, boards):
    assert {name for name in names() if load(name).tier == tier} == boards


def test_a_profile_carries_what_its_processor_can_do(profile):
    if profile.soc:
        soc = load_soc(profile.soc)
        assert profile.supports == soc.supports
        assert profile.facts["compute_capability"] == soc.facts["compute_capability"]


def test_a_profile_asks_nothing_of_the_device_that_its_arithmetic_cannot(profile):
    supports = profile.supports
    if profile.tier == "train":
        assert {4: supports.nf4, 8: supports.llm_int8}[profile.bits].value
        assert {"bfloat16": supports.bf16, "float16": supports.fp16}.get(profile.dtype, supports.nf4).value


def test_a_profile_names_platforms_that_exist_and_a_client_runs_on_one_if_it_trains(profile):
    found = [platform.load(name) for name in profile.platforms]
    assert found
    assert any(each.client for each in found) == (profile.tier == "train")


def test_an_orin_nano_has_two_platforms():
    assert load("jetson-orin-nano-8gb").platforms == ("jetpack-6.2", "jetpack-7.2")


def test_a_jetson_that_trains_has_what_flashing_it_takes(profile):
    if profile.name.startswith("jetson") and profile.tier == "train":
        assert profile.flash is not None
        for name in profile.platforms:
            least = platform.load(name).facts["newest"].value.partition("L4T ")[2].strip(")")
            assert [config for config in profile.flash.configs if least in config.l4t and not config.super], name
        assert profile.thermal is not None


def test_every_fact_has_a_source_and_none_from_memory_is_called_verified(profile):
    facts = list(facts_of(profile))
    assert facts
    for fact in facts:
        assert str(fact.value).strip()
        assert not (fact.verified and "memory" in fact.source), fact


def test_nothing_is_called_verified_of_a_board_that_nobody_here_had(profile):
    if profile.name != "generic-cpu":
        assert not [fact for fact in facts_of(profile) if fact.verified]


def test_a_platform_is_honest_about_its_facts(a_platform):
    for fact in [*facts_of(a_platform), *a_platform.wheels]:
        assert not (fact.verified and "memory" in fact.source), fact


def test_a_platform_says_where_every_package_of_a_client_comes_from(a_platform):
    if not a_platform.client:
        assert a_platform.advice
        return
    socs = {load(name).soc for name in names() if a_platform.name in load(name).platforms}
    for soc in socs:
        for package in ("torch", "bitsandbytes", "onnxruntime", "onnxruntime-gpu"):
            sources = a_platform.sources(package, soc)
            assert sources, (soc, package)
            assert sources[0].runs != "no", (soc, package)


def test_what_installs_and_cannot_run_is_named():
    for name in ("jetpack-6.2", "jetpack-7.2"):
        wheels = platform.load(name).sources("onnxruntime-gpu", "t234")
        assert [wheel for wheel in wheels if wheel.runs == "no" and not wheel.index]


def test_no_two_platforms_claim_the_same_l4t():
    for text in ("32.7.6", "35.6.4", "36.4.3", "36.5.2", "38.2.1", "38.4.0", "39.2.0", "39.2.1"):
        assert len([name for name in platform.names() if (l4t := platform.load(name).l4t) is not None and text in l4t]) == 1
        assert platform_of(text) is not None
    assert platform_of("40.0") is None
    assert platform_of("").name == "linux"


@pytest.mark.parametrize(
    ("since", "below", "inside", "outside"),
    [
        ("36.4.3", "", ("36.4.3", "36.5", "37"), ("36.4", "36.4.2", "35.9.9")),
        ("36", "37", ("36", "36.0.1", "36.99"), ("35.99", "37", "37.0")),
        ("", "36.5", ("1", "36.4.99"), ("36.5", "36.5.0")),
    ],
)
def test_a_range_of_releases(since, below, inside, outside):
    found = Range(since=since, below=below)
    assert all(text in found for text in inside)
    assert not any(text in found for text in outside)


@pytest.mark.parametrize("text", ["", "36.", "R36", "36.4-1", "1.2.3.4.5", "-1"])
def test_what_is_no_release_is_refused(text):
    with pytest.raises(ValueError, match="no release"):
        release(text)


def test_a_profile_ends_its_providers_with_the_cpu_and_a_cpu_profile_has_no_other(profile):
    assert profile.onnx_providers[-1] == "CPUExecutionProvider"
    if profile.device == "cpu":
        assert profile.onnx_providers == ("CPUExecutionProvider",)


def test_a_boards_memory_range_is_a_range(profile):
    low, high = profile.identity.mem_total_mib
    assert 0 <= low < high
    assert bool(profile.identity.modules or profile.identity.compatible) == (low > 0)


def test_no_two_profiles_claim_the_same_board():
    claims = [
        (entry, *profile.identity.mem_total_mib)
        for profile in map(load, names())
        for entry in (*profile.identity.modules, *profile.identity.compatible)
    ]
    for number, (entry, low, high) in enumerate(claims):
        for other, other_low, other_high in claims[number + 1 :]:
            assert entry != other or high < other_low or other_high < low


@pytest.mark.parametrize("name", ["jetson-two", "", "../profile", "generic-cpu.toml", "/etc/passwd"])
def test_an_unknown_name_lists_the_known(name):
    for read, known in ((load, names()), (platform.load, platform.names()), (load_soc, names_in("socs"))):
        with pytest.raises(ProfileError) as caught:
            read(name)
        assert repr(name) in str(caught.value)
        assert all(each in str(caught.value) for each in known)


GOOD = (FOLDER / "boards" / "generic-cpu.toml").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("bits = 4 4", "Expected newline"),
        (GOOD.replace("bits = 4", "bits = 5"), "bits"),
        (GOOD.replace("max_rank = 64", "max_rnak = 64"), "max_rnak"),
        (GOOD.replace(", verified = true", ""), "verified"),
        (GOOD.replace('source = "', 'sauce = "'), "source"),
        (GOOD.replace('tier = "train"', 'tier = "inference"'), "advice"),
        (GOOD.replace('title = "', 'soc = "t999"\ntitle = "'), "t999"),
        (GOOD + "[thermal]\npause_above_c = 80\nresume_below_c = 80\n", "resume_below_c"),
    ],
    ids=["not-toml", "five-bits", "misspelt-key", "not-verified", "no-source", "no-advice", "no-soc", "never-cools"],
)
def test_a_damaged_profile_is_refused_naming_file_and_key(tmp_path: Path, monkeypatch, text, problem):
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "mine.toml").write_text(text)
    monkeypatch.setattr(hardware_profiles.facts, "FOLDER", tmp_path)
    with pytest.raises(ProfileError) as caught:
        load("mine")
    assert problem in str(caught.value)
    assert "mine.toml" in str(caught.value) or problem == "t999"
