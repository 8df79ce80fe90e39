"""Saved states are used only for the same weights: every byte of the files counts, and is hashed once."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from pathlib import Path

import pytest

from engine.config import MemoryConfig
from engine.contents import ContentDigest, model_files
from engine.contract import EngineFault
from engine.kv import Offload, open_offload
from tests.engine.test_memory import bench_with, prompt_of, run_request
from tests.engine.test_same_as_alone import context_of
from tests.toy import describe


def digest(path: Path) -> str:
    return ContentDigest(path).future().result()


def test_every_byte_counts_and_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(9_000_000))
    with caplog.at_level(logging.INFO, "paceline.memory"):
        first = digest(path)
        assert digest(path) == first
        assert caplog.text.count("hashed") == 1
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(5_000_001)
            file.write(b"x")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # an editor that restores the time
        assert digest(path) != first
        assert caplog.text.count("hashed") == 2


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert model_files(parts[0]) == parts
    for number, part in enumerate(parts):
        part.write_bytes(bytes([number]) * 100)
    first = digest(parts[0])
    parts[2].write_bytes(b"other")
    assert digest(parts[0]) != first
    assert digest(tmp_path / "missing.gguf") == ""


def test_closing_ends_the_computation(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(100))
    contents = ContentDigest(path)
    contents.close()
    with pytest.raises(EngineFault, match="shutting down"):
        contents.future().result()


def tiers(folder: Path, future: Future[str]) -> Offload:
    info = describe(context_of(True, 1000))
    found = open_offload(MemoryConfig(ram=1, disk=str(folder)), info, future, whole=False)
    assert found is not None
    return found


def known(text: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(text)
    return future


def test_the_disk_tier_waits_for_the_digest(tmp_path: Path) -> None:
    """Blocks stay in RAM until the digest is known, are then written, and are found by the same weights only."""
    future: Future[str] = Future()
    offload = tiers(tmp_path, future)
    bench = bench_with(offload)
    run_request(bench, 0, prompt_of(300))
    bench.offload_idle()
    assert (len(offload.disk), list(tmp_path.iterdir())) == (0, [])
    future.set_result("digest")
    offload.poll()
    assert len(offload.disk) == len(offload.ram) > 0
    offload.check()
    bench.core.close()
    for text, cached in (("digest", 300), ("edited", 0)):
        opened = tiers(tmp_path, known(text))
        opened.await_disk(1.0)
        again = bench_with(opened)
        assert run_request(again, 0, (*prompt_of(300), 7)).usage.cached == cached
        again.core.close()


def test_without_a_digest_there_is_no_disk_tier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    future: Future[str] = Future()
    offload = tiers(tmp_path, future)
    future.set_exception(EngineFault("the model's file cannot be read: Input/output error"))
    bench = bench_with(offload)
    assert run_request(bench, 0, prompt_of(300)).usage.cached == 0
    assert "there is no disk tier: the model's file cannot be read" in caplog.text
