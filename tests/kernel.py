"""A machine without OpenCASCADE, for processes that tests start."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAD_MLLM = (sys.executable, "-c", "import sys; from cad_mllm.cli import main; sys.exit(main())")


def without_opencascade(folder: Path) -> dict[str, str]:
    """The environment of a process in which, and in whose workers, OpenCASCADE cannot be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text('import sys\nsys.modules["OCP"] = None\n')
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
