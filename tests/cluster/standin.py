"""A Kubernetes API server that is none: kmock's, plus what the client relies on and kmock leaves out.

kmock serves HTTP, discovery, Status errors and injected failures. Added here: resourceVersions, watches that
start after one (410 when it is too old), server-side apply with field owners, selectors, and pod logs.
"""

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import attrs
import kmock
from kmock import KubernetesError

Json = dict[str, Any]
Key = tuple[str, str | None, str]

NAMESPACE = "training"
RESOURCES = {
    "v1/namespaces": ("Namespace", False),
    "v1/nodes": ("Node", False),
    "v1/pods": ("Pod", True),
    "v1/events": ("Event", True),
    "v1/secrets": ("Secret", True),
    "v1/configmaps": ("ConfigMap", True),
    "v1/serviceaccounts": ("ServiceAccount", True),
    "v1/persistentvolumeclaims": ("PersistentVolumeClaim", True),
    "networking.k8s.io/v1/networkpolicies": ("NetworkPolicy", True),
    "policy/v1/poddisruptionbudgets": ("PodDisruptionBudget", True),
    "batch/v1/jobs": ("Job", True),
    "kubeflow.org/v1/pytorchjobs": ("PyTorchJob", True),
    "kubeflow.org/v2beta1/mpijobs": ("MPIJob", True),
    "trainer.kubeflow.org/v1alpha1/trainjobs": ("TrainJob", True),
    "trainer.kubeflow.org/v1alpha1/trainingruntimes": ("TrainingRuntime", True),
}
PLURALS = {kind: path.rpartition("/")[2] for path, (kind, _) in RESOURCES.items()}
JOB_LABELS = {
    "training.kubeflow.org/job-name",
    "jobset.sigs.k8s.io/jobset-name",
    "batch.kubernetes.io/job-name",
}
_TICK = 0.01


