"""Hands this machine's pip configuration to an image build: settings in a file, local folders as mounts.

    python .ci/pip_config.py FILE    write FILE, print the mounts as options for `buildah build`, one a line

Run it with the pip whose settings are meant. What lies on this disk (wheels, an index, certificates)
is mounted where it is, read-only, for the time of the build.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path


def settings(listed: str) -> dict[str, str]:
    """Name and value of each setting in the output of `pip config list`; the environment's win."""
    pairs = (line.partition("=")[::2] for line in listed.splitlines() if "=" in line)
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: ast.literal_eval(value) for name, value in ordered}


def local_paths(value: str) -> list[str]:
    """The paths of this machine among the words of a setting."""
    words = (word.removeprefix("file://") for word in value.split())
    return [word for word in words if word.startswith("/") and Path(word).exists()]


def mounted(path: str) -> str:
    """What to mount for a path: an index in `simple` points at files beside itself."""
    return re.sub(r"/simple/?$", "", path)


def main(target: Path) -> None:
    """Write the configuration to `target`, print the mounts."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    found = settings(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lines = ["[global]", *(f"{name} = {' '.join(value.split())}" for name, value in found.items())]
    target.write_text("\n".join(lines) + "\n")
    target.chmod(0o600)
    for path in sorted({mounted(path) for value in found.values() for path in local_paths(value)}):
        print(f"--volume={path}:{path}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
