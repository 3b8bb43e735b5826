"""Where a checkpoint comes from: code, packages, image, data, hardware. For the record, never read back."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from cad_mllm.train.machine import RankFacts


def provenance(
    ranks: Sequence[RankFacts], *, deepspeed_config: Mapping[str, object] | None, dataset: str
) -> dict[str, object]:
    """What a person wants to know of a checkpoint a year later. JSON-able.

    Args:
        ranks: the facts of every rank; the versions are the same on all of them.
        deepspeed_config: resolved, without `auto`; None without DeepSpeed.
        dataset: fingerprint of the training data.

    Image and overlay are those that the manifests name in CAD_MLLM_IMAGE and CAD_MLLM_OVERLAY.
    """
    main = ranks[0]
    hosts = {facts.host: facts for facts in ranks}
    return {
        "versions": dict(main.versions),
        "image": os.environ.get("CAD_MLLM_IMAGE"),
        "overlay": os.environ.get("CAD_MLLM_OVERLAY"),
        "dataset": dataset,
        "deepspeed_config": deepspeed_config,
        "world_size": len(ranks),
        "hardware": {
            "gpus": dict(Counter(facts.gpu.model for facts in ranks if facts.gpu is not None)),
            "driver": main.driver,
            "cuda": None if main.torch_cuda is None else ".".join(map(str, main.torch_cuda)),
            "hosts": {
                host: {"cpu": facts.cpu, "memory_gb": round(facts.memory_bytes / 1e9, 1)}
                for host, facts in hosts.items()
            },
        },
    }
