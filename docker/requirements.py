"""At build time: what pyproject.toml requires, with these extras, as requirements for pip.

Installed in a layer of its own, which does not change with the code.
"""

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    pyproject, *extras = sys.argv[1:]
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    print(*project["dependencies"], sep="\n")
    for extra in extras:
        print(*project["optional-dependencies"][extra], sep="\n")
