"""`meshctl demo`: what a stranger sees first."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from meshctl.samples import samples
from tests.e2e.meshes import Mesh
from tests.processes import processes_where

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_the_demo_shows_each_orders_way_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty orders go the way that each says it has to go; exit code 0, nothing left."""
    mesh = Mesh(tmp_path / "state", "postgres")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    # The exit code is 1 when any order went otherwise.
    done = mesh.run("demo", within_seconds=120)
    table = [line.rstrip() for line in done.stdout.splitlines()]
    for number, sample in enumerate(samples(), start=1):
        assert any(
            line.startswith(f"{number} ") and sample.via in line and sample.title in line
            and line.endswith("ok")
            for line in table
        ), f"{number} {sample.title}\n{done.stdout}"  # fmt: skip
    for word in (
        "AWAITING_PAYMENT",
        "CONFIRMED PAID",
        "CANCELLED REFUNDED",
        "INVALID_ARGUMENT INVALID_FIELD",
        "a repeat: the order of 1",
        "card_declined",
        "CAPTURED 25.00 EUR",
        "payment_receipt",
        "each went its way",
    ):
        assert word in done.stdout, f"{word}\n{done.stdout}"
    assert "everything is stopped" in done.stderr
    assert list(scratch.iterdir()) == []
    assert processes_where(lambda process: _is_in(process, scratch)) == []
    assert not mesh.state.exists(), "it touches no mesh of ours"


def _is_in(process: psutil.Process, folder: Path) -> bool:
    return str(folder) in " ".join([*process.cmdline(), process.cwd()])
