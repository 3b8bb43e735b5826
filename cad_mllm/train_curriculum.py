"""Launch the training: `deepspeed`, `torchrun` or `python` in front of the path of this file.

Exit codes: see `cad_mllm/errors.py`; `--help` lists the flags.
"""

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0]).resolve() == _PACKAGE:
    # Python puts the script's own folder first, where `data`, `model` or `train` would shadow modules
    # of those names elsewhere. The folder above is what `import cad_mllm` needs.
    sys.path[0] = str(_PACKAGE.parent)

from cad_mllm.cli import train_main  # noqa: E402

if __name__ == "__main__":
    train_main()
