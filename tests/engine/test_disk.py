"""Blocks on disk are complete or absent, are changed in order, and do not delay the engine."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import checksummed
from engine.backend import State
from engine.kv import disk as module
from engine.kv import record
from engine.kv.disk import Disk, UnusableFolder, Written

ROOT = "00" * 16
KEYS = [f"{number:032x}" for number in range(1, 7)]
A, B, C = KEYS[:3]
TOKENS = array("i", [5, 0, 2**31 - 1, 7])


def state_of(seed: int, size: int = 50) -> State:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def equal(left: State | None, right: State | None) -> bool:
    return left is right if left is None or right is None else np.array_equal(left, right)


def settle(disk: Disk) -> list[Written]:
    """Waits until all writes are done, and returns their results."""
    until = time.monotonic() + 5
    while disk.queued and time.monotonic() < until:
        time.sleep(0.0005)
    assert not disk.queued
    return disk.finished()


def put(disk: Disk, key: str, state: State, parent: str = ROOT) -> int | None:
    disk.write(key, parent, 64, TOKENS, state)
    while not (finished := settle(disk)):
        time.sleep(0.0005)  # an empty state is never queued
    (written,) = finished
    assert written.key == key
    return written.bytes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "kept", "model a")
    yield disk
    disk.close()


class WriteGate:
    """Blocks every write until `open` is set; sets `began` when the worker has reached a write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.open, self._save = Event(), Event(), module._save
        monkeypatch.setattr(module, "_save", self.save)

    def save(self, *block: Any) -> int:
        self.began.set()
        assert self.open.wait(5)
        return self._save(*block)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> Iterator[WriteGate]:
    gate = WriteGate(monkeypatch)
    yield gate
    gate.open.set()


# ── files ──


@pytest.mark.parametrize("size", [0, 1, 50, 3_000_000])
def test_written_blocks_are_read(tmp_path: Path, size: int) -> None:
    disk = Disk(tmp_path, "model a")
    before = time.time()
    written = put(disk, A, state_of(1, size))
    path = disk.folder / f"{A}.block"
    assert written == path.stat().st_size >= size
    assert path.stat().st_mode & 0o077 == disk.folder.stat().st_mode & 0o077 == 0
    read = disk.read(A).result(5)
    assert equal(read, state_of(1, size))
    disk.close()
    (entry,) = Disk(tmp_path, "model a").entries()
    assert (entry.key, entry.parent, entry.start, entry.tokens) == (A, ROOT, 64, TOKENS)
    assert (entry.bytes, entry.tokens.typecode) == (written, "i")
    assert before - 0.01 <= entry.used_at <= time.time()


def test_a_block_may_be_written_again(disk: Disk) -> None:
    put(disk, A, state_of(1))
    put(disk, A, state_of(2))
    assert equal(disk.read(A).result(5), state_of(2))
    assert len(disk.entries()) == 1


def test_entries_come_in_the_order_of_use(disk: Disk) -> None:
    for key in (A, B, C):
        put(disk, key, state_of(1))
    assert [entry.key for entry in disk.entries()] == [A, B, C]
    disk.touch(A)
    disk.touch(KEYS[5])
    disk.close()
    assert [entry.key for entry in disk.entries()] == [B, C, A]


