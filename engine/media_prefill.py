"""Prefills the images and sounds of prompts: the embeddings of a run are decoded in a batch without tokens.

The embeddings are computed on the encoding thread. A run without embeddings blocks its own sequence only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from engine.backend import Aborted, Backend, NativeFault, NoFreeCells
from engine.config import EngineConfig
from engine.contract import REQUEST_FAILED, EngineFault, ModelError
from engine.kv import KVCache
from engine.lifecycle import Lifecycle
from engine.media import Embeddings, MediaEncoder, MediaRun, WantedRun
from engine.running import PlacedRows
from engine.scheduler import ScheduledRows, by_prefill_order, by_urgency
from engine.sequence import Sequence

# Number of wanted runs of each sequence: the one to decode, and the next one, which is encoded concurrently.
RUNS_AHEAD = 2
# Maximum seconds between two executions of commands while the encoding blocks all sequences.
ENCODING_WAIT_SECONDS = 0.01


def has_media_library() -> bool:
    """Returns True if the installed llama-cpp-python was built with the library for images and sounds."""
    package = find_spec("llama_cpp")
    folders = package.submodule_search_locations if package is not None else None
    return any(any(Path(folder, "lib").glob("*mtmd*")) for folder in folders or ())


def open_encoder(config: EngineConfig, target: Backend) -> MediaEncoder | None:
    """Opens the projector of `config.media` for the model `target`. Returns None if none is configured. Raises
    ModelError."""
    if not config.media.path:
        return None
    if config.sim.on:
        raise ModelError("the simulated model reads no images; leave --mmproj out")
    from engine.llama import open_projector

    return MediaEncoder(open_projector(config, target), config.media.encoded_bytes(config.memory.ram_bytes))


class MediaPrefill:
    """Decodes images and sounds between the steps. Belongs to the engine thread."""

    def __init__(self, encoder: MediaEncoder, kv: KVCache, lifecycle: Lifecycle) -> None:
        self._encoder = encoder
        self._kv = kv
        self._lifecycle = lifecycle
        self._running = lifecycle.running
        # True if the encoder has wanted runs.
        self._has_wanted = False

    def prepare(self) -> bool:
        """Sets the runs that the encoder computes next, and `Sequence.awaits_encoding`. Fails the requests whose runs
        cannot be encoded. Returns True if a sequence has a run to decode.

        Each sequence has one run encoded, in the order of the prefill, before any sequence has a second one.
        """
        wanted: list[list[WantedRun]] = [[] for _ in range(RUNS_AHEAD)]
        now = time.perf_counter()
        for sequence in self._by_prefill_order([each for each in self._running.values() if each.request.media]):
            run = sequence.next_run
            sequence.awaits_encoding = False
            if run is None or self._kv.loading(sequence.seq):
                continue
            ahead = (each for each in sequence.request.media if each.end > sequence.computed)
            for runs, each in zip(wanted, ahead, strict=False):
                runs.append(WantedRun(sequence.salt, each))
            result = self._encoder.result(WantedRun(sequence.salt, run))
            if isinstance(result, Exception):
                self._lifecycle.fail(sequence, EngineFault(REQUEST_FAILED))
            if result is None and run.start <= sequence.computed:
                sequence.awaits_encoding, sequence.prefill_due = True, now
        if wanted[0] or self._has_wanted:
            self._encoder.want([*chain(*wanted)])
        self._has_wanted = bool(wanted[0])
        return self._has_wanted

    def decode(self, commit: Callable[[list[PlacedRows]], None], prompt_rows: Callable[[], int], max_rows: int) -> int:
        """Decodes rows of at most one run, and passes them to `commit`. Returns the number of rows: of a causal run at
        most `max_rows` and `prompt_rows()`, of another one all that are left; 0 if the text of another prompt precedes
        the run in the order of the prefill."""
        prefilling = [each for each in self._running.active if each.num_uncomputed > 1]
        for sequence in self._by_prefill_order(prefilling):
            if self._running.num_ready(sequence):
                return 0
            run = sequence.next_run
            if run is None or sequence.num_ready or sequence.awaits_encoding or self._kv.loading(sequence.seq):
                continue
            result = self._encoder.result(WantedRun(sequence.salt, run))
            if not isinstance(result, Exception) and result is not None:
                rest = result[sequence.computed - run.start :]
                if run.chunk.causal:
                    # With a limit of 0 the step measures the cost of decoding alone.
                    if not (rows := prompt_rows()):
                        return 0
                    cells = max(1, self._kv.free_cells + self._kv.evictable_cells)
                    ready = self._kv.ready(sequence.seq, len(sequence.tokens))
                    rest = rest[: min(rows, max_rows, cells, ready)]
                return self._decode(sequence, run, rest, commit)
        return 0

    def wait(self) -> None:
        """Blocks until a run is encoded, for at most `ENCODING_WAIT_SECONDS`. No effect if no run is wanted."""
        if self._has_wanted:
            self._encoder.wait(ENCODING_WAIT_SECONDS)

    def _by_prefill_order(self, sequences: list[Sequence]) -> list[Sequence]:
        if len(sequences) < 2:
            return sequences
        return [self._running[view.key] for view in by_prefill_order(self._running.views(sequences))]

    def _decode(
        self, sequence: Sequence, run: MediaRun, rows: Embeddings, commit: Callable[[list[PlacedRows]], None]
    ) -> int:
        self._kv.evict(len(rows))
        try:
            self._encoder.projector.decode(sequence.seq, sequence.computed, rows, run)
        except NoFreeCells:
            self._preempt_for(sequence)
            return 0
        except (Aborted, NativeFault) as error:
            self._lifecycle.fail(sequence, EngineFault(f"an image or sound cannot be decoded: {error}"))
            return 0
        commit([self._running.placed(ScheduledRows(sequence.key, len(rows)))])
        return len(rows)

    def _preempt_for(self, sequence: Sequence) -> None:
        """Frees cells for `sequence`: preempts the least urgent sequence, as `scheduler.plan` does, which may be
        `sequence`. Fails `sequence` if there is no other one."""
        if len(self._running) > 1:
            self._lifecycle.preempt(self._running[by_urgency(self._running.views())[-1].key])
        else:
            self._lifecycle.reject_rows([sequence])
