"""The connection to the API server: JSON in and out, bounded retries, every failure one line.

The objects stay plain dicts: what an overlay holds (CRDs included) has no generated model classes, and
whatever the server answers is shown to people, not computed with.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
import yaml
from kubernetes import config as kube_config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from cad_mllm.cluster.jobs import KINDS, Json
from cad_mllm.errors import ClusterError

FIELD_MANAGER = "cad-mllm"
CONFLICT, GONE, FORBIDDEN, NOT_FOUND, INVALID = 409, 410, 403, 404, 422

_RETRIED = frozenset({429, 500, 502, 503, 504})
_VERBS = {"GET": "get", "PATCH": "patch", "POST": "create", "DELETE": "delete"}


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the client waits for what, in seconds."""

    attempts: int = 6
    """Of one request, before the API server counts as dead."""
    first_wait: float = 0.5
    """Between the first two attempts; doubled from one to the next."""
    longest_wait: float = 8.0
    """Between two attempts, unless the server asks for more (Retry-After)."""
    request: float = 30.0
    """For one answer."""
    watch: int = 60
    """For one watch connection; then it is opened anew from where it was."""
    quiet_log: float = 30.0
    """Without a log line, before the connection counts as broken."""
    poll: float = 2.0
    """Between two looks at something that cannot be watched."""
    stuck: float = 60.0
    """That a problem which does not mend itself may last before following a job gives up."""

    def waits(self) -> Iterator[float]:
        """The pauses between the attempts of one request: one less than `attempts`."""
        for attempt in range(self.attempts - 1):
            yield min(self.first_wait * 2**attempt, self.longest_wait)


@dataclass(frozen=True, kw_only=True)
class Resource:
    """What discovery says about a kind."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool

    @property
    def full_name(self) -> str:
        """As kubectl takes it: `pytorchjobs.kubeflow.org`."""
        group, _, version = self.api_version.rpartition("/")
        return f"{self.plural}.{group}" if group and version else self.plural

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of the collection, of one object, or of its subresource."""
        root = "/apis/" if "/" in self.api_version else "/api/"
        parts = [self.plural, *(quote(part) for part in (name, subresource) if part is not None)]
        where = f"/namespaces/{quote(namespace or '')}/" if self.namespaced else "/"
        return f"{root}{self.api_version}{where}{'/'.join(parts)}"


PODS = Resource(api_version="v1", kind="Pod", plural="pods", namespaced=True)
EVENTS = Resource(api_version="v1", kind="Event", plural="events", namespaced=True)
NODES = Resource(api_version="v1", kind="Node", plural="nodes", namespaced=False)


