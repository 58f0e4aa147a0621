"""One edge with two order replicas for all tests that do no harm to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.edge.harness import Edge, an_edge


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """A running edge; tests that kill or exhaust something start their own."""
    with an_edge(tmp_path_factory.mktemp("edge")) as running:
        yield running
