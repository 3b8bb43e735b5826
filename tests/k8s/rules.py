"""What a manifest must hold to. A rule takes the objects of an overlay and lists what is wrong with them.

Sources: the operators' CRDs (tests/k8s/crds), their validating code (kubeflow/trainer v1.9.4 and v2.3,
kubeflow/mpi-operator v0.8.2), the PodSecurity standard `restricted`, Kubernetes' own validation of what is
used here, and the contract between launcher, image and manifests.
"""

import ipaddress
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import jsonschema

from cad_mllm.errors import ConfigError
from cad_mllm.settings import parse_train_args
from tests.k8s.manifests import Json, Pod, job_of, leaves, pods_of, quantity
from tests.k8s.schemas import TEXTS, schemas

Rule = Callable[[list[Json]], Iterator[str]]

KNOWN_CLAIMS = {"cad-mllm-data", "cad-mllm-models", "cad-mllm-outputs"}
KNOWN_SECRETS = {"cad-mllm-wandb": "api-key", "cad-mllm-huggingface": "token"}
LAUNCHER_VARIABLES = {
    "CAD_MLLM_WORLD_SIZE",
    "CAD_MLLM_MIN_SHM_GB",
    "CAD_MLLM_MIN_FREE_DISK_GB",
    "CAD_MLLM_DNS_SECONDS",
    "CAD_MLLM_GRACE_SECONDS",
    "CAD_MLLM_IMAGE",
    "CAD_MLLM_OVERLAY",
}
WRITTEN = (  # the variables that say where libraries write
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "MPLCONFIGDIR",
    "TORCH_EXTENSIONS_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)
WRITTEN_BY_TRAINERS = (*WRITTEN, "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")


API_VERSIONS = {
    "PyTorchJob": "kubeflow.org/v1",
    "MPIJob": "kubeflow.org/v2beta1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "Job": "batch/v1",
    "PersistentVolumeClaim": "v1",
    "ConfigMap": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}


def schema(objects: list[Json]) -> Iterator[str]:
    """Every object is of a known kind and version and fits its schema; unknown fields are refused."""
    for item in objects:
        kind = item["kind"]
        if item["apiVersion"] != API_VERSIONS.get(kind):
            yield f"{kind}: apiVersion {item['apiVersion']}, expected {API_VERSIONS.get(kind)}"
            continue
        body = "data" if kind == "ConfigMap" else "spec"
        for key in set(item) - {"apiVersion", "kind", "metadata", body}:
            yield f"{kind}: unknown field {key}"
        wanted = TEXTS if kind == "ConfigMap" else schemas()[kind]
        for error in jsonschema.Draft202012Validator(wanted).iter_errors(item[body]):
            yield f"{kind}: {error.json_path.replace('$', body)}: {error.message[:200]}"


def names(objects: list[Json]) -> Iterator[str]:
    """Names and labels as the operators and our own tools expect them; nothing unfinished is left over."""
    identities = Counter((item["kind"], item["metadata"]["name"]) for item in objects)
    for (kind, name), count in identities.items():
        if count > 1:
            yield f"{kind} {name} stands there {count} times"
        # Operators make services of the names of their jobs: DNS-1035, and room for "-worker-99".
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 53:
            yield f"{kind} {name}: no DNS-1035 label of at most 53 characters"
    instances = {item["metadata"].get("labels", {}).get("app.kubernetes.io/instance") for item in objects}
    if len(instances) != 1 or None in instances:
        yield f"objects carry different instances: {instances}"
    for item in objects:
        if item["metadata"].get("labels", {}).get("app.kubernetes.io/name") != "cad-mllm":
            yield f"{item['kind']} {item['metadata']['name']}: app.kubernetes.io/name is not cad-mllm"
        if "config.kubernetes.io/local-config" in item["metadata"].get("annotations", {}):
            yield f"{item['kind']}: a local object is left over"
        if item["kind"] != "ConfigMap":
            for path, value in leaves(item):
                if value in ("overlay", "image", "/outputs/job"):
                    yield f"{item['kind']}{path}: the placeholder {value!r} is left over"


# ----------------------------------------------------------------------------------------------- operators


def pytorchjob(objects: list[Json]) -> Iterator[str]:
    """What the training operator's webhook and controller want."""
    for item in (one for one in objects if one["kind"] == "PyTorchJob"):
        spec, replicas = item["spec"], item["spec"]["pytorchReplicaSpecs"]
        if "Master" not in replicas or replicas["Master"].get("replicas") != 1:
            yield "Master.replicas must be 1"
        if "Worker" in replicas and replicas["Worker"].get("replicas", 1) < 1:
            yield "Worker.replicas must be at least 1: leave Worker out"
        if not re.fullmatch(r"auto|gpu|cpu|[1-9][0-9]*", str(spec.get("nprocPerNode"))):
            yield f"nprocPerNode {spec.get('nprocPerNode')!r}"
        if "elasticPolicy" in spec and "Worker" not in replicas:
            yield "elasticPolicy needs Worker"
        for role, one in replicas.items():
            if role not in ("Master", "Worker"):
                yield f"unknown replica type {role}"
            containers = one["template"]["spec"]["containers"]
            if not any(container["name"] == "pytorch" for container in containers):
                yield f"{role}: no container is named pytorch"
            if not all(container.get("image") for container in containers):
                yield f"{role}: a container without image"
            if one.get("restartPolicy") != "ExitCode":
                yield f"{role}: restartPolicy must be ExitCode, so that 128 and above is retried and no other"
            if "restartPolicy" in one["template"]["spec"]:
                yield f"{role}: the operator overwrites the template's restartPolicy and warns"
        if spec["runPolicy"].get("cleanPodPolicy") not in ("None", "Running", "All"):
            yield "cleanPodPolicy must be None, Running or All"
        yield from _run_policy(spec["runPolicy"])


def mpijob(objects: list[Json]) -> Iterator[str]:
    """What the MPI operator's validator wants; there is no webhook, a bad job only leaves an event."""
    for item in (one for one in objects if one["kind"] == "MPIJob"):
        spec, replicas = item["spec"], item["spec"]["mpiReplicaSpecs"]
        if replicas.get("Launcher", {}).get("replicas") != 1:
            yield "Launcher.replicas must be 1"
        if replicas.get("Worker", {}).get("replicas", 0) < 1:
            yield "Worker.replicas must be at least 1"
        host = f"{item['metadata']['name']}-worker-{replicas.get('Worker', {}).get('replicas', 1) - 1}"
        if len(host) > 63:
            yield f"{host} is too long for a host name"
        for role, one in replicas.items():
            if one.get("restartPolicy") not in ("Never", "OnFailure"):
                yield f"{role}: restartPolicy must be Never or OnFailure"
        if not spec.get("sshAuthMountPath"):
            yield "sshAuthMountPath is missing"
        if spec.get("sshAuthMountPath") != "/home/mpiuser/.ssh":
            yield "sshAuthMountPath must be that of the image's user"
        if spec.get("mpiImplementation") != "OpenMPI":
            yield "mpiImplementation must be OpenMPI"
        if spec["runPolicy"].get("cleanPodPolicy") not in ("None", "Running", "All"):
            yield "cleanPodPolicy must be None, Running or All"
        yield from _run_policy(spec["runPolicy"])
        launcher, worker = (
            Pod(role, replicas[role]["replicas"], replicas[role]["template"])
            for role in ("Launcher", "Worker")
        )
        if launcher.gpus:
            yield "the launcher holds GPUs that no rank uses"
        if worker.main.get("command") != ["/usr/sbin/sshd", "-De", "-f", "/home/mpiuser/.sshd_config"]:
            yield "the worker does not run the image's sshd"
        if [port["containerPort"] for port in worker.main.get("ports", [])] != [2222]:
            yield "the worker's sshd is on 2222"
        if spec.get("launcherCreationPolicy") == "WaitForWorkersReady":
            if worker.main.get("readinessProbe", {}).get("tcpSocket", {}).get("port") != 2222:
                yield "WaitForWorkersReady needs a readinessProbe of sshd"
        else:
            yield "launcherCreationPolicy must be WaitForWorkersReady: mpirun does not wait for workers"


def _run_policy(policy: Json) -> Iterator[str]:
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        if policy.get(key, -1) < 0:
            yield f"runPolicy.{key} is missing or negative"


def trainjob(objects: list[Json]) -> Iterator[str]:
    """What Kubeflow Trainer's webhooks and plugins want."""
    runtimes = {item["metadata"]["name"]: item for item in objects if item["kind"] == "TrainingRuntime"}
    for item in (one for one in objects if one["kind"] == "TrainJob"):
        reference = item["spec"]["runtimeRef"]
        if reference.get("kind") != "TrainingRuntime" or reference.get("name") not in runtimes:
            yield f"runtimeRef {reference} is not among the objects"
            continue
        if objects.index(item) < objects.index(runtimes[reference["name"]]):
            yield "the runtime must be created before the job"
        runtime = runtimes[reference["name"]]["spec"]
        if not item["spec"].get("trainer"):
            yield "without spec.trainer no PET_* variables are injected"
        elif item["spec"]["trainer"].get("numNodes") != runtime["mlPolicy"].get("numNodes"):
            yield "numNodes of job and runtime differ"
        if "torch" not in runtime["mlPolicy"]:
            yield "mlPolicy.torch is missing"
    for runtime_object in runtimes.values():
        template = runtime_object["spec"]["template"]["spec"]
        if "PodFailurePolicy" not in str(template.get("failurePolicy")):
            yield "failurePolicy has no rule for codes that no retry mends"
        for rule in template.get("failurePolicy", {}).get("rules", []):
            if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
                yield f"JobSet takes no rule of the name {rule['name']}"
        for one in template["replicatedJobs"]:
            labels = one["template"].get("metadata", {}).get("labels", {})
            if labels.get("trainer.kubeflow.org/trainjob-ancestor-step") != "trainer":
                yield "no ancestor label: the operator does not know which job trains"
            if one.get("replicas", 1) != 1:
                yield "replicas of a replicated job must be 1"
            if not any(
                c["name"] == "node" for c in one["template"]["spec"]["template"]["spec"]["containers"]
            ):
                yield "no container is named node"
            codes = one["template"]["spec"].get("podFailurePolicy", {}).get("rules", [{}])[0]
            if codes.get("onExitCodes", {}).get("values") != list(range(1, 128)):
                yield "the codes 1 to 127 must fail the job"
            yield from _job_spec(one["template"]["spec"])


def job(objects: list[Json]) -> Iterator[str]:
    """What Kubernetes wants of a Job."""
    for item in (one for one in objects if one["kind"] == "Job"):
        spec = item["spec"]
        if spec.get("completionMode") != "Indexed" or not spec.get("completions"):
            yield "an Indexed Job needs completions"
        for key in ("backoffLimit", "ttlSecondsAfterFinished"):
            if spec.get(key, -1) < 0:
                yield f"{key} is missing"
        yield from _job_spec(spec)


def _job_spec(spec: Json) -> Iterator[str]:
    pod = spec["template"]["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "a Job's restartPolicy must be Never or OnFailure"
    containers = {container["name"] for container in pod["containers"]}
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        if pod.get("restartPolicy") != "Never":
            yield "podFailurePolicy needs restartPolicy Never"
        codes = rule.get("onExitCodes", {})
        values = codes.get("values", [])
        if (
            values != sorted(set(values))
            or len(values) > 255
            or (codes.get("operator") == "In" and 0 in values)
        ):
            yield f"podFailurePolicy: bad exit codes {values}"
        if codes.get("containerName", next(iter(containers))) not in containers:
            yield f"podFailurePolicy names the unknown container {codes['containerName']}"


# ---------------------------------------------------------------------------------------------------- pods

_ALLOWED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"),
    "secret",
}


def restricted(objects: list[Json]) -> Iterator[str]:
    """The PodSecurity standard `restricted` (v1.32), field by field."""
    for pod in pods_of(objects):
        spec, at = pod.spec, pod.role
        context = spec.get("securityContext", {})
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{at}: {key}"
        for volume in spec.get("volumes", []):
            for source in set(volume) - {"name"} - _ALLOWED_VOLUMES:
                yield f"{at}: volume {volume['name']} of type {source}"
        if context.get("sysctls"):
            yield f"{at}: sysctls"
        for container in [*pod.containers, *spec.get("ephemeralContainers", [])]:
            own, where = container.get("securityContext", {}), f"{at} {container['name']}"
            if own.get("privileged"):
                yield f"{where}: privileged"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{where}: allowPrivilegeEscalation is not false"
            if "ALL" not in own.get("capabilities", {}).get("drop", []):
                yield f"{where}: does not drop all capabilities"
            if set(own.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}:
                yield f"{where}: adds capabilities"
            if own.get("runAsNonRoot", context.get("runAsNonRoot")) is not True:
                yield f"{where}: runAsNonRoot is not true"
            if own.get("runAsUser", context.get("runAsUser")) == 0:
                yield f"{where}: runs as root"
            seccomp = own.get("seccompProfile", context.get("seccompProfile", {}))
            if seccomp.get("type") not in ("RuntimeDefault", "Localhost"):
                yield f"{where}: no seccomp profile"
            if own.get("procMount", "Default") != "Default":
                yield f"{where}: procMount"
            if any(port.get("hostPort") for port in container.get("ports", [])):
                yield f"{where}: hostPort"
            for one in (own, context):
                if one.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
                    yield f"{where}: AppArmor is off"
                if set(one.get("seLinuxOptions", {})) & {"user", "role"}:
                    yield f"{where}: SELinux user or role"
                if one.get("windowsOptions", {}).get("hostProcess"):
                    yield f"{where}: hostProcess"


def least_privilege(objects: list[Json]) -> Iterator[str]:
    """What this project asks beyond `restricted`: uid 1000, a read-only root, no token of the API."""
    for pod in pods_of(objects):
        context = pod.spec.get("securityContext", {})
        for key in ("runAsUser", "runAsGroup", "fsGroup"):
            if context.get(key) != 1000:
                yield f"{pod.role}: {key} is not 1000"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.role}: mounts a service account token"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.role}: gets variables of every service"
        for container in pod.containers:
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{pod.role} {container['name']}: the root filesystem is writable"
            for variable in container.get("env", []):
                if re.search(r"KEY|TOKEN|SECRET|PASSWORD", variable["name"]) and "value" in variable:
                    yield f"{pod.role} {container['name']}: {variable['name']} is written into the manifest"


