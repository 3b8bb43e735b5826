"""What matters in the overlays that train, as numbers: pods, GPUs, memory, configuration, volumes."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import (
    ROOT,
    TRAINING,
    VARIANTS,
    Json,
    Pod,
    copy_project,
    job_of,
    leaves,
    needs_kubectl,
    of_kind,
    pods_of,
    quantity,
    render,
    render_folder,
)

pytestmark = needs_kubectl

GIB = 2**30
CONFIGS = {
    "zero2": "ds_zero2_config.json",
    "zero3": "ds_zero3_config.json",
    "zero3-resident": "ds_zero3_resident.json",
    "zero3-offload": "ds_zero3_offload.json",
}


@dataclass(frozen=True, kw_only=True)
class Expected:
    kind: str
    roles: dict[str, int]
    """Role -> pods."""
    gpus: int
    """Of a pod with ranks."""
    memory: str
    shm: str
    zero: str


def expected(name: str) -> Expected:
    zero = next(one for one in sorted(VARIANTS, key=len, reverse=True) if one in name)
    single = name.endswith("-1x4")
    memory = dict.fromkeys(VARIANTS, ("28Gi", "104Gi")) | {"zero3-offload": ("72Gi", "232Gi")}
    if name.startswith("mpi-"):
        kind, roles = "MPIJob", {"Launcher": 1, "Worker": 4}
    elif name.startswith("trainjob-"):
        kind, roles = "TrainJob", {"node": 4}
    else:
        kind, roles = "PyTorchJob", {"Master": 1} if single else {"Master": 1, "Worker": 3}
    return Expected(
        kind=kind,
        roles=roles,
        gpus=4 if single else 1,
        memory=memory[zero][single],
        shm="8Gi" if single else "2Gi",
        zero=zero,
    )


def rank_pods(objects: list[Json]) -> list[Pod]:
    return [pod for pod in pods_of(objects) if pod.ranks]


@pytest.mark.parametrize("name", TRAINING)
def test_pods_gpus_and_memory(name: str) -> None:
    objects, golden = render(name), expected(name)
    assert job_of(objects)["kind"] == golden.kind
    assert {pod.role: pod.count for pod in pods_of(objects)} == golden.roles
    assert sum(pod.count * pod.gpus for pod in pods_of(objects)) == 4
    for pod in rank_pods(objects):
        own = pod.main["resources"]
        assert own["requests"] == own["limits"], "quality class Guaranteed"
        assert (pod.gpus, own["limits"]["memory"]) == (golden.gpus, golden.memory)
        assert own["limits"]["cpu"] == 8 * golden.gpus
        (shm,) = (volume for volume in pod.spec["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": golden.shm}
        assert pod.env["CAD_MLLM_WORLD_SIZE"] == "4"


@pytest.mark.parametrize("name", TRAINING)
def test_memory_is_computed_from_the_model(name: str) -> None:
    """The sums in the comments of k8s/components/zero, once more."""
    parameters, golden = 8.19e9, expected(name)
    loading = parameters * 2 * golden.gpus
    # 23 bytes a parameter, measured, a quarter of the model in each rank; and the export in bf16 in rank 0.
    resting = parameters * (23 * golden.gpus / 4 + 2) if golden.zero == "zero3-offload" else 0
    processes = (4 + 4 * 1) * GIB * golden.gpus
    workers = yaml.safe_load((ROOT / "configs/train/qwen3-8b-lora.yaml").read_text())["num_workers"]
    assert workers == 4
    needed = max(loading, resting) + processes + quantity(golden.shm)
    assert quantity(golden.memory) == math.ceil(needed / GIB / 4) * 4 * GIB


@pytest.mark.parametrize("name", TRAINING)
def test_the_configuration_that_is_mounted_is_that_of_the_repository(name: str) -> None:
    objects, golden = render(name), expected(name)
    maps = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
    for pod in pods_of(objects):
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.main["volumeMounts"]}
        sources = {v["name"]: v["configMap"] for v in pod.spec["volumes"] if "configMap" in v}
        deepspeed = maps[sources[mounts["/etc/cad-mllm/deepspeed"]]["name"]]
        train = sources[mounts["/etc/cad-mllm/train"]]
        assert train["items"] == [{"key": "qwen3-8b-lora.yaml", "path": "train.yaml"}]
        assert (
            maps[train["name"]]["qwen3-8b-lora.yaml"]
            == (ROOT / "configs/train/qwen3-8b-lora.yaml").read_text()
        )
        file = CONFIGS[golden.zero]
        assert json.loads(deepspeed[file]) == json.loads((ROOT / "configs/deepspeed" / file).read_text())
        if "args" in pod.main:
            arguments = pod.main["args"]
            assert arguments[-3:] == ["--deepspeed", "--deepspeed_config", f"/etc/cad-mllm/deepspeed/{file}"]


def test_every_deepspeed_file_that_is_shipped_is_in_the_pods() -> None:
    shipped = {path.name for path in (ROOT / "configs/deepspeed").iterdir()}
    maps = {item["metadata"]["name"]: item["data"] for item in render("zero3") if item["kind"] == "ConfigMap"}
    (mounted,) = (set(data) for name, data in maps.items() if name.startswith("cad-mllm-deepspeed-"))
    assert mounted == shipped


@pytest.mark.parametrize("name", TRAINING)
def test_volumes_and_environment_of_the_ranks(name: str) -> None:
    for pod in pods_of(render(name)):
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in pod.spec["volumes"]
            if "persistentVolumeClaim" in v
        }
        mounted = {mount["mountPath"]: claims.get(mount["name"]) for mount in pod.main["volumeMounts"]}
        assert {path: claim for path, claim in mounted.items() if claim} == {
            "/data": "cad-mllm-data",
            "/models": "cad-mllm-models",
            "/outputs": "cad-mllm-outputs",
        }
        assert pod.env["HF_HUB_OFFLINE"] == "1"
        assert pod.env["HF_HUB_CACHE"] == "/models/hub"
        assert pod.env["NCCL_IB_DISABLE"] == "1"
        assert pod.env["WANDB_API_KEY"] is None, "from a Secret"
        assert "HF_TOKEN" not in pod.env


@pytest.mark.parametrize("name", TRAINING)
def test_an_l40_that_nobody_shares(name: str) -> None:
    for pod in rank_pods(render(name)):
        required = pod.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert required["nodeSelectorTerms"] == [
            {
                "matchExpressions": [
                    {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-L40"]}
                ]
            }
        ]


def test_master_and_workers_are_the_same_pod() -> None:
    """Rank 0 must not differ from the others in anything but its role."""
    replicas = of_kind(render("zero3"), "PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]


def test_the_same_pod_in_every_kind_of_job() -> None:
    """Container names and what starts them aside."""

    def bare(pod: Pod) -> Json:
        spec = {key: value for key, value in pod.spec.items() if key not in ("containers", "restartPolicy")}
        own = {"name", "command", "args", "ports", "readinessProbe"}
        return {**spec, "container": {key: value for key, value in pod.main.items() if key not in own}}

    def text(name: str, kind: str) -> str:
        role = {"zero3": "Master", "mpi-zero3": "Worker", "trainjob-zero3": "node"}[name]
        (pod,) = (one for one in pods_of(render(name)) if one.role == role)
        return json.dumps(bare(pod), sort_keys=True).replace(f"{name}-", "-").replace(f'"{name}"', '""')

    texts = {text(name, name) for name in ("zero3", "mpi-zero3", "trainjob-zero3")}
    # The hash of a ConfigMap follows from its content alone.
    assert len(texts) == 1


def without_name(path: str, value: object, name: str) -> object:
    """A value of a manifest with the overlay's name taken out of it."""
    if path.endswith("/cad-mllm/zero"):
        return value
    if value == name:
        return "OVERLAY"
    return re.sub(rf"^(\S*cad-mllm(-deepspeed|-train)?)-{name}(-\w{{10}})?$", r"\1-OVERLAY\3", str(value))


