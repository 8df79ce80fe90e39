"""Options of the load, the positions and the threads reach the library."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import open_gguf
from engine.llama.model import LlamaBackend
from tests.native import tiny

PROMPT = [5, 60, 7, 80, 9, 100, 11, 120] * 4


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.experts(tmp_path_factory.mktemp("experts") / "experts.gguf")


def opened(path: Path, **fields: Any) -> LlamaBackend:
    defaults: dict[str, Any] = {"slots": 2, "context": 512, "kv_unified": True, "threads": 1}
    return open_gguf(EngineConfig.of(path=path, **defaults | fields), lambda share: None, lambda: True)


def logits(backend: LlamaBackend) -> NDArray[np.float32]:
    """Returns the logits after `PROMPT`, and closes the backend."""
    context = backend.context
    context.batch.add(0, 0, PROMPT, 1)
    found = context.decode().copy()
    backend.close()
    return found


@pytest.mark.parametrize(
    ("load", "tensors"),
    [
        ({}, set()),
        ({"n_cpu_moe": 2}, {f"blk.{layer}.ffn_{part}_exps" for layer in (0, 1) for part in ("gate", "up", "down")}),
        ({"cpu_moe": True}, {f"blk.{layer}.ffn_{part}_exps" for layer in range(4) for part in ("gate", "up", "down")}),
        ({"override_tensor": (r"blk\.(1|3)\.attn_q=CPU", "ffn_up_exps=CPU")},
         {"blk.1.attn_q", "blk.3.attn_q", *(f"blk.{layer}.ffn_up_exps" for layer in range(4))}),
    ],
    ids=["none", "n-cpu-moe", "cpu-moe", "override-tensor"],
)  # fmt: skip
def test_tensors_go_to_the_buffer_of_an_override(
    moe: Path, load: dict[str, Any], tensors: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "paceline.native"):
        logits(opened(moe, load=load))
    lines = [line for line in caplog.messages if "buffer type overridden to CPU" in line]
    assert {line.split()[1].removesuffix(".weight") for line in lines} == tensors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load": {"override_tensor": ("exps=GPU7",)}}, "there is no buffer 'GPU7'; the buffers are: CPU"),
        ({"load": {"override_tensor": ("exps",)}}, "--override-tensor exps is not PATTERN=BUFFER, such as exps=CPU"),
        ({"load": {"override_tensor": ("(=CPU",)}}, "error loading model: Mismatched"),
        ({"load": {"override_kv": ("a=int:x",)}}, "--override-kv a=int:x is not KEY=TYPE:VALUE"),
        ({"load": {"override_kv": ("a" * 128 + "=int:1",)}}, "is not KEY=TYPE:VALUE"),
        ({"load": {"override_kv": ("llama.block_count=int:-1",)}}, "expected a whole number from 1 to 512"),
        ({"load": {"override_kv": ("llama.expert_used_count=int:5",)}}, "expected a whole number from 1 to 4"),
        ({"load": {"override_kv": ("llama.expert_count=int:2",)}}, "llama.expert_count=int:2: expected 4, as in the"),
        ({"load": {"override_kv": ("llama.rope.scaling.type=str:ntk",)}}, "expected one of none, linear, yarn"),
        (
            {"load": {"override_kv": ("llama.attention.layer_norm_rms_epsilon=float:nan",)}},
            "expected a number of at least 0",
        ),
        ({"load": {"mlock": True, "load_mode": "none"}}, "--load-mode none and --mlock contradict each other"),
        ({"load": {"rpc": ("localhost:50052",)}}, "--rpc needs a llama-cpp-python that was built with"),
        ({"rope": {"scale": 4, "freq_scale": 0.25}}, "--rope-scale and --rope-freq-scale set the same factor"),
        ({"cpu": {"range": "7-0"}}, "--cpu-range 7-0 is no range: use two numbers from 0 to 511"),
        ({"cpu": {"mask": "0xg"}}, "--cpu-mask 0xg is no mask: use up to 128 hexadecimal digits"),
        ({"cpu": {"range": "500-501"}}, "name no CPU that this process may use; it may use 0"),
        ({"fit_target": "1G"}, "--fit-target 1G is no list of MiB: use whole numbers, such as 1024 or 1024,512"),
        ({"device": "CUDA7"}, "there is no device 'CUDA7'"),
    ],
)
def test_invalid_options_are_one_sentence(moe: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        opened(moe, **fields)
    assert "\n" not in str(error.value)


def test_devices_of_the_draft_model_are_checked_before_the_target_model_is_loaded(moe: Path) -> None:
    shares: list[float] = []
    config = EngineConfig.of(path=moe, draft={"path": str(moe), "device": "CUDA0,CUDA1"})
    with pytest.raises(ModelError, match="there is no device 'CUDA0'; the devices are: CPU"):
        open_gguf(config, shares.append, lambda: True)
    assert shares == []


def test_weights_are_the_same_however_they_are_read(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(opened(moe))
    modes: list[dict[str, Any]] = [
        {"mmap": False}, {"mmap": True}, {"mlock": True}, {"mmap": False, "mlock": True}, {"direct_io": True},
        {"lazy_mode": "on"}, {"check_tensors": True}, {"no_host": True},
    ]  # fmt: skip
    for load in modes:
        with caplog.at_level(logging.DEBUG, "paceline.native"):
            caplog.clear()
            assert np.array_equal(logits(opened(moe, load=load)), expected), load
        if mode := {(False, False): "none", (False, True): "mlock"}.get((load.get("mmap"), load.get("mlock", False))):  # type: ignore[arg-type]
            assert f"load_mode = {mode})" in caplog.text
    assert np.array_equal(logits(opened(moe, device="none")), expected)


def rope_change(path: Path, **fields: Any) -> tuple[NDArray[np.float32], str, int]:
    backend = opened(path, **fields)
    info = backend.info
    return logits(backend), info.layout, info.trained_context


def test_positions_are_scaled_as_by_the_metadata(moe: Path) -> None:
    """The rotations of a flag equal those of the same value in the file, and states of other rotations have another
    identity."""
    plain, identity, trained = rope_change(moe)
    flag, other_identity, _ = rope_change(moe, rope={"freq_base": 50_000})
    metadata, third_identity, _ = rope_change(moe, load={"override_kv": ("llama.rope.freq_base=float:50000",)})
    assert np.array_equal(flag, metadata)
    assert not np.array_equal(flag, plain)
    assert len({identity, other_identity, third_identity}) == 3
    scaled, _, longer = rope_change(moe, rope={"scaling": "linear", "scale": 4})
    stored, _, _ = rope_change(
        moe, load={"override_kv": ("llama.rope.scaling.type=str:linear", "llama.rope.scaling.factor=float:4")}
    )
    assert np.array_equal(scaled, stored)
    assert (trained, longer) == (8192, 4 * 8192)
    yarn, _, longer = rope_change(moe, rope={"scaling": "yarn", "scale": 4, "yarn_context": 4096})
    assert longer == 4 * 4096
    assert not np.array_equal(yarn, scaled)


def test_a_wrong_type_of_metadata_is_a_warning(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(moe, load={"override_kv": ("llama.rope.freq_base=int:50000",)}).close()
    assert "Bad metadata override type for key 'llama.rope.freq_base', expected float but got int" in caplog.text


def on_a_thread(function: Callable[[], Any]) -> Any:
    """Calls `function` on a new thread, whose affinity and priority end with it. Returns the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity of threads is a matter of Linux")
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_are_computed_on_the_chosen_cpus(moe: Path, threads: int) -> None:
    last = max(os.sched_getaffinity(0))

    def run() -> tuple[NDArray[np.float32], set[int]]:
        backend = opened(
            moe, threads=threads, cpu={"range": f"{last}-{last}", "mask_batch": hex(1 << last), "strict": 1}
        )
        return logits(backend), os.sched_getaffinity(0)

    found, cpus = on_a_thread(run)
    assert cpus == {last}
    assert np.array_equal(found, logits(opened(moe, threads=threads)))