class Store:
    """Objects, their versions and the history of changes; used from the test and from the server."""

    def __init__(self) -> None:
        self.objects: dict[Key, Json] = {}
        self.owners: dict[Key, dict[str, str]] = {}
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.history: list[tuple[int, str, Key, Json]] = []
        self.version = 100
        self.oldest = 0
        self._lock = threading.RLock()

    def put(self, item: Json) -> Json:
        """Add the object, or replace the one of its kind and name."""
        with self._lock:
            item = copy.deepcopy(item)
            meta = item["metadata"]
            if item["kind"] not in ("Namespace", "Node"):
                meta.setdefault("namespace", NAMESPACE)
            key = (PLURALS[item["kind"]], meta.get("namespace"), meta["name"])
            before = self.objects.get(key)
            self.version += 1
            meta["resourceVersion"] = str(self.version)
            if before is None:
                meta.setdefault("uid", f"uid-{self.version}")
                meta.setdefault("creationTimestamp", now())
            else:
                meta["uid"] = before["metadata"]["uid"]
                meta["creationTimestamp"] = before["metadata"]["creationTimestamp"]
            self.objects[key] = item
            self._log("ADDED" if before is None else "MODIFIED", key, item)
            return item

    def remove(self, kind: str, name: str) -> bool:
        with self._lock:
            found = next((k for k in self.objects if k[0] == PLURALS[kind] and k[2] == name), None)
            if found is None:
                return False
            item = self.objects.pop(found)
            self.owners.pop(found, None)
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            self._log("DELETED", found, item)
            return True

    def get(self, kind: str, name: str) -> Json | None:
        with self._lock:
            for key, item in self.objects.items():
                if key[0] == PLURALS[kind] and key[2] == name:
                    return copy.deepcopy(item)
            return None

    def select(self, plural: str, namespace: str | None, labels: str, fields: str) -> list[Json]:
        with self._lock:
            found = [
                item for key, item in self.objects.items() if key[0] == plural and key[1] in (namespace, None)
            ]
            return copy.deepcopy([item for item in found if matches(item, labels, fields)])

    def set_status(self, kind: str, name: str, **status: Any) -> None:
        with self._lock:
            item = self.get(kind, name)
            assert item is not None, f"{kind} {name}"
            item["status"] = {**item.get("status", {}), **status}
            self.put(item)

    def condition(self, kind: str, name: str, type_: str, message: str = "", **others: str) -> None:
        """Set a condition True, as the operator does; `others` sets further ones (Running="False")."""
        with self._lock:
            item = self.get(kind, name)
            assert item is not None, f"{kind} {name}"
            conditions = {c["type"]: c for c in item.get("status", {}).get("conditions", [])}
            for name_, value in {type_: "True", **others}.items():
                conditions[name_] = {
                    "type": name_,
                    "status": value,
                    "message": message,
                    "lastTransitionTime": now(),
                }
            self.set_status(kind, name, conditions=list(conditions.values()))

    def expire(self) -> None:
        """Compaction: no watch can start from any version known so far."""
        with self._lock:
            self.version += 1
            self.oldest = self.version
            self.history.clear()

    def print(self, pod: str, *lines: str, stamp: str | None = None) -> None:
        """The pod's trainer prints lines."""
        self.logs.setdefault(pod, []).extend((stamp or now(fraction=True), line) for line in lines)

    def wait(self, what: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Until `what()` is true; its value. Fails the test after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (value := what()):
            assert time.monotonic() < deadline, "what the stand-in waits for does not happen"
            time.sleep(_TICK)
        return value

    def _log(self, change: str, key: Key, item: Json) -> None:
        self.history.append((self.version, change, key, copy.deepcopy(item)))


@attrs.define(kw_only=True)
class ApiServer(kmock.KubernetesScaffold):
    """Serves a `Store`. `requests` (kmock) tells what the client asked."""

    store: Store = attrs.field(factory=Store)
    pod_policy: Callable[[Json], str | None] = attrs.field(default=lambda _pod: None)
    """What a dry run of a pod is refused with."""
    cuts: int = 0
    """Raised by one, every open watch and log breaks off."""
    watches_end_at_once: bool = False

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        for path, (kind, namespaced) in RESOURCES.items():
            self.resources[path].kind = kind
            self.resources[path].namespaced = namespaced
        self.fallback[kmock.action.LIST] << self._list
        self.fallback[kmock.action.WATCH] << self._watch
        self.fallback[kmock.action.FETCH] << self._fetch
        self.fallback[kmock.action.CREATE] << self._create
        self.fallback[kmock.action.UPDATE] << self._apply
        self.fallback[kmock.action.DELETE] << self._delete

    def asked(self, method: str, text: str) -> list[Any]:
        """The requests of a method whose URL holds the text."""
        return [r for r in list(self._requests) if r.method.value == method and text in str(r.url)]

    def cut(self) -> None:
        """Break every open watch and log in the middle."""
        self.cuts += 1

    async def _list(self, request: kmock.Request) -> Json:
        self._known(request)
        params = request.params
        items = self.store.select(
            request.resource.plural,
            request.namespace,
            params.get("labelSelector", ""),
            params.get("fieldSelector", ""),
        )
        return {"kind": "List", "metadata": {"resourceVersion": str(self.store.version)}, "items": items}

    async def _watch(self, request: kmock.Request) -> AsyncIterator[Any]:
        yield b""
        since, cuts = int(request.params["resourceVersion"]), self.cuts
        if since < self.store.oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            yield {"type": "ERROR", "object": gone}
            return
        ends = time.monotonic() + float(request.params["timeoutSeconds"])
        while time.monotonic() < ends and not self.watches_end_at_once:
            if self.cuts != cuts:
                _break(request)
                return
            for version, change, key, item in list(self.store.history):
                if version > since:
                    since = version
                    if key[0] == request.resource.plural and key[1] in (request.namespace, None):
                        labels = request.params.get("labelSelector", "")
                        if matches(item, labels, request.params.get("fieldSelector", "")):
                            yield {"type": change, "object": item}
            await asyncio.sleep(_TICK)

    async def _fetch(self, request: kmock.Request) -> Any:
        item = self._the(request)
        return item if request.subresource is None else self._log(request, item)

    async def _log(self, request: kmock.Request, pod: Json) -> AsyncIterator[bytes]:
        yield b""
        cuts, told = self.cuts, 0
        # As the kubelet does: sinceTime counts in whole seconds.
        since = request.params.get("sinceTime", "")[:19]
        while True:
            if self.cuts != cuts or self.watches_end_at_once:
                _break(request)
                return
            now_ = self.store.get("Pod", request.name)
            if now_ is None or now_["metadata"]["uid"] != pod["metadata"]["uid"]:
                return
            lines = self.store.logs.get(request.name, [])
            for stamp, text in lines[told:]:
                if stamp[:19] >= since:
                    yield f"{stamp} {text}\n".encode()
            told = len(lines)
            if _ended(now_):
                return
            await asyncio.sleep(_TICK)

    async def _create(self, request: kmock.Request) -> Json:
        assert request.params.get("dryRun") == "All", "the client creates nothing but trial pods"
        if refusal := self.pod_policy(request.data):
            raise KubernetesError(status=403, reason="Forbidden", message=refusal)
        return request.data

    async def _apply(self, request: kmock.Request) -> Json:
        self._known(request)
        assert request.headers["Content-Type"] == "application/apply-patch+yaml"
        if request.namespace and self.store.get("Namespace", request.namespace) is None:
            message = f'namespaces "{request.namespace}" not found'
            raise KubernetesError(status=404, reason="NotFound", message=message)
        key = (request.resource.plural, request.namespace, request.name)
        manager, force = request.params["fieldManager"], request.params.get("force") == "true"
        owners = self.store.owners.setdefault(key, {})
        before = self.store.objects.get(key, {})
        fields = dict(_leaves(request.data))
        for path, value in fields.items():
            owner = owners.get(path, manager)
            if owner != manager and dict(_leaves(before)).get(path) != value and not force:
                message = f'Apply failed with 1 conflict: conflict with "{owner}": {path}'
                raise KubernetesError(status=409, reason="Conflict", message=message)
        owners.update({path: manager for path in fields})
        return self.store.put({**_merged(before, request.data)})

    async def _delete(self, request: kmock.Request) -> Json:
        item = self._the(request)
        self.store.remove(item["kind"], request.name)
        for pod in self.store.select("pods", request.namespace, "", ""):  # the garbage collector
            if request.name in [(pod["metadata"].get("labels") or {}).get(label) for label in JOB_LABELS]:
                self.store.remove("Pod", pod["metadata"]["name"])
        return {"kind": "Status", "status": "Success"}

    def _the(self, request: kmock.Request) -> Json:
        self._known(request)
        found = [
            item
            for item in self.store.select(request.resource.plural, request.namespace, "", "")
            if item["metadata"]["name"] == request.name
        ]
        if not found:
            message = f'{request.resource.plural} "{request.name}" not found'
            raise KubernetesError(status=404, reason="NotFound", message=message)
        return found[0]

    def _known(self, request: kmock.Request) -> None:
        if request.resource not in list(self.resources):
            raise KubernetesError(
                status=404, reason="NotFound", message="the server could not find the requested resource"
            )


@contextmanager
def serving(server: ApiServer) -> Iterator[str]:
    """Run the server in a thread of its own; its URL."""
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    urls: list[str] = []

    async def serve() -> None:
        async with server, kmock.Server(server) as http:
            urls.append(str(http.url).rstrip("/"))
            started.set()
            await stop.wait()
            server.watches_end_at_once = True
            server.cut()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()


def matches(item: Json, labels: str, fields: str) -> bool:
    """Whether an object fits `a=b,c=d` of its labels and `metadata.name=x`."""
    carried = item["metadata"].get("labels") or {}
    wanted = dict(rule.split("=") for rule in labels.split(",") if rule)
    named = dict(rule.split("=") for rule in fields.split(",") if rule)
    assert set(named) <= {"metadata.name"}
    return (
        all(carried.get(key) == value for key, value in wanted.items())
        and named.get("metadata.name", item["metadata"]["name"]) == item["metadata"]["name"]
    )


def now(*, fraction: bool = False) -> str:
    """RFC 3339, as the API server writes it; logs have a fraction."""
    stamp = datetime.now(UTC)
    return stamp.strftime("%Y-%m-%dT%H:%M:%S.%f000Z" if fraction else "%Y-%m-%dT%H:%M:%SZ")


def status_error(status: int, message: str) -> Json:
    """The body of a refusal, for `server[...] << status << status_error(...)`."""
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message}


def _break(request: kmock.Request) -> None:
    assert request._raw_request is not None and request._raw_request.transport is not None
    request._raw_request.transport.abort()


def _ended(pod: Json) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _leaves(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict) and item:
        for key, value in item.items():
            if path != "" or key not in ("apiVersion", "kind", "metadata", "status"):
                yield from _leaves(value, f"{path}.{key}")
    else:
        yield path, item


def _merged(before: Any, after: Any) -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        return {**before, **{key: _merged(before.get(key), value) for key, value in after.items()}}
    return after
