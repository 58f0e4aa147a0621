"""Meshes that the tests share, and callers of them.

A mesh costs ten seconds, so there is one for each broker in a run, and tests are written
not to be in each other's way: an order is known by its name, a count by its customer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.callers import Caller, GrpcCaller, RestCaller, grpc_caller, rest_caller
from tests.e2e.meshes import Mesh, repeated


@contextmanager
def a_mesh(folder: Path, broker: str, *options: str, otlp_endpoint: str = "") -> Iterator[Mesh]:
    """A mesh that runs until the block ends, and leaves nothing behind."""
    mesh = Mesh(folder / "state", broker)
    try:
        mesh.up(*options, otlp_endpoint=otlp_endpoint)
        yield mesh
        # Whatever the tests did to it, nobody was told anything twice.
        assert repeated(mesh.mails()) == {}
        assert mesh.down() == []
    finally:
        mesh.kill_leftovers()


@pytest.fixture(scope="session")
def postgres_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The mesh whose events go over the queue in PostgreSQL."""
    with a_mesh(tmp_path_factory.mktemp("postgres"), "postgres") as mesh:
        yield mesh


@pytest.fixture(scope="session")
def rabbitmq_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The mesh whose events go over a private RabbitMQ."""
    with a_mesh(tmp_path_factory.mktemp("rabbitmq"), "amqp") as mesh:
        yield mesh


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """The mesh of the broker that the test names; of PostgreSQL's queue if it names none."""
    broker = getattr(request, "param", "postgres")
    found = request.getfixturevalue("rabbitmq_mesh" if broker == "amqp" else "postgres_mesh")
    assert isinstance(found, Mesh)
    return found


@pytest.fixture
async def rest(mesh: Mesh) -> AsyncIterator[RestCaller]:
    """Merchant `default`, over REST."""
    async with rest_caller(mesh.access()) as caller:
        yield caller


@pytest.fixture
async def grpc(mesh: Mesh) -> AsyncIterator[GrpcCaller]:
    """Merchant `default`, over gRPC."""
    async with grpc_caller(mesh.access()) as caller:
        yield caller


@pytest.fixture
async def caller(request: pytest.FixtureRequest, rest: RestCaller, grpc: GrpcCaller) -> Caller:
    """Merchant `default`, over the protocol that the test names; over REST if it names none."""
    return grpc if getattr(request, "param", "rest") == "grpc" else rest


@pytest.fixture
async def acme(mesh: Mesh, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    """Merchant `acme`, who settles in dollars, over REST unless the test names gRPC."""
    called = grpc_caller if getattr(request, "param", "rest") == "grpc" else rest_caller
    async with called(mesh.access("acme")) as caller:
        yield caller