def test_a_low_priority_is_that_of_the_computing_thread(moe: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, os.getpid())

    def run() -> int:
        opened(moe, cpu={"priority": -1, "numa": "distribute"}).close()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert on_a_thread(run) == min(19, before + 5)
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == before


def test_a_failed_assertion_ends_the_process_with_one_line() -> None:
    """Without the variable each failing thread forks a debugger that keeps the listening socket."""
    code = "import engine.llama; from llama_cpp import llama_cpp as n; n._lib.ggml_abort(b'a.c', 1, b'reason')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGABRT
    assert ended.stderr.strip() == "a.c:1: reason"


def test_full_windows_keep_prefixes_of_any_length(tmp_path: Path) -> None:
    path = tiny.windowed(tmp_path / "windowed.gguf")
    for full, intact in ((False, False), (True, True)):
        backend = opened(path, swa_full=full, ubatch=32, context=1024, kv_unified=False)
        context, tokens = backend.context, [3 + number % 200 for number in range(400)]
        context.batch.add(0, 0, tokens, 1)
        context.decode()
        assert context.cut(0, 64)
        assert context.intact(0, 64) is intact
        backend.close()


def test_the_limit_of_a_slot_sizes_the_pool(moe: Path) -> None:
    backend = opened(moe, context=0, slot_context=1024, kv_unified=None)
    assert (backend.info.kv_unified, backend.context.cells) == (True, 2048)
    backend.close()
