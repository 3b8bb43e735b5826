"""An overlay becomes a list of Kubernetes objects: `kubectl kustomize`, parsed and looked at."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from cad_mllm.cluster.jobs import KINDS, JobKind, Json, kind_of
from cad_mllm.errors import ConfigError, PreflightError

_KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
_RENDER_SECONDS = 120
_WORLD_SIZE = "CAD_MLLM_WORLD_SIZE"


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """What an overlay renders to."""

    path: Path
    objects: tuple[Json, ...]
    job: Json
    """The one job among the objects."""
    kind: JobKind
    """Of the job."""

    @property
    def name(self) -> str:
        """The job's name."""
        name: str = self.job["metadata"]["name"]
        return name

    @property
    def namespace(self) -> str | None:
        """The namespace that the objects name, if they name one."""
        named = {item["metadata"]["namespace"] for item in self.objects if "namespace" in item["metadata"]}
        if len(named) > 1:
            raise ConfigError(
                f"{self.path} puts its objects into several namespaces ({', '.join(sorted(named))}): "
                f"set one `namespace:` in {self.path}/kustomization.yaml"
            )
        return next(iter(named), None)


def render(path: Path) -> Overlay:
    """The objects of the overlay in the folder `path`.

    Raises PreflightError where kubectl is missing, ConfigError for a folder that is no overlay, that does
    not render, or that does not hold exactly one job.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; the overlays are listed by `ls k8s/overlays`")
    if not any((path / name).is_file() for name in _KUSTOMIZATIONS):
        raise ConfigError(f"{path} holds no kustomization.yaml: give the folder of an overlay")
    try:
        done = subprocess.run(
            ["kubectl", "kustomize", str(path)], capture_output=True, text=True, timeout=_RENDER_SECONDS
        )
    except FileNotFoundError:
        raise PreflightError(
            "kubectl is not on the PATH: install it (https://kubernetes.io/docs/tasks/tools/), "
            "then try `kubectl version --client`"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"`kubectl kustomize {path}` took longer than {_RENDER_SECONDS} s: does it fetch a remote base?"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"`kubectl kustomize {path}` fails: {_reason(done.stderr)}")
    objects = _parse(done.stdout, path)
    jobs = [item for item in objects if kind_of(item) is not None]
    if len(jobs) != 1:
        wanted = ", ".join(kind.kind for kind in KINDS)
        found = ", ".join(f"{job['kind']} {job['metadata']['name']}" for job in jobs) or "none"
        raise ConfigError(
            f"{path} must render to one job ({wanted}), it has {found}; "
            f"without a job: `kubectl apply -k {path}`"
        )
    kind = kind_of(jobs[0])
    assert kind is not None
    return Overlay(path=path, objects=tuple(objects), job=jobs[0], kind=kind)


def pod_templates(item: Json) -> Iterator[Json]:
    """Every pod template ({metadata, spec}) in an object, whatever its kind: what holds `containers`."""
    for key, value in item.items():
        if key in ("template", "spec") and isinstance(value, dict):
            spec = value.get("spec")
            if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
                yield value
                continue
        if isinstance(value, dict):
            yield from pod_templates(value)
        elif isinstance(value, list):
            for element in value:
                if isinstance(element, dict):
                    yield from pod_templates(element)


def world_size(overlay: Overlay) -> int:
    """The number of ranks that the overlay declares in CAD_MLLM_WORLD_SIZE.

    Raises ConfigError where no container says it, or two disagree.
    """
    declared = {
        str(variable.get("value"))
        for item in overlay.objects
        for variable in _environment(item)
        if variable.get("name") == _WORLD_SIZE
    }
    if len(declared) != 1 or not next(iter(declared)).isdigit():
        said = ", ".join(sorted(declared)) or "nothing"
        raise ConfigError(
            f"{overlay.path}: {_WORLD_SIZE} must be one number in the job's env, it says {said}"
        )
    return int(declared.pop())


def _environment(item: Json) -> Iterator[Json]:
    """The `env` entries anywhere in an object: pod templates, and TrainJob's `trainer.env`."""
    for key, value in item.items():
        if key == "env" and isinstance(value, list):
            yield from (entry for entry in value if isinstance(entry, dict))
        elif isinstance(value, dict):
            yield from _environment(value)
        elif isinstance(value, list):
            for element in value:
                if isinstance(element, dict):
                    yield from _environment(element)


def _parse(text: str, path: Path) -> list[Json]:
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} renders to YAML that does not parse: {' '.join(str(error).split())}"
        ) from None
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= set(document):
            raise ConfigError(f"{path} renders to something that is no Kubernetes object: {document!r:.80}")
    return documents


def _reason(stderr: str) -> str:
    """The part of kubectl's last line that says what is wrong."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["it says nothing"]
    return " ".join(lines[-1].removeprefix("error: ").split())
