"""The names of weights in our files: those they are published under, whatever transformers calls them.

transformers renames the parts of its networks between versions and translates in what it reads and writes
itself. Our checkpoints, exports and digests name the weights too, and outlive the version that wrote them.
"""

import re

_PUBLISHED = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}
_DINOV2_ATTENTION = re.compile(rf"(\bdinov2\.encoder\.layer\.\d+\.attention)\.({'|'.join(_PUBLISHED)})\b")
"""What transformers 5.23 says; 5.17 says what is published."""


def stored_name(name: str) -> str:
    """The name in files of the weight that some version of transformers calls `name`.

    A name that is in use in files already comes back as it is. The gated MLP of DINOv2-giant, one weight in
    older versions and two in newer ones, is not translated: as a trained encoder it needs the version that
    wrote it.
    """
    return _DINOV2_ATTENTION.sub(lambda found: f"{found[1]}.{_PUBLISHED[found[2]]}", name)
