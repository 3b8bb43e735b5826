"""The `cad-mllm` command: which subcommands there are, and one exit code per kind of mistake."""

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from cad_mllm.commands import bench, cluster, data, programs, training
from cad_mllm.errors import GPU_MEMORY_REMEDY, CadMllmError, ConfigError, ExitCode, without_credentials
from cad_mllm.settings import TRAIN_EXAMPLES, show

_INTERRUPTED = 130
_BUG = 1
_LOST_BY_GLOO = re.compile(r"gloo/transport|connectFullMesh|Connection (closed|reset) by peer|Broken pipe")
_MISUSE_OF_NCCL = re.compile(r"ncclInvalid(Usage|Argument)")
_OUT_OF_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
"""Full, over its quota, turned read-only, broken, or gone: wherever it was met, it is no bug."""


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": training.train,
    "doctor": training.doctor,
    "prepare": data.prepare,
    "make-dummy": data.make_dummy,
    "data inspect": data.inspect,
    "generate": programs.generate,
    "evaluate": programs.evaluate,
    "show-config": training.show_config,
    "submit": cluster.submit,
    "watch": cluster.watch,
    "logs": cluster.logs,
    "smoke": cluster.smoke,
    "bench": bench.bench,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry of the console script: never returns."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run_and_exit(lambda: _dispatch(arguments))


def train_main() -> NoReturn:
    """Entry of `cad_mllm/train_curriculum.py`: never returns.

    `doctor` before the flags examines instead of training, so that whatever launches the ranks of a training
    can launch those of its examination.
    """
    argv = sys.argv[1:]
    # The deepspeed launcher puts a --local_rank of its own in front.
    first = next((word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))), None)
    if first == "doctor":
        argv.remove(first)
        run_and_exit(lambda: training.doctor(argv))
    run_and_exit(lambda: training.train(argv, prog="train_curriculum.py"))


def run_and_exit(body: Callable[[], int]) -> NoReturn:
    """Run, say what went wrong in one line, and exit with the documented code.

    The last line of each rank states its code where a launcher set RANK: torchrun and deepspeed
    turn every failure into 1. A bug keeps its traceback and exits with 1. What torch raises for a lost peer
    or a full GPU is no bug, nor is a full disk: they have codes of their own.
    """
    prefix = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    logging.setLogRecordFactory(_LogRecord)
    try:
        code = body()
    except CadMllmError as error:
        print(f"{prefix}error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"{prefix}interrupted", file=sys.stderr)
        code = _INTERRUPTED
    except Exception as error:
        known = _of_the_disk(error) or _known_to_torch(error)
        if known is None:
            print(without_credentials(traceback.format_exc()), file=sys.stderr, end="")
            code = _BUG
        else:
            code, line = known
            print(f"{prefix}error: {without_credentials(line)}", file=sys.stderr)
    if "RANK" in os.environ:
        print(f"{prefix}exit code {int(code)}", file=sys.stderr, flush=True)
    if code != ExitCode.DONE and _in_process_group():
        # Tearing down a process group whose other ranks are gone can hang, or abort with another code.
        sys.stdout.flush()
        os._exit(int(code))
    sys.exit(int(code))


class _LogRecord(logging.LogRecord):
    """Whatever library logs it, with whatever handler."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return without_credentials(super().getMessage())


def _of_the_disk(error: Exception) -> tuple[ExitCode, str] | None:
    """Code and line for a disk that is full or gone; None for everything else."""
    if not isinstance(error, OSError) or error.errno not in _DISK_FAULTS:
        return None
    place = f" ({error.filename})" if error.filename else ""
    return ExitCode.PREFLIGHT, (
        f"a disk failed: {error.strerror}{place}. Free some of it, mend its mount, or name a folder "
        "elsewhere, then give the command again"
    )


def _known_to_torch(error: Exception) -> tuple[ExitCode, str] | None:
    """Code and line for a full GPU and for a lost peer; None for everything else.

    NCCL and torch's rendezvous have error types, gloo raises a bare RuntimeError.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    text = str(error).strip()
    of_peers = isinstance(error, torch.distributed.DistError)
    of_gpu = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
    if (of_peers or of_gpu) and _OUT_OF_MEMORY.search(text):
        return ExitCode.OUT_OF_MEMORY, (
            f"the GPU is out of memory: {GPU_MEMORY_REMEDY} ({_first_line(text)})"
        )
    if (of_peers and not _MISUSE_OF_NCCL.search(text)) or (
        type(error) is RuntimeError and _in_process_group() and _LOST_BY_GLOO.search(text)
    ):
        return ExitCode.PEER_LOST, (
            "another rank was lost, or the network to it; look for the first rank that ended. "
            f"A restart with --resume_from_ckpt auto goes on from the last checkpoint ({_first_line(text)})"
        )
    return None


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        show(_overview())
        return ExitCode.DONE if argv else ExitCode.CONFIG
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    command = COMMANDS.get(" ".join(argv[:words]))
    if command is None:
        raise ConfigError(
            f"unknown command {argv[0]!r}: one of {', '.join(COMMANDS)} (see `cad-mllm --help`)"
        )
    return command(argv[words:])


def _overview() -> str:
    lines = [
        "usage: cad-mllm COMMAND [--flags]",
        "",
        "Text, image and point cloud in, parametric CAD out.",
        "",
    ]
    lines += [f"  {name:<12} {command.__doc__}" for name, command in COMMANDS.items()]
    lines += ["", "`cad-mllm COMMAND --help` explains the flags of a command.", "", TRAIN_EXAMPLES]
    return "\n".join(lines)
