"""No launcher outlives its test."""

from collections.abc import Iterator

import pytest

from tests.launch.launchers import end_all


@pytest.fixture(autouse=True)
def launchers_end_with_the_test() -> Iterator[None]:
    yield
    end_all()