def volumes(objects: list[Json]) -> Iterator[str]:
    """Mounts and volumes belong together; what libraries write lies on an emptyDir; data are read-only."""
    for pod in pods_of(objects):
        there = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        used = set()
        for container in pod.containers:
            at = f"{pod.role} {container['name']}"
            mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
            if len(mounts) != len(container.get("volumeMounts", [])):
                yield f"{at}: two mounts in one place"
            for mount in mounts.values():
                used.add(mount["name"])
                if mount["name"] not in there:
                    yield f"{at}: mounts the unknown volume {mount['name']}"
            variables = {one["name"]: one.get("value") for one in container.get("env", [])}
            if len(variables) != len(container.get("env", [])):
                yield f"{at}: a variable is set twice"
            wanted = WRITTEN_BY_TRAINERS if "/dev/shm" in mounts else WRITTEN
            for name in [*(wanted if container in pod.spec["containers"] else ("HOME", "TMPDIR")), "/tmp"]:
                path = name if name == "/tmp" else variables.get(name)
                if path == "/tmp" and container not in pod.spec["containers"]:
                    continue
                home = _mount_of(path, mounts)
                if home is None or home.get("readOnly") or "emptyDir" not in there.get(home["name"], {}):
                    yield f"{at}: {name} ({path}) is not on an emptyDir"
        for name in set(there) - used:
            yield f"{pod.role}: the volume {name} is mounted nowhere"
        for name, volume in there.items():
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.role}: emptyDir {name} has no size"
        if pod.ranks or pod.role == "Launcher":
            yield from _trainer_volumes(pod, there)


