"""`meshctl demo`: what a stranger sees first."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from meshctl.samples import samples
from tests.e2e.meshes import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def test_the_demo_shows_each_orders_way_and_leaves_nothing(tmp_path: Path) -> None:
    """Twenty orders go the way that each says it has to go; exit code 0, nothing left."""
    mesh = Mesh(tmp_path / "state", "postgres")
    folders = set(Path(tempfile.gettempdir()).glob("ordermesh-demo-*"))
    # The exit code is 1 when any order went otherwise.
    done = await asyncio.to_thread(mesh.run, "demo", within_seconds=120)
    shown = done.stdout + done.stderr
    for sample in samples():
        assert sample.title.split()[0] in shown
    rows = [line for line in done.stdout.splitlines() if line.rstrip().rstrip("│").endswith("ok")]
    assert len(rows) == len(samples()), done.stdout
    for word in (
        "AWAITING_PAYMENT NONE",
        "CONFIRMED PAID",
        "FAILED NONE",
        "CANCELLED REFUNDED",
        "INVALID_ARGUMENT INVALID_FIELD",
        "a repeat: the order of 1",
        "card_declined",
        "CAPTURED",
        "SENT payment_receipt",
        "each went its way",
    ):
        assert word in done.stdout, word
    assert "everything is stopped" in shown
    assert set(Path(tempfile.gettempdir()).glob("ordermesh-demo-*")) <= folders
    assert not mesh.state.exists(), "it touches no mesh of ours"