def test_entries_read_no_state(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    put(disk, A, state_of(1, 2_000_000))
    read: list[int] = []
    real = module._head

    def head(file: Any, *rest: Any) -> Any:
        found = real(file, *rest)
        read.append(os.lseek(file.fileno(), 0, os.SEEK_CUR))
        return found

    monkeypatch.setattr(module, "_head", head)
    assert len(disk.entries()) == 1
    assert read[0] < 300


def test_every_flipped_bit_is_found(disk: Disk) -> None:
    put(disk, A, state_of(1))
    path = disk.folder / f"{A}.block"
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        if at < len(whole) - 50:
            assert disk.entries() == [], at
            assert not path.exists()
            path.write_bytes(damaged)
        assert disk.read(A).result(5) is None, at
        assert not path.exists()


def test_every_torn_file_is_found(disk: Disk) -> None:
    put(disk, A, state_of(1))
    path = disk.folder / f"{A}.block"
    whole = path.read_bytes()
    for damaged in [*(whole[:size] for size in range(len(whole))), whole + b"\0", bytes(len(whole))]:
        path.write_bytes(damaged)
        assert disk.entries() == []
        assert not path.exists()
        path.write_bytes(damaged)
        assert disk.read(A).result(5) is None
        assert not path.exists()


def test_a_renamed_file_is_not_another_block(disk: Disk) -> None:
    put(disk, A, state_of(1))
    (disk.folder / f"{A}.block").rename(disk.folder / f"{B}.block")
    assert disk.entries() == []


def test_models_do_not_share_blocks(tmp_path: Path, disk: Disk) -> None:
    other = Disk(tmp_path / "kept", "model b")
    assert disk.folder.name != other.folder.name
    assert len(disk.folder.name) == 16
    for reader in (lambda: other.read(A).result(5), lambda: other.entries() or None):
        put(disk, A, state_of(1))
        assert reader() is None
        shutil.copy(disk.folder / f"{A}.block", other.folder)
        assert reader() is None
        assert os.listdir(other.folder) == []
    assert len(disk.entries()) == 1
    other.close()


def test_other_versions_are_removed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_FORMAT", record._FORMAT._replace(version=7))
    put(disk, A, state_of(1))
    monkeypatch.undo()
    assert disk.entries() == []
    assert os.listdir(disk.folder) == []


def test_leftovers_are_removed_and_other_files_stay(disk: Disk) -> None:
    folder = disk.folder
    for name in (f"{A}.abc_1234.part", "0.abcdefgh.part", f"{B}.block"):
        (folder / name).write_bytes(b"half")
    others = {"notes.block", "ab.part", "x.abcdefgh.part", "AB.block", "ab.block.bak", ".block", "ab.txt", "ab"}
    for name in others:
        (folder / name).write_bytes(b"theirs")
    (folder / f"{C}.block").mkdir()
    (folder / "cd.block").symlink_to(folder / "ab.txt")
    os.mkfifo(folder / "ef.block")
    assert disk.entries() == []
    assert set(os.listdir(folder)) == others | {f"{C}.block", "cd.block", "ef.block"}


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_an_unusable_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnusableFolder, match=r"cannot write prefixes to .*file.*: Not a directory") as caught:
        Disk(tmp_path / below, "model a")
    assert isinstance(caught.value, OSError)


WRITES = """
import sys
from array import array
from pathlib import Path
import numpy as np
from engine.kv.disk import Disk
disk = Disk(Path(sys.argv[1]), "model a")
print("ready", flush=True)
for number in range(10**6):
    size = 200_000 + number % 7
    disk.write(f"{number % 30:032x}", "00", number, array("i", range(64)), np.full(size, number % 251, np.uint8))
    while disk.queued > 2 * 10**6:
        pass
"""


def test_a_kill_leaves_only_whole_files(tmp_path: Path) -> None:
    folders = {tmp_path / "few": 3, tmp_path / "many": 20}
    children = [subprocess.Popen([sys.executable, "-c", WRITES, folder], stdout=subprocess.PIPE) for folder in folders]
    for (folder, wanted), child in zip(folders.items(), children, strict=True):
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        while child.poll() is None and len(list(folder.glob("*/*.block"))) < wanted:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        disk = Disk(folder, "model a")
        blocks = {path for path in os.listdir(disk.folder) if path.endswith(".block")}
        entries = disk.entries()
        assert len(blocks) >= wanted
        assert {f"{entry.key}.block" for entry in entries} == blocks == set(os.listdir(disk.folder))
        for entry in entries:
            state = disk.read(entry.key).result(5)
            assert state is not None
            assert state.size == 200_000 + entry.start % 7
            assert (state == entry.start % 251).all()
        disk.close()


# ── order ──


def test_reads_overtake_writes(disk: Disk, gate: WriteGate) -> None:
    gate.open.set()
    put(disk, A, state_of(1))
    gate.open.clear()
    gate.began.clear()
    for key in (B, C, *KEYS[3:]):
        disk.write(key, ROOT, 0, TOKENS, state_of(2))
    assert gate.began.wait(5)
    read = disk.read(A)
    missing = disk.read("ff" * 16)
    after: list[int] = []
    read.add_done_callback(lambda _: after.append(disk.queued))
    assert disk.queued == 5 * 50
    assert disk.finished() == []
    gate.open.set()
    assert equal(read.result(5), state_of(1))
    assert missing.result(5) is None
    assert after == [4 * 50]
    assert [written.key for written in settle(disk)] == [B, C, *KEYS[3:]]


