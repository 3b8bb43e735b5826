"""Containers as a restricted namespace starts them, through podman; gone at the end, whatever happens."""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

RESTRICTED = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/scratch:rw,mode=1777,size=1g", "--shm-size=256m"),
    *("--user=1000:1000", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory=6g"),
)
"""A pod of the manifests: read-only root, one writable folder, no capabilities."""


def podman(
    *argv: str, timeout: float = 120, check: bool = True, text: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a podman command; output and errors are captured apart."""
    done = subprocess.run(["podman", *argv], capture_output=True, text=text, timeout=timeout)
    assert not check or done.returncode == 0, f"podman {' '.join(argv)}: {done.returncode}\n{done.stderr}"
    return done


def inspect(image: str) -> dict[str, object]:
    """What podman says of an image."""
    (found,) = json.loads(podman("image", "inspect", image).stdout)
    return found


def output_of(image: str, *command: str, options: Sequence[str] = RESTRICTED) -> str:
    """Run a command in place of the entry point; it must succeed."""
    entry, *rest = command
    done = podman("run", "--rm", *options, f"--entrypoint={entry}", image, *rest, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Container:
    """A running container."""

    name: str

    def logs(self) -> str:
        """All that it printed so far."""
        done = podman("logs", self.name)
        return done.stdout + done.stderr

    def is_running(self) -> bool:
        """Whether its first process is there."""
        return podman("inspect", "--format={{.State.Running}}", self.name).stdout.strip() == "true"

    def wait_for(self, text: str, *, seconds: float) -> None:
        """Wait until it printed `text`; fails when it ends before."""
        end = time.monotonic() + seconds
        while text not in self.logs():
            assert self.is_running(), f"{self.name} ended without `{text}`:\n{self.logs()}"
            assert time.monotonic() < end, f"no `{text}` in {seconds} s:\n{self.logs()}"
            time.sleep(1)

    def stop(self) -> None:
        """SIGTERM to its first process, as the kubelet sends it."""
        podman("kill", "--signal=TERM", self.name)

    def exit_code(self, *, seconds: float) -> int:
        """Wait for its end."""
        return int(podman("wait", self.name, timeout=seconds).stdout)


@dataclass(kw_only=True)
class Pods:
    """Containers of one test on a network of their own, with one shared volume for outputs."""

    image: str
    outputs: Path
    _cleanup: ExitStack = field(default_factory=ExitStack)
    _network: str = field(default_factory=lambda: f"cad-mllm-{uuid4().hex[:8]}")

    def __enter__(self) -> Self:
        podman("network", "create", self._network)
        self._cleanup.callback(podman, "network", "rm", "--force", self._network, check=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        mounts: Mapping[Path, str] | None = None,
        command: str | None = None,
    ) -> Container:
        """Start a pod whose name DNS knows; `command` replaces the entry point, mounts are read-only."""
        container = Container(name=f"{name.partition('.')[0]}-{self._network[-8:]}")
        options = [f"--env={key}={value}" for key, value in (env or {}).items()]
        options += [f"--volume={source}:{target}:ro" for source, target in (mounts or {}).items()]
        if command is not None:
            options.append(f"--entrypoint={command}")
        self._cleanup.callback(podman, "rm", "--force", "--time=2", container.name, check=False)
        podman(
            *("run", "--detach", *RESTRICTED, f"--name={container.name}"),
            *(
                f"--network={self._network}",
                f"--network-alias={name}",
                f"--hostname={name.partition('.')[0]}",
            ),
            *(f"--volume={self.outputs}:/outputs", *options, self.image, *argv),
        )
        return container
