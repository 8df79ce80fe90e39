"""The native layer on SmolLM2: the behaviour that the engine depends on, and calls that must not reach the library."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import Aborted, Context, Logits, NativeFault, NoFreeCells, StatePart
from engine.config import EngineConfig
from engine.contract import EngineFault, ModelError
from engine.llama import library, open_gguf, open_vocabulary
from engine.llama.model import LlamaBackend
from engine.llama.params import MAX_SCORES_BYTES, resolve_flash_attention
from tests.conftest import MODEL

PROMPT = "The quick brown fox jumps over the lazy dog, and then the dog"


def feed(context: Context, seq: int, start: int, tokens: list[int], outputs: int = 1) -> Logits:
    """Decodes rows of one sequence; returns a copy of the logits."""
    context.batch.clear()
    context.batch.add(seq, start, tokens, outputs)
    return context.decode().copy()


def close(left: Logits, right: Logits) -> bool:
    """Returns True if the logits are equal up to the effects of the batch's shape."""
    return bool(np.corrcoef(left, right)[0, 1] > 0.999)


def test_tokens_and_bytes(backend: LlamaBackend) -> None:
    vocab = backend.vocab
    for text in ["Hello, world", "naïve café 日本語 👩‍👩‍👧", "a\n\n  b\tc", ""]:
        ids = vocab.tokenize(text, special=True)
        assert b"".join(map(vocab.piece, ids)).decode() == text
    assert len(vocab.tokenize("<|im_start|>", special=True)) == 1
    assert len(vocab.tokenize("<|im_start|>", special=False)) > 1
    (start,) = vocab.tokenize("<|im_start|>", special=True)
    assert vocab.piece(start) == b"", "a control token has no bytes"
    assert vocab.text(start) == "<|im_start|>"
    assert vocab.tokenize("\ud800", special=False) == vocab.tokenize("?", special=False)
    assert {vocab.tokenize(text, special=True)[0] for text in ("<|im_end|>", "<|endoftext|>")} <= vocab.ends


def test_a_closed_vocabulary_uses_no_freed_memory() -> None:
    """A grammar may still be compiled on another thread when the model is closed."""
    with open_vocabulary(MODEL) as vocab:
        names = {token: vocab.text(token) for token in vocab.special}
        assert vocab.text(5000)
    assert "<|im_start|>" in names.values()
    assert {token: vocab.text(token) for token in vocab.special} == names
    for call in (lambda: vocab.text(5000), lambda: vocab.tokenize("a", special=False)):
        with pytest.raises(EngineFault, match="closed"):
            call()


def test_texts_are_tokenized_concurrently(backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = backend.vocab
    begun, go, tokenize = threading.Event(), threading.Event(), vocab._tokenize

    def held(data: bytes, *, add: bool, parse: bool) -> list[int]:
        if data == b"long":
            begun.set()
            assert go.wait(60)
        return tokenize(data, add=add, parse=parse)

    monkeypatch.setattr(vocab, "_tokenize", held)
    other = threading.Thread(target=vocab.tokenize, args=["long"], kwargs={"special": False})
    other.start()
    assert begun.wait(60)
    assert vocab.tokenize("short", special=False), "a lock would block this forever"
    go.set()
    other.join()


def test_info(backend: LlamaBackend) -> None:
    info = backend.info
    assert (info.vocabulary, info.trained_context, info.context) == (49152, 8192, 1024)
    assert info.chat_template is not None
    assert "<|im_start|>" in info.chat_template
    assert info.eos == "<|im_end|>"


def test_rows_in_one_batch_equal_rows_alone(backend: LlamaBackend) -> None:
    context = backend.context
    texts = ["one two three", "The capital of France is", "def add(a, b):"]
    alone = []
    for text in texts:
        alone.append(feed(context, 0, 0, backend.vocab.tokenize(text, special=True))[0])
        context.cut(0, 0)
    context.batch.clear()
    firsts = [
        context.batch.add(seq, 0, backend.vocab.tokenize(text, special=True), 1) for seq, text in enumerate(texts)
    ]
    together = context.decode()
    assert firsts == [0, 1, 2]
    for row, expected in zip(together, alone, strict=True):
        assert close(row, expected)
        assert row.argmax() == expected.argmax()


def test_only_output_rows_have_logits_in_their_order(backend: LlamaBackend) -> None:
    context, ids = backend.context, backend.vocab.tokenize(PROMPT, special=True)
    every = feed(context, 0, 0, ids, len(ids))
    assert every.shape == (len(ids), 49152)
    context.cut(0, 0)
    assert feed(context, 0, 0, ids[:-2], 0).shape == (0, 49152)
    last = feed(context, 0, len(ids) - 2, ids[-2:], 2)
    assert close(last[0], every[-2])
    assert close(last[1], every[-1])


def test_cutting_and_sharing(backend: LlamaBackend) -> None:
    context, ids = backend.context, backend.vocab.tokenize(PROMPT, special=True)
    expected = feed(context, 0, 0, ids)[0]
    assert context.length(0) == len(ids)
    assert context.copy(0, 3, 5)
    assert context.cut(0, 2)
    assert (context.length(0), context.length(3)) == (2, 5), "the copy keeps its cells when the source is cut"
    assert close(feed(context, 3, 5, ids[5:])[0], expected)
    assert context.cut(3, 0)
    assert context.length(3) == 0
    assert not context.copy(0, 3, 5), "positions that were dropped cannot be shared"
    assert context.length(3) == 0


def test_rejected_rows_leave_no_trace(backend: LlamaBackend) -> None:
    context, ids = backend.context, backend.vocab.tokenize(PROMPT, special=True)
    expected = feed(context, 0, 0, ids)[0]
    context.cut(0, 0)
    feed(context, 0, 0, [*ids[:6], 5, 6, 7], 1)
    assert context.cut(0, 6)
    assert close(feed(context, 0, 6, ids[6:])[0], expected)


def test_a_full_context_raises_and_changes_nothing(backend: LlamaBackend) -> None:
    context = backend.context
    feed(context, 0, 0, [5] * 256, 0)
    snapshot = context.save(0)
    state = snapshot.cut(0, 256) if snapshot is not None else None
    assert state is not None
    assert all(context.load(seq, [StatePart(state, 0, 256)]) for seq in (1, 2, 3))
    with pytest.raises(NoFreeCells):
        feed(context, 4, 0, [5])
    assert [context.length(seq) for seq in range(5)] == [256] * 4 + [0]
    context.cut(2, 0)
    assert feed(context, 4, 0, [5]).shape == (1, 49152)


@pytest.mark.parametrize("start", [0, 2, 4, 9])
def test_a_gap_or_a_repeated_position_is_a_fault(backend: LlamaBackend, start: int) -> None:
    context = backend.context
    feed(context, 0, 0, [5, 6, 7], 0)
    with pytest.raises(NativeFault, match="-1"):
        feed(context, 0, start, [5])
    assert context.length(0) == 3


def test_calls_that_end_the_process_are_refused(backend: LlamaBackend) -> None:
    context = backend.context
    with pytest.raises(NativeFault, match="0 rows"):
        context.decode()
    with pytest.raises(NativeFault, match="rows of logits"):
        feed(context, 0, 0, [5] * (context.outputs + 1), context.outputs + 1)
    with pytest.raises(NativeFault, match="vocabulary"):
        feed(context, 0, 0, [49152])
    with pytest.raises(NativeFault, match="vocabulary"):
        feed(context, 0, 0, [-1])
    with pytest.raises(AssertionError):
        feed(context, 0, 0, [5] * (context.batch.capacity + 1), 0)
    for seq in (-1, context.sequences, 256):
        with pytest.raises(NativeFault, match="sequence id"):
            context.cut(seq, 0)
        with pytest.raises(NativeFault, match="sequence id"):
            context.copy(0, seq, 0)
    with pytest.raises(NativeFault):
        feed(context, context.sequences + 1, 0, [5])
    context.batch.clear()
    assert feed(context, 0, 0, [5]).shape == (1, 49152), "the context still works"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"", "not a GGUF file: the file is empty"),
        (b"hello world", "not a GGUF file: it begins with 'hell', not with 'GGUF'"),
        (b"PK\x03\x04", "not a GGUF file: it begins with the bytes 50 4b 03 04, not with 'GGUF'"),
        (b"GGUF\x03\x00\x00\x00", "cannot load"),
        ("half", "cannot load"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes | str | None, words: str) -> None:
    path = tmp_path / "model.gguf"
    if content == "half":
        path.write_bytes(MODEL.read_bytes()[: 40 << 20])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        open_gguf(EngineConfig.of(path=path), lambda share: None, lambda: True)
    assert "\n" not in str(caught.value)