def _trainer_volumes(pod: Pod, there: dict[str, Json]) -> Iterator[str]:
    mounts = {mount["mountPath"]: mount for mount in pod.main["volumeMounts"]}
    for path in ("/data", "/models", "/etc/cad-mllm/deepspeed", "/etc/cad-mllm/train"):
        if path in mounts and not mounts[path].get("readOnly"):
            yield f"{pod.role}: {path} is writable"
    if "/outputs" not in mounts or mounts["/outputs"].get("readOnly"):
        yield f"{pod.role}: /outputs is not writable"
    shm = there.get(mounts.get("/dev/shm", {}).get("name", ""), {}).get("emptyDir", {})
    if shm.get("medium") != "Memory":
        yield f"{pod.role}: /dev/shm is not memory"


def _mount_of(path: str | None, mounts: dict[str, Json]) -> Json | None:
    """The mount that a path lies on."""
    if path is None:
        return None
    return next(
        (mounts[str(up)] for up in [PurePosixPath(path), *PurePosixPath(path).parents] if str(up) in mounts),
        None,
    )


def resources(objects: list[Json]) -> Iterator[str]:
    """Every container says what it needs; memory covers /dev/shm; the GPUs are those of the world."""
    job_object = job_of(objects)
    ranks = [pod for pod in pods_of(objects) if pod.ranks and _trains(job_object, pod)]
    for pod in pods_of(objects):
        for container in pod.containers:
            at, own = f"{pod.role} {container['name']}", container.get("resources", {})
            for name in ("cpu", "memory", "ephemeral-storage"):
                for side in ("requests", "limits"):
                    if name not in own.get(side, {}):
                        yield f"{at}: no {side} of {name}"
                        return
            if own["requests"]["memory"] != own["limits"]["memory"]:
                yield f"{at}: memory is overcommitted"
            if own["requests"].get("nvidia.com/gpu") != own["limits"].get("nvidia.com/gpu"):
                yield f"{at}: GPU requests and limits differ"
            scratch = sum(
                quantity(volume["emptyDir"]["sizeLimit"])
                for volume in pod.spec.get("volumes", [])
                if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory"
            )
            if quantity(own["limits"]["ephemeral-storage"]) <= scratch:
                yield f"{at}: ephemeral-storage does not cover the emptyDirs"
        if pod.ranks:
            shm = sum(
                quantity(volume["emptyDir"]["sizeLimit"])
                for volume in pod.spec["volumes"]
                if volume.get("emptyDir", {}).get("medium") == "Memory"
            )
            # Python, torch and the loaders of each rank need 2 GiB at the least.
            if quantity(pod.main["resources"]["requests"]["memory"]) < shm + max(1, pod.gpus) * 2 * 2**30:
                yield f"{pod.role}: memory does not cover /dev/shm and the ranks"
            asked = pod.env.get("CAD_MLLM_MIN_SHM_GB")
            if asked is None or not 0 < float(asked) * 1e9 <= shm:
                yield f"{pod.role}: CAD_MLLM_MIN_SHM_GB {asked} is not within /dev/shm of {shm / 1e9:.2f} GB"
    if ranks:
        world = sum(pod.count * processes(job_object) for pod in ranks)
        for pod in pods_of(objects):
            if pod.env.get("CAD_MLLM_WORLD_SIZE") != str(world):
                yield f"{pod.role}: CAD_MLLM_WORLD_SIZE {pod.env.get('CAD_MLLM_WORLD_SIZE')} of {world} ranks"
        for pod in ranks:
            if pod.gpus not in (0, processes(job_object)):
                yield f"{pod.role}: {pod.gpus} GPUs for {processes(job_object)} processes"


