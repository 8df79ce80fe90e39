"""Public routers with two simulated workers, and once with two real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.fleet import PUBLIC_ROUTERS, fleet_workers, routed
from bench.routers import LOAD_REQUESTS, affinity, measure, show_routers
from tests.conftest import MODEL


@pytest.mark.parametrize("name", PUBLIC_ROUTERS)
def test_router(name: str, tmp_path: Path) -> None:
    figures = measure(name, tmp_path)
    show_routers({name: figures})
    assert figures.affinity >= 0.95
    assert figures.drain.complete == LOAD_REQUESTS
    # The router can repeat a request elsewhere only until its stream has begun.
    assert figures.kill.lost == 0
    assert figures.kill.complete + figures.kill.broken + figures.kill.cut == LOAD_REQUESTS


def test_two_real_workers(tmp_path: Path) -> None:
    flags = ("-m", str(MODEL), "-t", "1", "-np", "4", "-c", "8192")
    with fleet_workers(2, *flags) as workers, routed("vllm-router", workers, tmp_path / "log") as fleet:
        assert asyncio.run(affinity(fleet.port, conversations=4)) >= 0.95
        assert all(worker.metric("vllm:request_success_total") > 0 for worker in workers)
