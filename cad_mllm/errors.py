"""The user's mistakes, as types. Each ends the program with its documented exit code and one line.

Their codes are below 128, so that a Kubernetes operator does not retry what a retry cannot mend
(design decision "exit codes"). Bugs of ours are not in here: they assert.
"""

import re
from enum import IntEnum
from typing import ClassVar

GPU_MEMORY_REMEDY = (
    "--batch_size 1, or half of --pack_tokens, with more --gradient_accumulation_steps, "
    "--use_gradient_checkpointing (with less --gpu_memory_gb), a smaller --max_seq_length, then ZeRO-3 or "
    "ds_zero3_offload.json"
)
"""For a run whose batches do not fit a GPU: first what costs least."""

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


class ExitCode(IntEnum):
    """What the process returns. `>= 128` is left to signals and to what a restart can mend."""

    DONE = 0
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    PREFLIGHT = 5
    OUT_OF_MEMORY = 6
    """Of a GPU. A restart meets the same batch on the same GPU."""
    CLUSTER = 7
    JOB = 8
    """In a cluster: it failed, and no trainer of it gave a code that a restart cannot mend."""
    STOPPED = 143
    PEER_LOST = 170
    """Another rank, or the network to it, went away."""
    HUNG = 171
    """No step was made for longer than --hang_timeout_minutes."""


class CadMllmError(Exception):
    """A mistake that the user can mend. The message says what is wrong and what to do about it."""

    exit_code: ClassVar[ExitCode] = ExitCode.CONFIG

    def __str__(self) -> str:
        return without_credentials(super().__str__())


def without_credentials(text: str) -> str:
    """The text without user names and passwords in URLs: libraries quote proxies, mirrors and endpoints."""
    return _CREDENTIALS.sub("***@", text)


class ConfigError(CadMllmError):
    """A flag, a YAML key, a DeepSpeed JSON value or a model name that cannot be honoured."""

    exit_code = ExitCode.CONFIG


class DataError(CadMllmError):
    """Input files that are missing, unreadable or too often unusable."""

    exit_code = ExitCode.DATA


class CadError(DataError):
    """One model that cannot be parsed, written, decoded or built. Data code sets the sample aside."""


class CheckpointError(CadMllmError):
    """A checkpoint that is missing, incomplete, or that belongs to another run."""

    exit_code = ExitCode.CHECKPOINT


class PreflightError(CadMllmError):
    """A machine that cannot run what was asked of it."""

    exit_code = ExitCode.PREFLIGHT


class ClusterError(CadMllmError):
    """A cluster that cannot be reached, refuses what was asked, or lacks what the job needs."""

    exit_code = ExitCode.CLUSTER
