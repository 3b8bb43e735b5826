"""How long `cad-mllm evaluate` takes, report included: real models against perturbed ones.

    python tests/bench/evaluate_pairs.py FOLDER_OF_CAD_JSON --pairs 1000 --workers 2

The models of the folder are repeated until there are enough; each prediction is one of them with some of its
lengths changed, every fiftieth broken off. Prints one JSON object: wall time, and CPU time of all processes.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cad_mllm.cad.shapefile import program_text  # noqa: E402
from cad_mllm.errors import CadError  # noqa: E402


def write_pairs(models: list[Path], folder: Path, count: int) -> None:
    """Write `count` true models and predictions below `folder`."""
    rng = random.Random(0)

    def changed(match: re.Match[str]) -> str:
        return match.group(1) + str(min(254, max(1, int(match.group(2)) + rng.choice((-5, -2, 0, 2, 5)))))

    for number in range(count):
        model = models[number % len(models)]
        name = f"{number // len(models):04d}/{model.stem}"
        for part in ("true", "pred"):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model, folder / "true" / f"{name}.json")
        text = re.sub("([EFM])([0-9]+)", changed, program_text(model))
        if number % 50 == 49:
            text = text[: len(text) // 2]
        (folder / "pred" / f"{name}.txt").write_text(text + "\n")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    models = []
    for path in sorted(arguments.models.rglob("*.json")):
        try:
            program_text(path)
        except CadError:
            continue
        models.append(path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(models, folder, arguments.pairs)
        code = "import sys; from cad_mllm.cli import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, "evaluate", "--workers", str(arguments.workers)]
        for part in ("pred", "true", "out"):
            command += [f"--{part}", str(folder / part)]
        before, started = os.times(), time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT)
        wall, after = time.perf_counter() - started, os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])
        result = {
            "pairs": arguments.pairs,
            "models": len(models),
            "workers": arguments.workers,
            "wall s": round(wall, 1),
            "cpu s": round(cpu, 1),
            "cpu s a pair": round(cpu / arguments.pairs, 3),
            "load average": os.getloadavg(),
            "report bytes": (folder / "out/report.html").stat().st_size,
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