def test_queued_writes_can_be_read(disk: Disk, gate: WriteGate) -> None:
    disk.write(A, ROOT, 0, TOKENS, state_of(1))
    assert gate.began.wait(5)
    disk.write(B, ROOT, 0, TOKENS, state_of(2))
    first = disk.read(B)
    disk.touch(B)
    second = disk.read(B)
    disk.remove(B)
    third = disk.read(B)
    disk.write(B, ROOT, 0, TOKENS, state_of(3))
    fourth = disk.read(B)
    gate.open.set()
    expected = [state_of(2), state_of(2), None, state_of(3)]
    assert all(map(equal, (read.result(5) for read in (first, second, third, fourth)), expected))


def test_later_changes_do_not_overtake_a_read(disk: Disk, gate: WriteGate) -> None:
    gate.open.set()
    put(disk, A, state_of(1))
    gate.open.clear()
    gate.began.clear()
    disk.write(B, ROOT, 0, TOKENS, state_of(2))
    assert gate.began.wait(5)
    reads = [disk.read(A), disk.read(C)]
    disk.remove(A)
    disk.write(C, ROOT, 0, TOKENS, state_of(3))
    gate.open.set()
    assert equal(reads[0].result(5), state_of(1))
    assert reads[1].result(5) is None
    settle(disk)
    assert disk.read(A).result(5) is None


def test_a_removal_does_not_overtake_its_write(disk: Disk, gate: WriteGate) -> None:
    for key in (A, B):
        disk.write(key, ROOT, 0, TOKENS, state_of(1))
        disk.remove(key)
    gate.open.set()
    disk.close()
    assert [written.key for written in disk.finished() if written.bytes] == [A, B]
    assert os.listdir(disk.folder) == []


def test_a_cancelled_read_is_not_done(disk: Disk, gate: WriteGate) -> None:
    disk.write(A, ROOT, 0, TOKENS, state_of(1))
    assert gate.began.wait(5)
    (disk.folder / f"{B}.block").write_bytes(b"torn")
    disk.write(C, ROOT, 0, TOKENS, state_of(1))
    read = disk.read(B)
    assert read.cancel()
    gate.open.set()
    assert equal(disk.read(C).result(5), state_of(1))
    disk.close()
    assert (disk.folder / f"{B}.block").exists()
    with pytest.raises(CancelledError):
        read.result(0)


def test_no_state_stays_in_memory(disk: Disk) -> None:
    state = state_of(1)
    gone = weakref.ref(state)
    disk.write(A, ROOT, 0, TOKENS, state)
    del state
    settle(disk)
    answer = disk.read(A)
    read = weakref.ref(answer.result(5))
    del answer
    until = time.monotonic() + 5
    while (gone() is not None or read() is not None) and time.monotonic() < until:
        time.sleep(0.001)
    assert gone() is None
    assert read() is None


# ── failures ──


