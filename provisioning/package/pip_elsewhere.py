"""pip, made to believe that it runs on the device: `python pip_elsewhere.py MACHINE PYTHON download ...`.

`pip download --platform` picks wheels for another machine, but reads the conditions in requirements ("python_version <
'3.11'", "platform_machine == 'x86_64'") as they are on this one, and so leaves out what the device needs, and asks for what
does not exist for it. What it reads comes from the standard library's `platform`, which answers for the device here.
"""

from __future__ import annotations

import platform
import runpy
import sys


def main() -> None:
    """Run pip with the arguments after the first two."""
    machine, python, *arguments = sys.argv[1:]
    vars(platform).update(
        machine=lambda: machine,
        python_version=lambda: f"{python}.0",
        python_version_tuple=lambda: (*python.split("."), "0"),
    )
    sys.argv = ["pip", *arguments]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
