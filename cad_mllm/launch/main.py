"""The launcher from top to bottom."""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cad_mllm.config import RunConfig
from cad_mllm.errors import CadMllmError, ExitCode
from cad_mllm.launch import mpi, preflight
from cad_mllm.launch.flags import flag_value
from cad_mllm.launch.place import HOSTFILE, Place, is_mpi_launcher, is_mpi_rank, read_place
from cad_mllm.launch.supervise import (
    STOP_SIGNALS,
    THROUGH_MPIRUN,
    Ended,
    Patience,
    StoppedError,
    Waiting,
    block_signals,
    describe,
    die_with_parent,
    say,
    start,
    supervise,
    verdict,
)

TRAINER = (sys.executable, "-m", "cad_mllm.train_curriculum")
ENTRY = (sys.executable, "-m", "cad_mllm.launch")
_SIGABRT_CODE = 134

HELP = """\
usage: python -m cad_mllm.launch [training flags]

Starts the training processes of this container, passes signals on to all of them at once, waits, and
exits with their code. Training flags: python -m cad_mllm.train_curriculum --help

With the word doctor before the flags nothing is trained: all ranks look at their machines and rank 0 says in
a table whether this training can run there, and what to change if not.

Who started the container is read from its environment:
  PyTorchJob, TrainJob   PET_NNODES, PET_NPROC_PER_NODE (a number; gpu: every GPU; cpu: every core; auto:
                         every GPU, or 1 process without), PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT
  MPIJob, launcher pod   /etc/mpi/hostfile is there: composes mpirun (Open MPI 4.1) and runs it
  MPIJob, rank           OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE; MASTER_ADDR, MASTER_PORT
  nobody                 one process for each visible GPU, or 1 on the CPU

Variables (all optional):
  CAD_MLLM_WORLD_SIZE        expected number of processes in all: any other is refused
  CAD_MLLM_MIN_SHM_GB        refuse a smaller /dev/shm (1 GB = 1e9 bytes)
  CAD_MLLM_MIN_FREE_DISK_GB  refuse an --output_dir whose volume has less space left
  CAD_MLLM_MIN_DRIVER        refuse an older NVIDIA driver, and a missing GPU unless --device cpu (set in
                             CUDA images)
  CAD_MLLM_DNS_SECONDS       how long to wait until DNS knows the other pods (300)
  CAD_MLLM_GRACE_SECONDS     how long the ranks get for a checkpoint after SIGTERM, before SIGKILL (300);
                             the pod's terminationGracePeriodSeconds must be larger
  CUDA_VISIBLE_DEVICES       narrows the GPUs that count as visible
  GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
                             network interface of the ranks, where the one of the host name is wrong

Exit codes (an operator restarts pods at 128 and above, and at no other):
  0    done
  1    a bug: the traceback is in the log
  2    configuration        3  data        4  checkpoint
  5    this machine or job: GPUs, driver, world size, /dev/shm, disk, DNS
  6    out of GPU memory
  130  interrupted          143  stopped by SIGTERM (after a checkpoint, once training has begun)
  170  another rank was lost, or the network to it: a restart with --resume_from_ckpt auto goes on
  171  the training hung: where each rank stood is in the log
  128+n  a rank was ended by signal n (137: SIGKILL, often out of host memory; 134: an NCCL abort)

Example, one container with 4 GPUs:
  docker run --gpus 4 --shm-size 8g -v $PWD/data:/data -v $PWD/outputs:/outputs cad-mllm \\
      --train_data_path /data --output_dir /outputs/run1 --resume_from_ckpt auto \\
      --deepspeed --deepspeed_config configs/deepspeed/ds_zero3_config.json
"""