def _trains(job_object: Json, pod: Pod) -> bool:
    return job_object["kind"] != "Job" and pod.role != "Launcher"


def processes(job_object: Json) -> int:
    """Ranks in a pod."""
    spec = job_object["spec"]
    if job_object["kind"] == "PyTorchJob":
        return int(spec["nprocPerNode"])
    if job_object["kind"] == "MPIJob":
        return int(spec["slotsPerWorker"])
    return int(spec["trainer"]["numProcPerNode"])


def references(objects: list[Json]) -> Iterator[str]:
    """ConfigMaps, claims and Secrets that pods name exist, or are the ones that the README asks for."""
    maps = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
    claims = {item["metadata"]["name"] for item in objects if item["kind"] == "PersistentVolumeClaim"}
    used = set()
    for pod in pods_of(objects):
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                name = volume["configMap"]["name"]
                used.add(name)
                if name not in maps:
                    yield f"{pod.role}: ConfigMap {name} is not among the objects"
                for one in volume["configMap"].get("items", []):
                    if one["key"] not in maps.get(name, {}):
                        yield f"{pod.role}: ConfigMap {name} has no key {one['key']}"
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                if name not in claims | KNOWN_CLAIMS:
                    yield f"{pod.role}: unknown claim {name}"
                if name in KNOWN_CLAIMS and claims:
                    yield f"{pod.role}: uses the claim {name}, though the overlay brings one of its own"
            if "secret" in volume:
                yield f"{pod.role}: Secrets are read as variables, not mounted"
        for container in pod.containers:
            for variable in container.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef")
                if secret is None:
                    continue
                if KNOWN_SECRETS.get(secret["name"]) != secret["key"]:
                    yield f"{pod.role}: unknown Secret {secret['name']}/{secret['key']}"
                if secret.get("optional") is not True:
                    yield f"{pod.role}: the Secret {secret['name']} is not optional"
    for name in set(maps) - used:
        yield f"the ConfigMap {name} is used by nothing"


