"""Every profile in the folder is whole, honest about its facts, and found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import hardware_profiles.profile
from hardware_profiles.profile import FOLDER, Profile, ProfileError, load, names

FILES = sorted(FOLDER.glob("*.toml"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def profile(request) -> Profile:
    return load(request.param.stem)


def test_the_folder_holds_the_fallback_and_the_orin_nano():
    assert {"generic-cpu", "jetson-orin-nano-8gb"} <= {file.stem for file in FILES}
    assert names() == [file.stem for file in FILES]


def test_a_profile_loads_under_its_file_name(profile):
    assert profile.name in names()
    assert profile.title


def test_every_fact_has_a_source_and_says_whether_it_was_measured(profile):
    for name, fact in profile.facts.items():
        assert len(fact.source.strip()) > 10, name
        assert str(fact.value).strip(), name


def test_facts_from_memory_are_not_called_verified(profile):
    for name, fact in profile.facts.items():
        assert not (fact.verified and "memory" in fact.source), name


def test_a_profile_ends_its_providers_with_the_cpu_and_a_cpu_profile_has_no_other(profile):
    assert profile.onnx_providers[-1] == "CPUExecutionProvider"
    if profile.device == "cpu":
        assert profile.onnx_providers == ("CPUExecutionProvider",)


def test_a_boards_memory_range_is_a_range(profile):
    low, high = profile.identity.mem_total_mib
    assert 0 <= low < high
    assert bool(profile.identity.compatible) == (low > 0)


def test_no_two_profiles_claim_the_same_board():
    claims = [
        (entry, *profile.identity.mem_total_mib) for profile in map(load, names()) for entry in profile.identity.compatible
    ]
    for number, (entry, low, high) in enumerate(claims):
        for other, other_low, other_high in claims[number + 1 :]:
            assert entry != other or high < other_low or other_high < low


@pytest.mark.parametrize("name", ["jetson-nano", "", "../profile", "generic-cpu.toml", "/etc/passwd"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ProfileError) as caught:
        load(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in names())


GOOD = (FOLDER / "generic-cpu.toml").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("bits = 4 4", "Expected newline"),
        (GOOD.replace("bits = 4", "bits = 5"), "bits"),
        (GOOD.replace("max_rank = 64", "max_rnak = 64"), "max_rnak"),
        (GOOD.replace("verified = true", ""), "verified"),
        (GOOD.replace('source = "', 'sauce = "'), "source"),
    ],
    ids=["not-toml", "five-bits", "misspelt-key", "fact-without-verified", "fact-without-source"],
)
def test_a_damaged_profile_is_refused_naming_file_and_key(tmp_path: Path, monkeypatch, text, problem):
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.setattr(hardware_profiles.profile, "FOLDER", tmp_path)
    with pytest.raises(ProfileError) as caught:
        load("mine")
    assert "mine.toml" in str(caught.value)
    assert problem in str(caught.value)
