"""Hands this machine's pip configuration to an image build: settings in a file, local folders as mounts.

    python .ci/pip_config.py FILE    write FILE, print the mounts as options for `buildah build`, one a line

Run it with the pip whose settings are meant. What lies on this disk (wheels, an index, certificates) is
mounted read-only for the time of the build, out of the way of what the build installs.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

INSIDE = "/mnt/host"


def settings(listed: str) -> dict[str, str]:
    """Name and value of each setting in the output of `pip config list`; the environment's win."""
    pairs = (line.partition("=")[::2] for line in listed.splitlines() if "=" in line)
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: ast.literal_eval(value) for name, value in ordered}


def mounts(value: str) -> dict[str, str]:
    """The paths of this machine among the words of a setting, and what to mount for each."""
    words = (word.removeprefix("file://") for word in value.split())
    # An index in `simple` points at files beside itself.
    return {word: re.sub(r"/simple/?$", "", word) for word in words if word[0] == "/" and Path(word).exists()}


def moved(value: str) -> str:
    """A setting as it is inside the build."""
    for path in mounts(value):
        value = re.sub(rf"(?<![^\s/]){re.escape(path)}(?!\S)", INSIDE + path, value)
    return " ".join(value.split())


def main(target: Path) -> None:
    """Write the configuration to `target`, print the mounts."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    found = settings(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lines = ["[global]", *(f"{name} = {moved(value)}" for name, value in found.items())]
    target.write_text("\n".join(lines) + "\n")
    target.chmod(0o600)
    for path in sorted({mounted for value in found.values() for mounted in mounts(value).values()}):
        print(f"--volume={path}:{INSIDE}{path}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