def stopping(objects: list[Json]) -> Iterator[str]:
    """A stop leaves time for a checkpoint: pod's grace > launcher's grace; smoke jobs end by themselves."""
    for pod in pods_of(objects):
        if not pod.ranks and pod.role != "Launcher":
            continue
        grace = float(pod.env.get("CAD_MLLM_GRACE_SECONDS") or 0)
        if not 30 <= grace < pod.spec.get("terminationGracePeriodSeconds", 30):
            yield f"{pod.role}: CAD_MLLM_GRACE_SECONDS {grace:g} is not below the pod's grace period"


# ------------------------------------------------------------------------------------------- the launcher


def launcher(objects: list[Json]) -> Iterator[str]:
    """The contract: arguments are training flags, the image's entry is the launcher, known variables."""
    job_object = job_of(objects)
    if job_object["kind"] == "Job":
        return
    maps = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
    for pod in pods_of(objects):
        for name in pod.env:
            if name.startswith("CAD_MLLM_") and name not in LAUNCHER_VARIABLES:
                yield f"{pod.role}: unknown variable {name}"
            if name.startswith(("PET_", "OMPI_")) or name in (
                "RANK",
                "MASTER_ADDR",
                "MASTER_PORT",
                "WORLD_SIZE",
            ):
                yield f"{pod.role}: {name} is the operator's"
        labels = pod.template["metadata"]["labels"]
        if pod.env.get("CAD_MLLM_OVERLAY") != labels.get("app.kubernetes.io/instance"):
            yield f"{pod.role}: CAD_MLLM_OVERLAY is not the overlay"
        if pod.env.get("CAD_MLLM_IMAGE") != pod.main["image"]:
            yield f"{pod.role}: CAD_MLLM_IMAGE is not the image"
        if job_object["kind"] == "MPIJob" and pod.role == "Worker":
            if "args" in pod.main:
                yield "Worker: sshd takes no training flags"
            continue
        if "command" in pod.main:
            yield f"{pod.role}: command replaces the launcher"
        yield from _flags(pod, job_object, maps)


