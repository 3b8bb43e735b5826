"""Each rule fails on a manifest that is broken in its way: a check that cannot fail proves nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.manifests import Json, needs_kubectl, of_kind, pods_of, render
from tests.k8s.rules import RULES

pytestmark = needs_kubectl

Break = Callable[[list[Json]], Any]


def pod(objects: list[Json]) -> Json:
    return pods_of(objects)[0].spec


def main(objects: list[Json]) -> Json:
    container: Json = pod(objects)["containers"][0]
    return container


def spec(kind: str) -> Callable[[list[Json]], Json]:
    return lambda objects: of_kind(objects, kind)["spec"]


def master(objects: list[Json]) -> Json:
    one: Json = spec("PyTorchJob")(objects)["pytorchReplicaSpecs"]["Master"]
    return one


def mpi(role: str) -> Callable[[list[Json]], Json]:
    return lambda objects: spec("MPIJob")(objects)["mpiReplicaSpecs"][role]


def sshd(objects: list[Json]) -> Json:
    container: Json = mpi("Worker")(objects)["template"]["spec"]["containers"][0]
    return container


def node(objects: list[Json]) -> Json:
    one: Json = spec("TrainingRuntime")(objects)["template"]["spec"]["replicatedJobs"][0]
    return one


def put(where: Callable[[list[Json]], Any], key: Any, value: Any) -> Break:
    return lambda objects: where(objects).__setitem__(key, value)


def drop(where: Callable[[list[Json]], Any], key: Any) -> Break:
    return lambda objects: where(objects).pop(key)


def setenv(name: str, value: str) -> Break:
    def change(objects: list[Json]) -> None:
        variables = main(objects)["env"]
        variables[:] = [one for one in variables if one["name"] != name] + [{"name": name, "value": value}]

    return change


def item(name: str, among: str) -> Callable[[list[Json]], Json]:
    """The element called `name` of a list of the first pod, or of its container."""

    def find(objects: list[Json]) -> Json:
        where = pod(objects) if among == "volumes" else main(objects)
        (found,) = (one for one in where[among] if name in (one.get("name"), one.get("mountPath")))
        assert isinstance(found, dict)
        return found

    return find


def flag(name: str, value: str | None) -> Break:
    """Another value for a flag, or none of both."""

    def change(objects: list[Json]) -> None:
        arguments = main(objects)["args"]
        at = arguments.index(name)
        arguments[at : at + 2] = [] if value is None else [name, value]

    return change


def first(kind: str) -> Callable[[list[Json]], Json]:
    return lambda objects: next(one for one in objects if one["kind"] == kind)


def metadata(kind: str) -> Callable[[list[Json]], Json]:
    return lambda objects: first(kind)(objects)["metadata"]


def context(objects: list[Json]) -> Json:
    own: Json = main(objects)["securityContext"]
    return own


def pod_context(objects: list[Json]) -> Json:
    own: Json = pod(objects)["securityContext"]
    return own


def limits(side: str) -> Callable[[list[Json]], Json]:
    return lambda objects: main(objects)["resources"][side]


def claims(objects: list[Json]) -> Json:
    one: Json = item("data", "volumes")(objects)["persistentVolumeClaim"]
    return one


def secret(objects: list[Json]) -> Json:
    one: Json = item("WANDB_API_KEY", "env")(objects)["valueFrom"]["secretKeyRef"]
    return one


def run_policy(kind: str) -> Callable[[list[Json]], Json]:
    return lambda objects: spec(kind)(objects)["runPolicy"]


def failure_rule(objects: list[Json]) -> Json:
    one: Json = spec("TrainingRuntime")(objects)["template"]["spec"]["failurePolicy"]["rules"][0]
    return one


def failure_policy(objects: list[Json]) -> Json:
    rule: Json = node(objects)["template"]["spec"]["podFailurePolicy"]["rules"][0]
    return rule


def affinity(objects: list[Json]) -> Json:
    own: Json = pod(objects)["affinity"]
    return own


def gpu_expression(objects: list[Json]) -> Json:
    terms = affinity(objects)["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    one: Json = terms[0]["matchExpressions"][0]
    return one


def near(objects: list[Json]) -> Json:
    one: Json = affinity(objects)["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0][
        "podAffinityTerm"
    ]
    return one


BROKEN: list[tuple[str, str, Break, str]] = [
    # rule, overlay, what breaks it, what the rule says
    ("schema", "zero3", put(spec("PyTorchJob"), "replicaSpecs", {}), "unexpected"),
    ("schema", "zero3", put(main, "comand", ["x"]), "'comand' was unexpected"),
    ("schema", "zero3", put(main, "args", "--help"), "is not of type 'array'"),
    ("schema", "zero3", put(master, "replicas", "1"), "is not of type 'integer'"),
    ("schema", "mpi-zero3", put(spec("MPIJob"), "mpiImplementation", "LAM"), "is not one of"),
    ("schema", "mpi-zero3", put(sshd, "readinesProbe", {}), "was unexpected"),
    ("schema", "trainjob-zero3", put(spec("TrainJob"), "numNodes", 4), "was unexpected"),
    ("schema", "trainjob-zero3", put(spec("TrainJob"), "trainer", {"numProcPerNode": "auto"}), "'integer'"),
    ("schema", "trainjob-zero3", put(node, "name", 1), "is not of type 'string'"),
    ("schema", "prepare-data", put(spec("Job"), "completion", 1), "was unexpected"),
    ("schema", "smoke", put(spec("PersistentVolumeClaim"), "accessMode", "x"), "was unexpected"),
    ("schema", "zero3", put(spec("NetworkPolicy"), "podSelectors", {}), "was unexpected"),
    ("schema", "zero3", put(spec("PodDisruptionBudget"), "maxUnavailable", 0), "was unexpected"),
    ("schema", "zero3", put(first("ConfigMap"), "immutible", True), "unknown field immutible"),
    (
        "schema",
        "zero3",
        put(first("PyTorchJob"), "apiVersion", "kubeflow.org/v1beta1"),
        "expected kubeflow.org/v1",
    ),
    ("schema", "zero3", put(first("PyTorchJob"), "kind", "TorchJob"), "expected None"),
    ("names", "zero3", put(metadata("PyTorchJob"), "name", "3-cad"), "no DNS-1035"),
    ("names", "zero3", put(metadata("PyTorchJob"), "name", "c" * 54), "no DNS-1035"),
    ("names", "zero3", drop(metadata("NetworkPolicy"), "labels"), "different instances"),
    (
        "names",
        "zero3",
        put(metadata("ConfigMap"), "labels", {"app.kubernetes.io/instance": "zero3"}),
        "is not cad-mllm",
    ),
    ("names", "zero3", setenv("CAD_MLLM_OVERLAY", "overlay"), "placeholder 'overlay'"),
    ("names", "zero3", lambda objects: objects.append(objects[0]), "2 times"),
    (
        "names",
        "zero3",
        put(metadata("ConfigMap"), "annotations", {"config.kubernetes.io/local-config": "true"}),
        "local",
    ),
    ("pytorchjob", "zero3", put(master, "replicas", 2), "Master.replicas must be 1"),
    (
        "pytorchjob",
        "zero3",
        lambda o: spec("PyTorchJob")(o)["pytorchReplicaSpecs"]["Worker"].update(replicas=0),
        "leave",
    ),
    ("pytorchjob", "zero3", put(spec("PyTorchJob"), "nprocPerNode", "four"), "nprocPerNode 'four'"),
    ("pytorchjob", "zero3-1x4", put(spec("PyTorchJob"), "elasticPolicy", {}), "needs Worker"),
    ("pytorchjob", "zero3", put(main, "name", "trainer"), "named pytorch"),
    ("pytorchjob", "zero3", put(main, "image", ""), "without image"),
    ("pytorchjob", "zero3", put(master, "restartPolicy", "OnFailure"), "must be ExitCode"),
    ("pytorchjob", "zero3", put(pod, "restartPolicy", "Never"), "overwrites"),
    ("pytorchjob", "zero3", put(run_policy("PyTorchJob"), "cleanPodPolicy", "Some"), "cleanPodPolicy"),
    ("pytorchjob", "zero3", drop(run_policy("PyTorchJob"), "backoffLimit"), "backoffLimit"),
    ("pytorchjob", "zero3", drop(run_policy("PyTorchJob"), "ttlSecondsAfterFinished"), "ttlSeconds"),
    ("mpijob", "mpi-zero2", put(mpi("Launcher"), "replicas", 2), "Launcher.replicas must be 1"),
    ("mpijob", "mpi-zero2", put(mpi("Worker"), "replicas", 0), "at least 1"),
    ("mpijob", "mpi-zero2", put(mpi("Launcher"), "restartPolicy", "ExitCode"), "Never or OnFailure"),
    ("mpijob", "mpi-zero2", put(metadata("MPIJob"), "name", "c" * 60), "too long"),
    ("mpijob", "mpi-zero2", drop(spec("MPIJob"), "sshAuthMountPath"), "is missing"),
    ("mpijob", "mpi-zero2", put(spec("MPIJob"), "sshAuthMountPath", "/root/.ssh"), "image's user"),
    ("mpijob", "mpi-zero2", put(spec("MPIJob"), "mpiImplementation", "Intel"), "must be OpenMPI"),
    ("mpijob", "mpi-zero2", drop(run_policy("MPIJob"), "cleanPodPolicy"), "cleanPodPolicy"),
    ("mpijob", "mpi-zero2", put(limits("limits"), "nvidia.com/gpu", 1), "the launcher holds GPUs"),
    ("mpijob", "mpi-zero2", drop(sshd, "command"), "image's sshd"),
    ("mpijob", "mpi-zero2", put(sshd, "ports", [{"containerPort": 22}]), "on 2222"),
    ("mpijob", "mpi-zero2", drop(sshd, "readinessProbe"), "readinessProbe"),
    ("mpijob", "mpi-zero2", drop(spec("MPIJob"), "launcherCreationPolicy"), "WaitForWorkersReady"),
    ("trainjob", "trainjob-zero2", put(metadata("TrainingRuntime"), "name", "other"), "runtimeRef"),
    ("trainjob", "trainjob-zero2", drop(spec("TrainJob"), "trainer"), "no PET_*"),
    ("trainjob", "trainjob-zero2", lambda o: o.reverse(), "created before the job"),
    ("trainjob", "trainjob-zero2", put(failure_rule, "name", "no-retry"), "of the name no-retry"),
    ("trainjob", "trainjob-zero2", put(spec("TrainJob"), "trainer", {"numNodes": 2}), "numNodes"),
    (
        "trainjob",
        "trainjob-zero2",
        put(spec("TrainingRuntime"), "mlPolicy", {"numNodes": 4}),
        "mlPolicy.torch",
    ),
    (
        "trainjob",
        "trainjob-zero2",
        lambda o: spec("TrainingRuntime")(o)["template"]["spec"].pop("failurePolicy"),
        "failurePolicy",
    ),
    ("trainjob", "trainjob-zero2", lambda o: node(o)["template"].pop("metadata"), "no ancestor label"),
    ("trainjob", "trainjob-zero2", put(node, "replicas", 4), "must be 1"),
    ("trainjob", "trainjob-zero2", put(main, "name", "trainer"), "named node"),
    (
        "trainjob",
        "trainjob-zero2",
        put(failure_policy, "onExitCodes", {"operator": "In", "values": [1, 2]}),
        "1 to 127",
    ),
    (
        "trainjob",
        "trainjob-zero2",
        put(failure_policy, "onExitCodes", {"operator": "In", "values": [0, 2, 1]}),
        "bad exit codes",
    ),
    ("trainjob", "trainjob-zero2", put(pod, "restartPolicy", "OnFailure"), "needs restartPolicy Never"),
    ("job", "prepare-data", drop(pod, "restartPolicy"), "must be Never or OnFailure"),
    ("job", "prepare-data", drop(spec("Job"), "completions"), "needs completions"),
    ("job", "prepare-data", drop(spec("Job"), "backoffLimit"), "backoffLimit"),
    ("job", "prepare-data", put(main, "name", "prepare"), "unknown container cad-mllm"),
    ("restricted", "zero3", put(pod, "hostNetwork", True), "hostNetwork"),
    ("restricted", "zero3", put(pod, "hostIPC", True), "hostIPC"),
    ("restricted", "zero3", put(pod, "hostPID", True), "hostPID"),
    ("restricted", "zero3", put(item("data", "volumes"), "hostPath", {"path": "/data"}), "of type hostPath"),
    (
        "restricted",
        "zero3",
        put(pod_context, "sysctls", [{"name": "kernel.shm_rmid_forced", "value": "0"}]),
        "sysctls",
    ),
    ("restricted", "zero3", put(context, "privileged", True), "privileged"),
    ("restricted", "zero3", drop(context, "allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
    ("restricted", "zero3", put(context, "capabilities", {"drop": ["NET_RAW"]}), "does not drop"),
    ("restricted", "zero3", put(context, "capabilities", {"drop": ["ALL"], "add": ["IPC_LOCK"]}), "adds"),
    ("restricted", "zero3", drop(pod_context, "runAsNonRoot"), "runAsNonRoot"),
    ("restricted", "zero3", put(context, "runAsUser", 0), "runs as root"),
    ("restricted", "zero3", drop(pod_context, "seccompProfile"), "no seccomp"),
    ("restricted", "zero3", put(context, "seccompProfile", {"type": "Unconfined"}), "no seccomp"),
    ("restricted", "zero3", put(context, "procMount", "Unmasked"), "procMount"),
    ("restricted", "zero3", put(main, "ports", [{"containerPort": 1, "hostPort": 1}]), "hostPort"),
    ("restricted", "zero3", put(context, "appArmorProfile", {"type": "Unconfined"}), "AppArmor"),
    ("restricted", "zero3", put(context, "seLinuxOptions", {"user": "root"}), "SELinux"),
    ("restricted", "zero3", put(context, "windowsOptions", {"hostProcess": True}), "hostProcess"),
    (
        "restricted",
        "prepare-model",
        lambda o: pod(o)["initContainers"][1].pop("securityContext"),
        "image-encoder",
    ),
    ("least_privilege", "zero3", put(pod_context, "runAsUser", 1001), "runAsUser is not 1000"),
    ("least_privilege", "zero3", drop(pod_context, "fsGroup"), "fsGroup is not 1000"),
    ("least_privilege", "zero3", drop(pod, "automountServiceAccountToken"), "service account token"),
    ("least_privilege", "zero3", drop(pod, "enableServiceLinks"), "every service"),
    ("least_privilege", "zero3", drop(context, "readOnlyRootFilesystem"), "writable"),
    ("least_privilege", "zero3", setenv("WANDB_API_KEY", "abc"), "written into the manifest"),
    ("volumes", "zero3", put(item("/data", "volumeMounts"), "name", "dta"), "unknown volume dta"),
    ("volumes", "zero3", put(item("/data", "volumeMounts"), "mountPath", "/models"), "two mounts"),
    ("volumes", "zero3", lambda o: main(o)["env"].append({"name": "HOME", "value": "/scratch"}), "set twice"),
    ("volumes", "zero3", setenv("TRITON_CACHE_DIR", "/home/mpiuser/.triton"), "TRITON_CACHE_DIR"),
    ("volumes", "zero3", setenv("HF_HOME", "/models"), "HF_HOME"),
    ("volumes", "zero3", lambda o: main(o)["env"].pop(0) and setenv("WANDB_DIR", "/outputs")(o), "WANDB_DIR"),
    ("volumes", "zero3", lambda o: main(o)["volumeMounts"].remove(item("/tmp", "volumeMounts")(o)), "/tmp"),
    (
        "volumes",
        "zero3",
        lambda o: main(o)["volumeMounts"].remove(item("/data", "volumeMounts")(o)),
        "mounted nowhere",
    ),
    ("volumes", "zero3", put(item("scratch", "volumes"), "emptyDir", {}), "has no size"),
    ("volumes", "zero3", drop(item("/data", "volumeMounts"), "readOnly"), "/data is writable"),
    ("volumes", "zero3", put(item("/outputs", "volumeMounts"), "readOnly", True), "/outputs is not writable"),
    ("volumes", "zero3", put(item("shm", "volumes"), "emptyDir", {"sizeLimit": "2Gi"}), "is not memory"),
    ("resources", "zero3", drop(limits("requests"), "memory"), "no requests of memory"),
    ("resources", "zero3", drop(limits("limits"), "cpu"), "no limits of cpu"),
    ("resources", "zero3", put(limits("limits"), "memory", "64Gi"), "overcommitted"),
    ("resources", "zero3", put(limits("limits"), "nvidia.com/gpu", 2), "GPU requests and limits differ"),
    (
        "resources",
        "zero3",
        put(item("scratch", "volumes"), "emptyDir", {"sizeLimit": "9Gi"}),
        "does not cover the emptyDirs",
    ),
    (
        "resources",
        "zero3",
        put(item("shm", "volumes"), "emptyDir", {"medium": "Memory", "sizeLimit": "28Gi"}),
        "does not cover /dev/shm",
    ),
    ("resources", "zero3", setenv("CAD_MLLM_MIN_SHM_GB", "3"), "CAD_MLLM_MIN_SHM_GB 3"),
    ("resources", "zero3", setenv("CAD_MLLM_WORLD_SIZE", "8"), "of 4 ranks"),
    ("resources", "zero3", put(spec("PyTorchJob"), "nprocPerNode", "2"), "1 GPUs for 2 processes"),
    ("resources", "mpi-zero3", put(spec("MPIJob"), "slotsPerWorker", 4), "of 16 ranks"),
    (
        "references",
        "zero3",
        lambda o: item("train-config", "volumes")(o)["configMap"].update(name="train"),
        "not among the objects",
    ),
    (
        "references",
        "zero3",
        lambda o: item("train-config", "volumes")(o)["configMap"]["items"][0].update(key="big.yaml"),
        "no key big.yaml",
    ),
    ("references", "zero3", put(claims, "claimName", "data"), "unknown claim data"),
    (
        "references",
        "smoke",
        lambda o: item("outputs", "volumes")(o)["persistentVolumeClaim"].update(claimName="cad-mllm-outputs"),
        "of its own",
    ),
    ("references", "zero3", put(secret, "name", "wandb"), "unknown Secret wandb"),
    ("references", "zero3", drop(secret, "optional"), "is not optional"),
    (
        "references",
        "zero3",
        lambda o: pod(o)["volumes"].append({"name": "s", "secret": {"secretName": "s"}}),
        "not mounted",
    ),
    (
        "references",
        "zero3",
        lambda o: o.append({"kind": "ConfigMap", "metadata": {"name": "x"}, "data": {}}),
        "used by nothing",
    ),
    ("stopping", "zero3", put(pod, "terminationGracePeriodSeconds", 240), "not below the pod's grace"),
    ("stopping", "zero3", drop(pod, "terminationGracePeriodSeconds"), "not below the pod's grace"),
    (
        "stopping",
        "zero3",
        lambda o: main(o)["env"].remove(item("CAD_MLLM_GRACE_SECONDS", "env")(o)),
        "GRACE_SECONDS 0",
    ),
    ("launcher", "zero3", setenv("CAD_MLLM_WORLDSIZE", "4"), "unknown variable"),
    ("launcher", "zero3", setenv("PET_NNODES", "4"), "is the operator's"),
    ("launcher", "zero3", setenv("WORLD_SIZE", "4"), "is the operator's"),
    ("launcher", "zero3", setenv("CAD_MLLM_OVERLAY", "zero2"), "is not the overlay"),
    ("launcher", "zero3", setenv("CAD_MLLM_IMAGE", "cad-mllm:v0"), "is not the image"),
    ("launcher", "zero3", put(main, "command", ["python"]), "replaces the launcher"),
    ("launcher", "mpi-zero3", put(sshd, "args", ["--help"]), "takes no training flags"),
    ("launcher", "zero3", put(main, "args", ["--deepspeedo"]), "unknown flag --deepspeedo"),
    (
        "launcher",
        "zero3",
        flag("--deepspeed_config", "/etc/cad-mllm/deepspeed/ds_zero1.json"),
        "no such file",
    ),
    (
        "launcher",
        "zero3",
        flag("--deepspeed_config", "configs/deepspeed/ds_zero3_config.json"),
        "not the mounted one",
    ),
    ("launcher", "zero3", flag("--config", "/etc/cad-mllm/train/other.yaml"), "no such file"),
    ("launcher", "zero3", flag("--output_dir", "/outputs/cad-mllm"), "is not /outputs/<job name>"),
    ("launcher", "zero3", flag("--resume_from_ckpt", None), "begin anew"),
    ("launcher", "zero3", flag("--train_data_path", "/data"), "not what prepare-data writes"),
    ("launcher", "zero3", flag("--point_encoder", "random"), "not what prepare-model fetches"),
    ("network", "zero3", lambda o: o.remove(first("NetworkPolicy")(o)), "no NetworkPolicy"),
    ("network", "zero3", put(spec("NetworkPolicy"), "policyTypes", ["Ingress"]), "both directions"),
    ("network", "zero3", put(spec("NetworkPolicy"), "podSelector", {}), "covers other jobs too"),
    (
        "network",
        "zero3",
        put(spec("NetworkPolicy"), "podSelector", {"matchLabels": {"a": "b"}}),
        "not covered",
    ),
    (
        "network",
        "mpi-zero3",
        lambda o: spec("NetworkPolicy")(o)["ingress"][0].update(ports=[{"port": 29500}]),
        "2222 from",
    ),
    (
        "network",
        "zero3",
        lambda o: spec("NetworkPolicy")(o)["egress"].pop(0),
        "to the job's own pods is shut",
    ),
    ("network", "zero3", lambda o: spec("NetworkPolicy")(o)["egress"].pop(1), "DNS is shut"),
    ("network", "zero3", lambda o: spec("NetworkPolicy")(o)["egress"].pop(2), "tracking is shut"),
    ("network", "zero3", put(spec("NetworkPolicy"), "ingress", [{}]), "open to other pods"),
    (
        "network",
        "zero3",
        lambda o: spec("NetworkPolicy")(o)["egress"][2]["to"][0]["ipBlock"].pop("except"),
        "metadata service",
    ),
    ("network", "zero3", put(spec("NetworkPolicy"), "egress", [{}]), "other ports of other hosts"),
    ("disruption", "zero3", lambda o: o.remove(first("PodDisruptionBudget")(o)), "no PodDisruptionBudget"),
    ("disruption", "mpi-zero3", put(spec("PodDisruptionBudget"), "minAvailable", 4), "4 of 5 pods"),
    (
        "disruption",
        "zero3",
        put(spec("PodDisruptionBudget"), "selector", {"matchLabels": {"a": "b"}}),
        "not covered",
    ),
    (
        "disruption",
        "zero3",
        put(spec("PodDisruptionBudget"), "selector", {"matchLabels": {}}),
        "other jobs too",
    ),
    ("placement", "zero3", drop(pod, "tolerations"), "does not tolerate"),
    ("placement", "zero3", put(gpu_expression, "values", ["NVIDIA-L40", "NVIDIA-L40-SHARED"]), "time-sliced"),
    ("placement", "zero3", put(gpu_expression, "operator", "NotIn"), "time-sliced"),
    ("placement", "zero3", drop(near, "matchLabelKeys"), "other jobs"),
]


@pytest.mark.parametrize(
    ("rule", "overlay", "change", "complaint"),
    [pytest.param(*case, id=f"{case[0]}-{case[3]}-{number}") for number, case in enumerate(BROKEN)],
)
def test_a_rule_notices_a_broken_manifest(rule: str, overlay: str, change: Break, complaint: str) -> None:
    objects = render(overlay)
    assert list(RULES[rule](objects)) == []
    change(objects)
    found = list(RULES[rule](objects))
    assert any(complaint in fault for fault in found), found


def test_every_rule_has_a_broken_manifest() -> None:
    assert {case[0] for case in BROKEN} == set(RULES)
