"""The image that `make test-image` built (CAD_MLLM_TEST_IMAGE names it), and what its pods share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .containers import Pods

UID = 1000


@pytest.fixture(scope="session")
def image() -> str:
    name = os.environ.get("CAD_MLLM_TEST_IMAGE")
    assert name, "run these tests by `make test-image`: it builds the image first"
    return name


@pytest.fixture
def pods(image: str, tmp_path: Path) -> Iterator[Pods]:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    os.chown(outputs, UID, UID)
    with Pods(image=image, outputs=outputs) as started:
        yield started