def _flags(pod: Pod, job_object: Json, maps: dict[str, Json]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        arguments, local = list(pod.main.get("args", [])), Path(folder)
        for mount in pod.main["volumeMounts"]:
            volume = next((v for v in pod.spec["volumes"] if v["name"] == mount["name"]), {})
            data = maps.get(volume.get("configMap", {}).get("name", ""), {})
            items = volume.get("configMap", {}).get("items") or [{"key": key, "path": key} for key in data]
            target = local / mount["mountPath"].lstrip("/")
            for one in items if "configMap" in volume else []:
                if one["key"] in data:
                    target.mkdir(parents=True, exist_ok=True)
                    (target / one["path"]).write_text(data[one["key"]])
        arguments = [f"{local}{one}" if one.startswith("/etc/cad-mllm/") else one for one in arguments]
        try:
            config = parse_train_args(arguments)
        except (ConfigError, SystemExit) as error:
            yield f"{pod.role}: {error}"
            return
        if config.run.deepspeed_config is None or "/etc/cad-mllm/deepspeed/" not in str(
            config.run.deepspeed_config
        ):
            yield f"{pod.role}: the DeepSpeed JSON is not the mounted one"
        if str(config.run.output_dir) != f"/outputs/{job_object['metadata']['name']}":
            yield f"{pod.role}: --output_dir {config.run.output_dir} is not /outputs/<job name>"
        if config.run.resume_from_ckpt != "auto":
            yield f"{pod.role}: a restart would begin anew: --resume_from_ckpt auto is missing"
        if not config.data.create_dummy_data:
            if str(config.data.train_data_path) != "/data/omnicad":
                yield f"{pod.role}: --train_data_path is not what prepare-data writes"
            if not str(config.model.point_encoder).startswith("/models/"):
                yield f"{pod.role}: --point_encoder is not what prepare-model fetches"


# ------------------------------------------------------------------------------------------------- network


def network(objects: list[Json]) -> Iterator[str]:
    """What must get through does, what need not does not."""
    policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
    if not policies:
        yield "no NetworkPolicy"
        return
    (policy,) = policies
    if set(policy["policyTypes"]) != {"Ingress", "Egress"}:
        yield "the policy does not cover both directions"
    for pod in pods_of(objects):
        own = pod.template["metadata"]["labels"]
        stranger = {**own, "app.kubernetes.io/instance": "another"}
        if not _selects(policy["podSelector"], own):
            yield f"{pod.role}: not covered by the policy"
        if _selects(policy["podSelector"], stranger):
            yield "the policy covers other jobs too"
        for port in (2222, 23456, 29500, 40000):
            if not _lets_through(policy["ingress"], "from", port, labels=own):
                yield f"{pod.role}: {port} from the job's own pods is shut"
            if not _lets_through(policy["egress"], "to", port, labels=own):
                yield f"{pod.role}: {port} to the job's own pods is shut"
            if _lets_through(policy["ingress"], "from", port, labels=stranger):
                yield f"{port} is open to other pods"
    if not _lets_through(policy["egress"], "to", 53, protocol="UDP", address="10.96.0.10"):
        yield "DNS is shut"
    if not _lets_through(policy["egress"], "to", 443, address="35.186.228.49"):
        yield "tracking is shut"
    if _lets_through(policy["egress"], "to", 443, address="169.254.169.254"):
        yield "the metadata service is open"
    if _lets_through(policy["egress"], "to", 5432, address="10.0.0.7"):
        yield "other ports of other hosts are open"


def _selects(selector: Json, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def _lets_through(
    rules: list[Json],
    side: str,
    port: int,
    *,
    protocol: str = "TCP",
    labels: dict[str, str] | None = None,
    address: str = "",
) -> bool:
    """Whether a rule admits this port of a pod of the namespace with `labels`, or of an address outside."""
    for rule in rules:
        ports = rule.get("ports")
        if ports and not any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports):
            continue
        if side not in rule:
            return True
        for peer in rule[side]:
            if "podSelector" in peer and labels is not None and _selects(peer["podSelector"], labels):
                return True
            if "ipBlock" in peer and address:
                inside = ipaddress.ip_address(address)
                block = peer["ipBlock"]
                if inside in ipaddress.ip_network(block["cidr"]) and not any(
                    inside in ipaddress.ip_network(one) for one in block.get("except", [])
                ):
                    return True
    return False


def disruption(objects: list[Json]) -> Iterator[str]:
    """The budget covers all pods of a training job, and no others."""
    pods = [pod for pod in pods_of(objects) if pod.role != "job"]
    budgets = [item["spec"] for item in objects if item["kind"] == "PodDisruptionBudget"]
    if pods and not budgets:
        yield "no PodDisruptionBudget"
    for budget in budgets:
        if budget["minAvailable"] != sum(pod.count for pod in pods):
            yield f"minAvailable {budget['minAvailable']} of {sum(pod.count for pod in pods)} pods"
        for pod in pods:
            own = pod.template["metadata"]["labels"]
            if not _selects(budget["selector"], own):
                yield f"{pod.role}: not covered by the budget"
            if _selects(budget["selector"], {**own, "app.kubernetes.io/instance": "another"}):
                yield "the budget covers other jobs too"


def placement(objects: list[Json]) -> Iterator[str]:
    """Pods with GPUs tolerate the taint of GPU nodes, take no shared GPU, attract pods of their own job."""
    for pod in pods_of(objects):
        affinity = pod.spec.get("affinity", {})
        tolerated = any(
            one.get("key") == "nvidia.com/gpu" and one.get("operator") == "Exists"
            for one in pod.spec.get("tolerations", [])
        )
        if pod.gpus and not tolerated:
            yield f"{pod.role}: does not tolerate the taint of GPU nodes"
        terms = (
            affinity.get("nodeAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", {})
            .get("nodeSelectorTerms", [])
        )
        for expression in (one for term in terms for one in term.get("matchExpressions", [])):
            if expression["operator"] != "In" or any("SHARED" in value for value in expression["values"]):
                yield f"{pod.role}: {expression} admits time-sliced GPUs"
        near = affinity.get("podAffinity", {})
        wanted = [
            one["podAffinityTerm"] for one in near.get("preferredDuringSchedulingIgnoredDuringExecution", [])
        ]
        for term in [*wanted, *near.get("requiredDuringSchedulingIgnoredDuringExecution", [])]:
            instance = term["labelSelector"]["matchLabels"].get("app.kubernetes.io/instance")
            own = pod.template["metadata"]["labels"]["app.kubernetes.io/instance"]
            if instance != own and "app.kubernetes.io/instance" not in term.get("matchLabelKeys", []):
                yield f"{pod.role}: is drawn to pods of other jobs"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        schema, names, pytorchjob, mpijob, trainjob, job, restricted, least_privilege, volumes, resources,
        references, stopping, launcher, network, disruption, placement,
    )
}  # fmt: skip


def faults(objects: list[Json]) -> list[str]:
    """What is wrong by any rule."""
    return [f"{name}: {fault}" for name, rule in RULES.items() for fault in rule(objects)]
