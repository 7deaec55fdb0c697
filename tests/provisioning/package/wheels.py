"""Wheels to install from: small ones that hold only a name, and real ones, packed again from what is installed here."""

from __future__ import annotations

import ensurepip
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = {
    "client": ("torch >=2.4", "bitsandbytes>=0.47"),
    "infer": ("onnxruntime>=1.20", "pillow>=10.3"),
    "metrics": (),
    "privacy": (),
}


def write_wheel(
    folder: Path, name: str, version: str, tag: str = "py3-none-any", *, tells: bool = False, requires: tuple[str, ...] = ()
) -> Path:
    """Write a wheel; one that `tells` is like clipcast's own: with extras, and a command that prints its version."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    if tells:
        lines += [f"Provides-Extra: {extra}" for extra in EXTRAS]
        lines += [f"Requires-Dist: {one}; extra == '{extra}'" for extra, all_ in EXTRAS.items() for one in all_]
    files = {
        f"{stem}.dist-info/METADATA": "\n".join(lines) + "\n",
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if tells:
        files[f"{stem}.dist-info/entry_points.txt"] = "[console_scripts]\nclipcast = clipcast_told:main\n"
        files["clipcast_told.py"] = f"def main():\n    print('clipcast {version}')\n"
    files[f"{stem}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in files) + f"{stem}.dist-info/RECORD,,\n"
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(zipfile.ZipInfo(inside), text)
    return path


def own_wheel(folder: Path, version: str = "0.1.0") -> Path:
    """Write a wheel that stands for clipcast's."""
    return write_wheel(folder, "clipcast", version, tells=True)


def write_index(folder: Path, *wheels: Path) -> str:
    """Make a package index of wheels, and return its address."""
    for wheel in wheels:
        name = wheel.name.split("-")[0].replace("_", "-")
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / wheel.name).write_bytes(wheel.read_bytes())
        links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted((folder / name).glob("*.whl")))
        (folder / name / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    return folder.as_uri()


def wheelhouse(folder: Path, runtime: str = "onnxruntime", version: str = "1.20.0") -> Path:
    """Write what a device that answers needs, and pip."""
    write_wheel(folder, runtime, version)
    write_wheel(folder, "pillow", "10.3")
    pip = pip_wheel()
    (folder / pip.name).write_bytes(pip.read_bytes())
    return folder


def pip_wheel() -> Path:
    """Return the pip that comes with this Python; Debian keeps it in another place."""
    places = (Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels"))
    return next(path for place in places for path in sorted(place.glob("pip-*.whl")))


def installed_wheels(folder: Path, *requirements: str) -> None:
    """Pack again, with all that they need, packages that are installed here: a real wheelhouse without a network."""
    todo, done = [Requirement(one) for one in requirements], set()
    while todo:
        wanted = todo.pop()
        if (wanted.name, *wanted.extras) in done:
            continue
        done.add((wanted.name, *wanted.extras))
        found = distribution(wanted.name)
        _pack(found, folder)
        for line in found.requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                todo.append(need)


def _pack(found: Distribution, folder: Path) -> None:
    said = [line.partition(": ") for line in (found.read_text("WHEEL") or "").splitlines()]
    tags = [value.split("-") for key, _, value in said if key == "Tag"]
    tag = "-".join(".".join(dict.fromkeys(part)) for part in zip(*tags, strict=True))
    name = found.metadata["Name"].replace("-", "_").replace(".", "_")
    with zipfile.ZipFile(folder / f"{name}-{found.version}-{tag}.whl", "w") as archive:
        for file in found.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(str(file.locate()), str(file))
