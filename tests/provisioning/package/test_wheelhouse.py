"""A wheelhouse for another machine, from indexes that lie in folders here: what is needed there, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware_profiles.platform import Platform, load
from provisioning.errors import ProvisioningError
from provisioning.package import wheelhouse
from provisioning.package.wheelhouse import collect
from tests.provisioning.package.wheels import own_wheel, pip_wheel, write_index, write_wheel

ARM, INTEL = "manylinux_2_28_aarch64", "manylinux_2_28_x86_64"
JETSON_INDEX = "https://pypi.jetson-ai-lab.io/jp6/cu126"


@pytest.fixture
def public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index that pip uses. Its pillow needs other things on other machines."""
    made, pip = tmp_path / "made", tmp_path / pip_wheel().name
    pip.write_bytes(pip_wheel().read_bytes())
    needs = (
        "tomli; python_version < '3.11'",
        "armish; platform_machine == 'aarch64'",
        "intelish; platform_machine == 'x86_64'",
    )
    wheels = [
        *(
            write_wheel(made, "pillow", "10.3", f"cp3{minor}-cp3{minor}-{tag}", requires=needs)
            for minor in (10, 11, 12)
            for tag in (ARM, INTEL)
        ),
        *(write_wheel(made, name, "1.0") for name in ("tomli", "armish", "intelish")),
        *(write_wheel(made, "onnxruntime", version) for version in ("1.23.2", "1.32.0")),
        write_wheel(made, "onnxruntime-gpu", "1.31.0"),
        *(write_wheel(made, "torch", version, f"cp310-cp310-{ARM}") for version in ("2.9.0", "2.14.1")),
        write_wheel(made, "bitsandbytes", "0.50.2"),
    ]
    for key, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(key, value)
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", write_index(tmp_path / "public", pip, *wheels))
    return tmp_path / "public"


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index that JetPack 6.2 names, at another address."""
    folder = tmp_path / "jetson"

    def moved(name: str) -> Platform:
        found = load(name)
        wheels = (
            one.model_copy(update={"index": folder.as_uri()}) if one.index == JETSON_INDEX else one for one in found.wheels
        )
        return found.model_copy(update={"wheels": tuple(wheels)})

    monkeypatch.setattr("provisioning.package.sources.load", moved)
    return folder


def names(folder: Path) -> set[str]:
    return {"-".join(path.name.split("-")[:2]) for path in folder.glob("*.whl")}


@pytest.mark.parametrize(
    ("python", "machine", "adds"),
    [
        ("3.10", "aarch64", {"tomli-1.0", "armish-1.0"}),
        ("3.12", "aarch64", {"armish-1.0"}),
        ("3.12", "x86_64", {"intelish-1.0"}),
    ],
)
def test_it_holds_what_is_needed_there_not_here(
    public: Path, tmp_path: Path, python: str, machine: str, adds: set[str]
) -> None:
    folder = tmp_path / "wheels"
    assert collect(folder, "linux", python, machine, "infer", own_wheel(tmp_path)) == {}
    pip = "-".join(pip_wheel().name.split("-")[:2])
    assert names(folder) == {"clipcast-0.1.0", "pillow-10.3", "onnxruntime-1.32.0", pip} | adds
    assert [path.name for path in folder.glob(f"pillow-10.3-cp{python.replace('.', '')}-*_{machine}.whl")]


def test_a_jetson_gets_its_own_builds_though_the_public_index_has_the_same_version(
    public: Path, jetson: Path, tmp_path: Path
) -> None:
    own = [write_wheel(tmp_path / "theirs", "torch", "2.9.0", "cp310-cp310-linux_aarch64")]
    own += [
        write_wheel(tmp_path / "theirs", name, version)
        for name, version in (("bitsandbytes", "0.48"), ("onnxruntime-gpu", "1.23.0"))
    ]
    write_index(jetson, *own)
    folder = tmp_path / "wheels"
    assert collect(folder, "jetpack-6.2", None, "aarch64", "train", own_wheel(tmp_path)) == {}
    assert {path.name for path in folder.glob("torch-*")} == {own[0].name}
    assert {"bitsandbytes-0.48", "onnxruntime_gpu-1.23.0", "pillow-10.3"} <= names(folder)
    assert "onnxruntime-1.32.0" not in names(folder)


def test_what_cannot_be_had_is_named_and_can_be_put_there_by_hand(public: Path, jetson: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    write_index(jetson, write_wheel(theirs, "bitsandbytes", "0.48"), write_wheel(theirs, "onnxruntime-gpu", "1.23.0"))
    folder, ours = tmp_path / "wheels", own_wheel(tmp_path)
    missing = collect(folder, "jetpack-6.2", None, "aarch64", "train", ours)
    assert list(missing) == ["torch"]
    assert jetson.as_uri() in missing["torch"]
    assert "torch" not in json.dumps(sorted(names(folder)))  # not another build in its place
    write_wheel(folder, "torch", "2.9.0", "cp310-cp310-linux_aarch64")
    assert collect(folder, "jetpack-6.2", None, "aarch64", "train", ours) == {}


def test_what_the_public_index_lacks_is_named(public: Path, tmp_path: Path) -> None:
    missing = collect(tmp_path / "wheels", "linux", "3.13", "aarch64", "infer", own_wheel(tmp_path))
    assert list(missing) == ["pillow>=10.3"]


def test_a_platform_that_cannot_train_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ProvisioningError, match=r"cannot train on jetpack-5\.1: .*JetPack 6\.2 or 7\.2"):
        collect(tmp_path / "wheels", "jetpack-5.1", None, "aarch64", "train", own_wheel(tmp_path))
    with pytest.raises(ProvisioningError, match="name one with --python"):
        collect(tmp_path / "wheels", "linux", "eleven", "aarch64", "infer", own_wheel(tmp_path))


def test_the_c_library_of_every_platform_is_known() -> None:
    from hardware_profiles.platform import names as platforms

    assert all(wheelhouse._glibc_of(load(name)) >= 27 for name in platforms())