class ApiError(ClusterError):
    """The API server's refusal. `status` is HTTP's, `detail` the server's own words."""

    def __init__(self, message: str, *, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class Stream:
    """A response that is read while it is written: a watch or a log."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def lines(self) -> Iterator[str]:
        """Line after line, as they come. Raises ConnectionError when the stream breaks or falls silent."""
        pending = b""
        try:
            for chunk in self._response.stream(amt=None, decode_content=True):
                *whole, pending = (pending + chunk).split(b"\n")
                yield from (line.decode("utf-8", errors="replace") for line in whole)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ConnectionError(str(error)) from error
        finally:
            self._response.close()
            self._response.release_conn()
        if pending:
            yield pending.decode("utf-8", errors="replace")


@dataclass(kw_only=True)
class Cluster:
    """A namespace of a cluster that answers. Every method raises ClusterError in one line."""

    client: ApiClient
    namespace: str
    context: str | None
    """As given; None: the current one."""
    patience: Patience = field(default_factory=Patience)
    _resources: dict[str, list[Resource]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, resource: Resource, name: str, *, namespace: str | None = None) -> Json:
        """One object."""
        return self._json("GET", resource, resource.path(namespace or self.namespace, name))

    def find(self, resource: Resource, name: str) -> Json | None:
        """One object, or None where there is none of that name."""
        try:
            return self.get(resource, name)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def list_all(self, resource: Resource, *, labels: str = "") -> Json:
        """The list object: `items`, and `metadata.resourceVersion` to watch from."""
        query = {"labelSelector": labels} if labels else {}
        return self._json("GET", resource, resource.path(self.namespace), query)

    def apply(self, item: Json) -> Json:
        """Server-side apply of one object as field manager `cad-mllm`; 409 where another one owns a field."""
        resource = self.resource(item["apiVersion"], item["kind"])
        path = resource.path(item["metadata"].get("namespace", self.namespace), item["metadata"]["name"])
        query = {"fieldManager": FIELD_MANAGER}
        return self._json("PATCH", resource, path, query, item, "application/apply-patch+yaml")

    def try_create(self, item: Json) -> None:
        """Ask the server (dry run, nothing is kept) whether it would let the object in."""
        resource = self.resource(item["apiVersion"], item["kind"])
        self._json("POST", resource, resource.path(self.namespace), {"dryRun": "All"}, item)

    def delete(self, resource: Resource, name: str, *, grace_seconds: int | None = None) -> bool:
        """Delete one object and what it owns; False where it was not there. Does not wait."""
        query = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            query["gracePeriodSeconds"] = str(grace_seconds)
        try:
            self._json("DELETE", resource, resource.path(self.namespace, name), query)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    def watch(self, resource: Resource, *, labels: str, fields: str, version: str) -> Stream:
        """Changes after `version`, as JSON lines, for at most `patience.watch` seconds."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(self.patience.watch),
            **({"labelSelector": labels} if labels else {}),
            **({"fieldSelector": fields} if fields else {}),
        }
        path = resource.path(self.namespace)
        return Stream(self._send("GET", resource, path, query, silence=self.patience.watch + 10.0))

    def log(self, pod: str, container: str, *, since: str | None) -> Stream:
        """The container's log with time stamps, followed until the container ends."""
        query = {"container": container, "follow": "true", "timestamps": "true"}
        if since is not None:
            query["sinceTime"] = since
        path = PODS.path(self.namespace, pod, "log")
        return Stream(self._send("GET", PODS, path, query, silence=self.patience.quiet_log))

    def resource(self, api_version: str, kind: str) -> Resource:
        """Where a kind lives. A kind that the cluster does not have is an error with the remedy."""
        with self._lock:
            if api_version not in self._resources:
                self._resources[api_version] = self._discover(api_version)
            for resource in self._resources[api_version]:
                if resource.kind == kind:
                    return resource
        install = next(
            (known.install for known in KINDS if (known.api_version, known.kind) == (api_version, kind)), None
        )
        remedy = f"install its operator with `{install}`" if install else "see `kubectl api-resources`"
        raise ApiError(
            f"the cluster has no {kind} ({api_version}), its CRD is missing: {remedy}",
            status=NOT_FOUND,
            detail=f"no {kind} in {api_version}",
        )

    def kubectl(self, command: str) -> str:
        """A kubectl command for people to type that reaches this namespace."""
        context = f" --context {self.context}" if self.context else ""
        return f"`kubectl{context} -n {self.namespace} {command}`"

    def _discover(self, api_version: str) -> list[Resource]:
        found = Resource(api_version=api_version, kind="APIResourceList", plural="", namespaced=False)
        root = "/apis/" if "/" in api_version else "/api/"
        try:
            answer = self._json("GET", found, f"{root}{api_version}")
        except ApiError as error:
            if error.status == NOT_FOUND:
                return []
            raise
        return [
            Resource(
                api_version=api_version,
                kind=entry["kind"],
                plural=entry["name"],
                namespaced=bool(entry["namespaced"]),
            )
            for entry in answer["resources"]
            if "/" not in entry["name"]
        ]

    def _json(
        self,
        method: str,
        resource: Resource,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        response = self._send(method, resource, path, query or {}, body, content_type)
        try:
            answer = json.loads(response.data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ClusterError(
                f"{self.client.configuration.host} answers, but not as a Kubernetes API server does: "
                f"look at the server of {self.kubectl('config view --minify')}"
            )
        return answer

    def _send(
        self,
        method: str,
        resource: Resource,
        path: str,
        query: Mapping[str, str],
        body: Json | None = None,
        content_type: str = "application/json",
        silence: float | None = None,
    ) -> Any:
        """The urllib3 response of a 2xx; retries what a moment can mend. `silence`: seconds, for a stream."""
        waits = self.patience.waits()
        while True:
            asked_to_wait = 0.0
            try:
                request = self.client.param_serialize(
                    method,
                    path,
                    query_params=list(query.items()),
                    header_params={"Accept": "application/json, */*", "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                )
                timeout = (self.patience.request, silence or self.patience.request)
                response = self.client.call_api(*request, _request_timeout=timeout).response
                if 200 <= response.status <= 299:
                    return response
                failure: ClusterError = self._refusal(method, resource, path, response)
                if response.status not in _RETRIED:
                    raise failure
                asked_to_wait = _seconds(response.headers.get("Retry-After"))
            except ApiException as error:
                failure = self._unreachable(error.reason)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                failure = self._unreachable(error)
            wait = next(waits, None)
            if wait is None:
                raise failure
            time.sleep(max(wait, asked_to_wait))

    def _unreachable(self, reason: object) -> ClusterError:
        text = " ".join(str(reason).split())
        host = self.client.configuration.host
        if "certificate" in text.lower():
            return ClusterError(
                f"{host} shows a certificate that the kubeconfig does not trust ({text}): fetch the "
                f"kubeconfig again, or look at it with {self.kubectl('config view --minify')}"
            )
        return ClusterError(
            f"the API server {host} does not answer ({text}): is the cluster up and the network or VPN "
            f"there? {self.kubectl('cluster-info')}"
        )

    def _refusal(self, method: str, resource: Resource, path: str, response: Any) -> ApiError:
        detail = _detail(response)
        return ApiError(
            self._explain(method, resource, path, response.status, detail),
            status=response.status,
            detail=detail,
        )

    def _explain(self, method: str, resource: Resource, path: str, status: int, detail: str) -> str:
        if status == 401 or "system:anonymous" in detail:
            return (
                f"the API server does not accept the credentials ({status}), they may have expired: log in "
                f"to the cluster again, then check with {self.kubectl('auth whoami')}"
            )
        if status == FORBIDDEN and "cannot " in detail and " resource " in detail:
            question = f"auth can-i {_VERBS[method]} {resource.full_name}"
            return (
                f"not allowed: {detail}: have an administrator grant it, then check with "
                f"{self.kubectl(question)}"
            )
        if status == NOT_FOUND and detail.startswith("namespaces "):
            return f"namespace {self.namespace} does not exist: `kubectl create namespace {self.namespace}`"
        if status == NOT_FOUND:
            return f"not found: {detail}: {self.kubectl(f'get {resource.full_name}')}"
        if "failed calling webhook" in detail:
            return (
                f"an admission webhook does not answer ({detail}): is its operator running? "
                "`kubectl get pods -A | grep -E 'operator|trainer|webhook'`"
            )
        name = path.rpartition("/")[2]
        return f"the API server refuses to {_VERBS[method]} {resource.kind} {name} ({status}): {detail}"


def connect(*, context: str | None, namespace: str | None, patience: Patience | None = None) -> Cluster:
    """The cluster of the kubeconfig (KUBECONFIG, ~/.kube/config), or the one that this pod runs in.

    `namespace` None: the context's own, or `default`. Raises ClusterError where there is neither.
    """
    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    configuration = Configuration()
    try:
        if _any_file(files):
            contexts, current = kube_config.list_kube_config_contexts(files)
            if context is not None:
                current = next((known for known in contexts if known["name"] == context), None)
                if current is None:
                    known_names = ", ".join(known["name"] for known in contexts)
                    raise ClusterError(
                        f"--context {context}: the kubeconfig has {known_names or 'no context'}: "
                        "`kubectl config get-contexts`"
                    )
            kube_config.load_kube_config(
                config_file=files, context=context, client_configuration=configuration
            )
            default_namespace = (current or {}).get("context", {}).get("namespace") or "default"
        elif "KUBERNETES_SERVICE_HOST" in os.environ and context is None:
            kube_config.load_incluster_config(client_configuration=configuration)
            default_namespace = "default"
        else:
            raise ClusterError(
                f"no kubeconfig at {files}: fetch it from your cluster's provider, then "
                "`export KUBECONFIG=FILE` and check with `kubectl config current-context`"
            )
    except (ConfigException, yaml.YAMLError, OSError, KeyError, TypeError, ValueError) as error:
        raise ClusterError(
            f"the kubeconfig {files} is not usable ({' '.join(str(error).split())}): "
            "`kubectl config view` shows what is in it, `kubectl config use-context NAME` picks a context"
        ) from error
    # Our own retries count and wait; a second layer below them would multiply both.
    configuration.retries = urllib3.Retry(0, redirect=3)
    return Cluster(
        client=ApiClient(configuration),
        namespace=namespace or default_namespace,
        context=context,
        patience=patience or Patience(),
    )


def _any_file(files: str) -> bool:
    return any(Path(file).expanduser().is_file() for file in files.split(os.pathsep) if file)


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; its form as a date is not used by API servers."""
    return float(header) if header is not None and header.isdigit() else 0.0


def _detail(response: Any) -> str:
    """What the server says went wrong: the message of its Status object, or the first of the text."""
    data = response.data
    try:
        message = json.loads(data)["message"]
    except (ValueError, KeyError, TypeError):
        message = data.decode("utf-8", errors="replace")[:300]
    return " ".join(str(message).split()) or response.reason