def launch(
    argv: Sequence[str],
    *,
    trainer: Sequence[str] = TRAINER,
    entry: Sequence[str] = ENTRY,
    hostfile: Path = HOSTFILE,
    patience: Patience = Patience(),  # noqa: B008 (frozen)
) -> int:
    """Train with the flags `argv` on the ranks that the environment asks of this container; the exit code.

    `trainer` is what each rank runs, `entry` what mpirun starts for each rank: this program.
    CAD_MLLM_GRACE_SECONDS takes the place of `patience.grace`.
    """
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return int(ExitCode.DONE)
    block_signals()
    env = dict(os.environ)
    try:
        grace = preflight.seconds(env, "CAD_MLLM_GRACE_SECONDS", patience.grace)
        patience = dataclasses.replace(patience, grace=grace)
        if is_mpi_launcher(env, hostfile):
            return _launch_mpi([*entry, *argv], env, hostfile, patience)
        if is_mpi_rank(env):
            return _run_mpi_rank(trainer, argv, env, patience)
        ended = _launch_ranks(trainer, argv, env, patience)
    except StoppedError as stopped:
        say(str(stopped))
        return stopped.code
    except CadMllmError as error:
        say(f"error: {error}")
        return int(error.exit_code)
    return _conclude(ended, verdict(ended))


def _launch_ranks(
    trainer: Sequence[str], argv: Sequence[str], env: Mapping[str, str], patience: Patience
) -> list[Ended]:
    """Check this container, start its ranks, wait for them."""
    waiting = Waiting()
    place = _checked_place(argv, env)
    if place.master_is_elsewhere:
        preflight.wait_for_names([place.master_addr], env, waiting)
    waiting.sleep(0)  # was a stop asked for meanwhile?
    say(
        f"world size {place.world_size} ({place.started_by}), "
        f"{len(place.ranks)} of them here, meeting at {place.master_addr}:{place.master_port}"
    )
    processes = {
        f"rank {rank.rank}": start(
            [*trainer, *argv], {"PYTHONUNBUFFERED": "1", **env, **place.environment(rank)}
        )
        for rank in place.ranks
    }
    return supervise(processes, patience, STOP_SIGNALS)


def _checked_place(argv: Sequence[str], env: Mapping[str, str]) -> Place:
    default = RunConfig()
    device = flag_value(argv, "device") or default.device
    gpus = preflight.NO_GPUS if device == "cpu" else preflight.find_gpus(env)
    place = read_place(env, gpus=gpus.count)
    preflight.check_gpus(env, gpus, local_world_size=place.local_world_size, device=device)
    preflight.check_shared_memory(env)
    preflight.check_free_disk(env, Path(flag_value(argv, "output_dir") or default.output_dir))
    return place


def _run_mpi_rank(
    trainer: Sequence[str], argv: Sequence[str], env: Mapping[str, str], patience: Patience
) -> int:
    """One rank that mpirun started; mpirun ends the others as soon as this returns a failure."""
    die_with_parent()
    # mpirun gives its ranks a pseudo-terminal, though nobody looks: no progress bars into the log.
    ended = _launch_ranks(trainer, argv, {**env, "TERM": "dumb"}, patience)
    code = verdict(ended)
    if code in (ExitCode.PEER_LOST, _SIGABRT_CODE):
        # Only a consequence: mpirun hands on the first code that it sees, so let the cause go first.
        time.sleep(patience.peers)
    return mpi.code_for_mpirun(code)


def _launch_mpi(entry: Sequence[str], env: Mapping[str, str], hostfile: Path, patience: Patience) -> int:
    """The launcher pod: no rank of its own, but mpirun."""
    waiting = Waiting()
    hosts = mpi.read_hostfile(hostfile)
    ranks_env = mpi.ranks_environment(env, hosts)
    mpi.check_version(env)
    preflight.wait_for_names([host.name for host in hosts], env, waiting)
    command = mpi.mpirun_command(hosts, ranks_env, entry, hostfile=hostfile)
    waiting.sleep(0)
    say(f"world size {ranks_env['CAD_MLLM_WORLD_SIZE']} on {len(hosts)} hosts: {' '.join(command)}")
    ended = supervise({"mpirun": start(command, ranks_env)}, patience, THROUGH_MPIRUN)
    code = mpi.code_of_mpirun(
        verdict(ended), ended_by={sent: STOP_SIGNALS[sent] for sent in THROUGH_MPIRUN.values()}
    )
    return _conclude(ended, code)


def _conclude(ended: Sequence[Ended], code: int) -> int:
    for one in ended:
        if one.code != ExitCode.DONE:
            say(f"{one.name} {describe(one.code)}{', because of the others' if one.consequence else ''}")
    say(f"exit code {code}")
    return code
