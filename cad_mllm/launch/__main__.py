"""`python -m cad_mllm.launch`: the entry of the container."""

import sys

from cad_mllm.launch.main import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