@pytest.mark.parametrize("family", ["{}", "{}-1x4", "mpi-{}", "trainjob-{}"])
def test_zero_variants_differ_in_the_zero_component_alone(family: str) -> None:
    """In what is rendered, and in what is written."""
    flat: dict[str, dict[str, object]] = {}
    for zero in VARIANTS:
        name = family.format(zero)
        flat[zero] = {
            f"{item['kind']}/{without_name('', item['metadata']['name'], name)}{path}": without_name(
                path, value, name
            )
            for item in render(name)
            for path, value in leaves(item)
        }
    paths = set().union(*flat.values())
    different = {path for path in paths if len({str(one.get(path)) for one in flat.values()}) > 1}
    reasons = ("/cad-mllm/zero", "/args/", "/resources/requests/memory", "/resources/limits/memory")
    assert {next((r for r in reasons if r in path), path) for path in different} == set(reasons)
    for path in different:
        values = [one[path] for one in flat.values()]
        if "/args/" in path:
            assert values == [f"/etc/cad-mllm/deepspeed/{CONFIGS[zero]}" for zero in VARIANTS]
        if "/cad-mllm/zero" in path:
            assert values == list(VARIANTS)

    written = {
        zero: (ROOT / "k8s/overlays" / family.format(zero) / "kustomization.yaml")
        .read_text()
        .replace(family.format(zero), "OVERLAY")
        .replace(f"components/zero/{zero}\n", "components/zero/ZERO\n")
        for zero in VARIANTS
    }
    assert len(set(written.values())) == 1


def config_maps(objects: list[Json]) -> dict[str, str]:
    """Name without hash -> name."""
    found = (item["metadata"]["name"] for item in objects if item["kind"] == "ConfigMap")
    return {name.rpartition("-")[0]: name for name in found}


