"""Who may import whom. An `ast` walk, so that lazy imports inside functions are seen too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"protocol", "clip_lora", "coordinator", "edge_client", "export", "hardware_profiles", "provisioning", "clipcast"}
TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}

MAY_IMPORT = {
    "protocol": set(),
    "clip_lora": set(),
    "hardware_profiles": set(),
    "coordinator": {"protocol", "clip_lora"},
    "edge_client": {"protocol", "clip_lora", "hardware_profiles"},
    "export": {"protocol", "clip_lora", "hardware_profiles"},
    "provisioning": {"protocol", "hardware_profiles"},
    "clipcast": OURS,
}
MUST_NOT_IMPORT = {
    "protocol": TORCH | {"onnxruntime"},
    "clip_lora": {"paho"},
    "hardware_profiles": TORCH | {"paho"},
    "coordinator": {"onnxruntime", "paho"},
    "edge_client": {"paho"},
    "export": {"paho"},
    "provisioning": TORCH | {"paho"},
    "clipcast": {"paho"},
}


def imported_modules(path: Path) -> set[str]:
    """Every dotted module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages_of(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(path)}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_every_package_is_in_the_tables_and_in_the_wheel() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == OURS == set(MAY_IMPORT) == set(MUST_NOT_IMPORT)
    pyproject = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in pyproject.splitlines() if line.startswith('packages = ["protocol"') and "clip_lora" in line][
        :1
    ]
    assert all(f'"{package}"' in line for package in OURS)


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_of_ours_follow_the_table(package: str) -> None:
    for path in files_of(package):
        wrong = (packages_of(path) & OURS) - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", sorted(OURS))
def test_third_parties_that_are_out_of_bounds(package: str) -> None:
    for path in files_of(package):
        allowed = {"paho"} if path == ROOT / "protocol" / "mqtt.py" else set()
        wrong = packages_of(path) & MUST_NOT_IMPORT[package] - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_topics_writes_a_slash_into_a_topic() -> None:
    for path in files_of("protocol"):
        if path.name == "topics.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
                assert not text.startswith(("/", "clipcast/")), f"{path.name}:{node.lineno} builds a topic: {text}"


UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
EVALUATING = {"eval", "exec", "compile", "__import__"}
TORCH_FILES = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load"), ("numpy", "save"), ("np", "save")}


@pytest.mark.parametrize("package", sorted(OURS))
def test_nothing_is_unpickled_or_evaluated(package: str) -> None:
    """What comes from elsewhere is safetensors, JSON or TOML; a file that could run code is never read."""
    for path in files_of(package):
        assert not packages_of(path) & UNPICKLING, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in EVALUATING, where
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in TORCH_FILES, where


def transitive_ours(start: Path) -> set[Path]:
    """The files of ours that importing `start` runs, by following imports at any depth."""
    seen: set[Path] = set()
    todo = [start]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported_modules(path):
            if module.split(".")[0] in OURS:
                base = ROOT.joinpath(*module.split("."))
                todo += [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()]
    return seen


@pytest.mark.parametrize("folder", ["inference", "releases"])
def test_what_answers_reaches_no_torch_by_any_import(folder: str) -> None:
    for start in (ROOT / "edge_client" / folder).rglob("*.py"):
        for path in transitive_ours(start):
            assert not packages_of(path) & TORCH, f"{start.name} reaches torch by {path}"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import protocol.mqtt, protocol.client_end, protocol.coordinator_end", TORCH | {"onnxruntime"}),
        ("import edge_client.inference.answering, edge_client.inference.pictures", TORCH),
        ("import coordinator.rounds, coordinator.model_process, clipcast.commands.coordinator", TORCH | {"onnxruntime"}),
        ("import edge_client.device, edge_client.participate", {"dp_accounting", "absl"}),
        ("import hardware_profiles.detect", TORCH | {"paho", "numpy"}),
        ("import clipcast.cli", TORCH | {"onnxruntime", "numpy", "paho", "onnx", "sklearn", "matplotlib", "pydantic"}),
        ("import clip_lora.lora, clip_lora.towers", {"paho"}),
    ],
)
def test_a_fresh_process_does_not_load_what_it_must_not(code: str, absent: set[str]) -> None:
    program = f"import sys; {code}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(loaded.stdout.split()) & absent