class FullDisk:
    """Writes only half of any content while `is_full`, and fails at the state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full, self.tries = True, 0
        monkeypatch.setattr(checksummed, "open", self.open, raising=False)

    def open(self, handle: int, mode: str) -> Any:
        self.tries += 1
        file = open(handle, mode)  # noqa: SIM115
        return SimpleNamespace(write=self.write(file), close=file.close) if self.is_full else file

    @staticmethod
    def write(file: Any) -> Callable[[Any], None]:
        def half(content: Any) -> None:
            file.write(content[: len(content) // 2])
            if isinstance(content, memoryview):
                raise OSError(errno.ENOSPC, "No space left on device")

        return half


def test_a_full_disk_pauses_writing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(disk, A, state_of(1))
    full = FullDisk(monkeypatch)
    assert [put(disk, key, state_of(2)) for key in (B, C, A)] == [None, None, None]
    assert full.tries == 1
    assert disk.paused
    assert equal(disk.read(A).result(5), state_of(1))
    assert os.listdir(disk.folder) == [f"{A}.block"]
    monkeypatch.setattr(module, "WRITE_PAUSE_SECONDS", 0.0)
    disk._writes_resume_at = 0.0
    assert put(disk, B, state_of(2)) is None
    assert full.tries == 2
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "paceline.memory")
    assert "No space left on device" in record.message
    full.is_full = False
    assert put(disk, B, state_of(2))
    assert not disk.paused
    assert equal(disk.read(B).result(5), state_of(2))
    full.is_full = True
    assert put(disk, C, state_of(2)) is None
    assert len(caplog.records) == 2


def test_the_folder_may_vanish(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    put(disk, A, state_of(1))
    shutil.rmtree(disk.folder.parent)
    assert disk.read(A).result(5) is None
    disk.touch(A)
    disk.remove(A)
    assert put(disk, B, state_of(1)) is None
    assert put(disk, C, state_of(1)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_another_process_may_clear_leftovers_during_a_write(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.replace
    calls: list[str] = []

    def replace(source: str, target: Path) -> None:
        calls.append(source)
        if len(calls) == 1:
            assert disk.entries() == []
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert put(disk, A, state_of(1))
    assert len(calls) == 2
    assert not caplog.records


def test_any_failure_of_a_read_is_a_miss(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    put(disk, A, state_of(1))
    monkeypatch.setattr(module, "_head", lambda *_: 1 / 0)
    assert disk.read(A).result(5) is None
    monkeypatch.undo()
    assert disk.read(A).result(5) is None
    assert put(disk, A, state_of(1))


def test_closing_is_bounded(disk: Disk, gate: WriteGate) -> None:
    for key in (A, B):
        disk.write(key, ROOT, 0, TOKENS, state_of(1))
    assert gate.began.wait(5)
    read = disk.read(C)
    begun = time.monotonic()
    disk.close(0.05)
    assert time.monotonic() - begun < 1
    assert not read.done()
    gate.open.set()
    assert read.result(5) is None
    assert [(written.key, written.bytes is None) for written in settle(disk)] == [(A, False), (B, True)]


def test_closing_finishes_queued_jobs(disk: Disk) -> None:
    for key in KEYS:
        disk.write(key, ROOT, 0, TOKENS, state_of(1, 100_000))
    read = disk.read(KEYS[-1])
    disk.close()
    disk.close()
    assert disk.queued == 0
    assert len(disk.finished()) == len(disk.entries()) == len(KEYS)
    assert equal(read.result(0), state_of(1, 100_000))


def test_closing_an_unused_disk(disk: Disk) -> None:
    disk.close()
    assert disk._thread is None


# ── all together ──

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "remove", "touch", "vanish", "tear", "reopen"]), st.sampled_from(KEYS[:4])
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_random_operations_equal_a_dict(operations: list[tuple[str, str]]) -> None:
    """A read returns the effect of exactly the changes submitted before it, however late the worker is."""
    with tempfile.TemporaryDirectory() as name:
        disk = Disk(Path(name), "model a")
        model: dict[str, State] = {}
        expected: list[tuple[Any, State | None]] = []
        for number, (operation, key) in enumerate(operations):
            match operation:
                case "write":
                    model[key] = state_of(number)
                    disk.write(key, ROOT, number, TOKENS, model[key])
                case "read":
                    expected.append((disk.read(key), model.get(key)))
                case "remove":
                    model.pop(key, None)
                    disk.remove(key)
                case "touch":
                    disk.touch(key)
                case "vanish" | "tear":
                    settle_reads(disk, expected)
                    path = disk.folder / f"{key}.block"
                    if model.pop(key, None) is not None:
                        path.unlink() if operation == "vanish" else os.truncate(path, 180)
                case _:
                    disk.close()
                    disk = Disk(Path(name), "model a")
                    assert {entry.key for entry in disk.entries()} == model.keys()
        settle_reads(disk, expected)
        disk.close()
        assert {entry.key for entry in disk.entries()} == model.keys()
        assert len(os.listdir(disk.folder)) == len(model)


def settle_reads(disk: Disk, expected: list[tuple[Any, State | None]]) -> None:
    assert all(written.bytes is not None for written in settle(disk))
    for answer, state in expected:
        assert equal(answer.result(5), state)
    expected.clear()