@pytest.mark.parametrize("overlay", ["zero3", "mpi-zero3", "trainjob-zero3"])
def test_a_changed_configuration_gets_another_name_and_reaches_the_job(overlay: str, tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    before = config_maps(render(overlay))
    path = project / "configs/deepspeed/ds_zero3_config.json"
    path.write_text(path.read_text().replace('"steps_per_print": 1000000', '"steps_per_print": 7'))
    objects = render_folder(project / "k8s/overlays" / overlay)
    after = config_maps(objects)
    assert set(before) == set(after) == {f"cad-mllm-deepspeed-{overlay}", f"cad-mllm-train-{overlay}"}
    assert before[f"cad-mllm-deepspeed-{overlay}"] != after[f"cad-mllm-deepspeed-{overlay}"]
    assert before[f"cad-mllm-train-{overlay}"] == after[f"cad-mllm-train-{overlay}"]
    for pod in pods_of(objects):
        named = {v["configMap"]["name"] for v in pod.spec["volumes"] if "configMap" in v}
        assert named == set(after.values())


@pytest.mark.parametrize(
    ("overlay", "policies"),
    [
        ("zero3", {"Master": "ExitCode", "Worker": "ExitCode"}),
        ("mpi-zero3", {"Launcher": "Never", "Worker": "OnFailure"}),
    ],
)
def test_what_is_tried_again(overlay: str, policies: dict[str, str]) -> None:
    """PyTorchJob: codes from 128 on. TrainJob: the same (see the rule). MPIJob: all codes."""
    spec = job_of(render(overlay))["spec"]
    replicas = spec.get("pytorchReplicaSpecs") or spec["mpiReplicaSpecs"]
    assert {role: one["restartPolicy"] for role, one in replicas.items()} == policies
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
    assert 1 <= spec["runPolicy"]["backoffLimit"] <= 10
    # A run takes days: nothing ends it before its time.
    assert "activeDeadlineSeconds" not in spec["runPolicy"]


@pytest.mark.parametrize("overlay", ["smoke", "smoke-cpu"])
def test_a_smoke_job_is_over_in_half_an_hour(overlay: str) -> None:
    objects = render(overlay)
    assert of_kind(objects, "PyTorchJob")["spec"]["runPolicy"]["activeDeadlineSeconds"] == 1800
    assert {pod.role: pod.count for pod in pods_of(objects)} == {"Master": 1, "Worker": 1}
    assert {pod.gpus for pod in pods_of(objects)} == {1 if overlay == "smoke" else 0}
    for pod in pods_of(objects):
        assert pod.env["CAD_MLLM_WORLD_SIZE"] == "2"
        assert {v["name"] for v in pod.spec["volumes"]}.isdisjoint({"data", "models"})


def test_preparing_the_data_uses_the_cores_that_it_asks_for() -> None:
    """`--workers 0` would count the cores of the node."""
    (pod,) = pods_of(render("prepare-data"))
    arguments = pod.main["args"]
    assert arguments[arguments.index("--workers") + 1] == str(pod.main["resources"]["limits"]["cpu"])
    assert arguments[arguments.index("--out") + 1] == "/data/omnicad"
    assert {mount["mountPath"]: mount.get("readOnly", False) for mount in pod.main["volumeMounts"]}[
        "/data"
    ] is False


def test_each_index_of_preparing_the_data_makes_its_part() -> None:
    """And what a retry cannot mend fails the job, while a pod that the cluster moved does not count."""
    objects = render("prepare-data")
    job = of_kind(objects, "Job")["spec"]
    (pod,) = pods_of(objects)
    arguments = pod.main["args"]
    assert job["completionMode"] == "Indexed"
    assert arguments[arguments.index("--part") + 1] == f"$(JOB_COMPLETION_INDEX)/{job['completions']}"
    fetched = pod.containers[0]["args"]
    folder, file = fetched[fetched.index("--local-dir") + 1], fetched[-1]
    assert arguments[arguments.index("--archive") + 1] == f"{folder}/{file}"
    ignored, failed = job["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    assert (failed["action"], failed["onExitCodes"]["values"]) == ("FailJob", [2, 3])


def test_preparing_the_models_fetches_what_the_trainer_names() -> None:
    (pod,) = pods_of(render("prepare-model"))
    fetched = [container["args"] for container in pod.containers]
    config = yaml.safe_load((ROOT / "configs/train/qwen3-8b-lora.yaml").read_text())
    assert fetched[:2] == [[config["llm_model_name"]], [config["vision_model_name"]]]
    arguments = pods_of(render("zero3"))[0].main["args"]
    weights = arguments[arguments.index("--point_encoder") + 1]
    folder = fetched[2][fetched[2].index("--local-dir") + 1]
    assert weights == f"{folder}/{fetched[2][-1]}"
    for container in pod.containers:
        variables = {one["name"]: one for one in container["env"]}
        assert variables["HF_HUB_CACHE"]["value"] == "/models/hub"
        assert "HF_HUB_OFFLINE" not in variables
        assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
