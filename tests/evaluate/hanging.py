"""What stands for the scoring in worker processes; alone in a file, so that they import little."""

import time

from cad_mllm.evaluate.score import Outcome, Pair, Sample


def hang_on_hang(pair: Pair) -> Sample:
    """Stands for `score`: whatever file has `hang` in its name takes for ever."""
    for path in (pair.true, pair.predicted):
        if path is not None and "hang" in path.name:
            time.sleep(60)
    outcome = Outcome.MISSING if pair.predicted is None else Outcome.SCORED
    return Sample(pair.id, outcome, figures={} if outcome is Outcome.SCORED else None)