def test_the_file_of_the_draft_model_is_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    config, shares = EngineConfig.of(path=MODEL, draft={"path": str(tmp_path / "none.gguf")}), list[float]()
    with pytest.raises(ModelError, match=r"cannot read the draft model \(-md\) .*none.gguf: No such file"):
        open_gguf(config, shares.append, lambda: True)
    assert shares == []


def test_loading_reports_and_can_be_stopped() -> None:
    shares: list[float] = []
    config = EngineConfig.of(path=MODEL)
    with pytest.raises(ModelError):
        open_gguf(config, shares.append, lambda: len(shares) < 3)
    assert shares == sorted(shares)
    assert len(shares) < 10


@pytest.mark.skipif(bool(library.gpu_name()), reason="a GPU does not stop a running decode")
def test_a_running_decode_is_aborted_from_another_thread() -> None:
    backend = open_gguf(EngineConfig.of(path=MODEL, context=2048, rows=2048), lambda share: None, lambda: True)
    try:
        context = backend.context
        threading.Timer(0.05, context.abort).start()
        begun = time.perf_counter()
        with pytest.raises(Aborted):
            feed(context, 0, 0, [5] * 2000)
        assert time.perf_counter() - begun < 2.0, "2,000 rows would take several seconds"
    finally:
        backend.close()


def test_flash_attention_on_a_cpu_is_for_many_slots_with_unified_kv() -> None:
    def chosen(slots: int, gpu: bool = False, scores: int = 0, unified: bool = True, **given: Any) -> tuple[str, str]:
        found = resolve_flash_attention(EngineConfig.of(path=MODEL, **given).model, slots, gpu, scores, unified=unified)
        return found.flash_attention, found.cache_type_v

    assert chosen(31) == chosen(32, unified=False) == ("off", "f16")
    assert chosen(32) == ("auto", "bf16")
    assert chosen(4, scores=2 * MAX_SCORES_BYTES) == chosen(32, gpu=True) == ("auto", "f16")
    assert chosen(32, flash_attention="off") == ("off", "f16")
    assert chosen(32, cache_type_v="q8_0") == ("auto", "q8_0")


def test_contexts_whose_attention_differs_differ_in_the_layout_of_states(backend: LlamaBackend) -> None:
    many = open_gguf(EngineConfig.of(path=MODEL, slots=32, context=512), lambda share: None, lambda: True)
    try:
        rows = feed(many.context, 0, 0, many.vocab.tokenize(PROMPT, special=False))
        assert np.isfinite(rows).all()
        assert many.info.layout != backend.info.layout
    finally:
        many.close()
