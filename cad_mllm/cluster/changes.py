"""List, then watch: every change of some objects, across broken connections and expired versions."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cad_mllm.cluster.api import GONE, ApiError, Cluster, Resource
from cad_mllm.cluster.jobs import Json
from cad_mllm.errors import ClusterError

_FRUITLESS_ROUNDS = 20
_AT_ONCE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """One object was added, modified or deleted."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Json


def changes(
    cluster: Cluster,
    resource: Resource,
    *,
    labels: str = "",
    name: str = "",
    seen: Sequence[Json] = (),
    stop: threading.Event,
) -> Iterator[Change]:
    """What there is, then what changes, until `stop` is set. What was `seen` is told if it has changed since.

    No change is missed or told twice: a broken connection goes on at the last resourceVersion; an expired
    one (410 Gone) lists again and tells the differences. Raises ClusterError when the server refuses, or is
    gone for longer than its retries.
    """
    known = {item["metadata"]["uid"]: item for item in seen}
    version: str | None = None
    fruitless = 0
    while not stop.is_set():
        if version is None:
            answer = cluster.list_all(resource, labels=labels)
            items = [item for item in answer.get("items") or [] if name in ("", item["metadata"]["name"])]
            for change in _differences(known, items):
                _remember(known, change)
                yield change
            version = answer["metadata"]["resourceVersion"]
        started = time.monotonic()
        heard = False
        try:
            fields = f"metadata.name={name}" if name else ""
            for line in cluster.watch(resource, labels=labels, fields=fields, version=version).lines():
                if stop.is_set():
                    return
                event = _parse(line)
                if event is None:
                    break  # cut in the middle of a line: open anew
                item = event["object"]
                if event["type"] == "ERROR":
                    # Expired, or too broken to go on from: either way a new list mends it.
                    version = None
                    break
                heard = True
                version = item["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    change = Change(type=event["type"], object=item)
                    _remember(known, change)
                    yield change
        except ConnectionError:
            pass  # the next round opens a new one
        except ApiError as error:
            if error.status != GONE:
                raise
            version = None
        # A server or proxy that ends every watch at once must not be asked in a tight loop, nor for ever.
        lasted = time.monotonic() - started
        fruitless = 0 if heard or lasted > _AT_ONCE_SECONDS else fruitless + 1
        if fruitless > _FRUITLESS_ROUNDS:
            raise ClusterError(
                f"every watch of {resource.full_name} is cut off at once: does a proxy in between forbid "
                f"long connections? {cluster.kubectl(f'get {resource.full_name} --watch')}"
            )
        if fruitless:
            stop.wait(min(cluster.patience.first_wait * fruitless, cluster.patience.longest_wait))


def _differences(known: dict[str, Json], items: list[Json]) -> list[Change]:
    """From what was known to what is listed now."""
    listed = {item["metadata"]["uid"]: item for item in items}
    gone = [Change(type="DELETED", object=item) for uid, item in known.items() if uid not in listed]
    news = []
    for uid, item in listed.items():
        if uid not in known:
            news.append(Change(type="ADDED", object=item))
        elif item["metadata"]["resourceVersion"] != known[uid]["metadata"]["resourceVersion"]:
            news.append(Change(type="MODIFIED", object=item))
    return [*gone, *news]


def _remember(known: dict[str, Json], change: Change) -> None:
    uid = change.object["metadata"]["uid"]
    if change.type == "DELETED":
        known.pop(uid, None)
    else:
        known[uid] = change.object


def _parse(line: str) -> Json | None:
    try:
        event: Json = json.loads(line)
    except ValueError:
        return None
    return event
