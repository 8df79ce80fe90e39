"""Terminal output on stderr: progress of long operations and the start message."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from api.config.flags import FLAGS
from api.generation.loaded_model import LoadedModel

# Share of the work between two progress lines if stderr is not a terminal.
_LINE_SHARE = 0.25
# Settings of a draft model that MTP layers use as well, and those of their load from a file of their own.
_USED_BY_MTP = ("noise", "n_max", "n_min", "p_min")
_USED_BY_HEAD = ("path", "gpu_layers", "device", "override_tensor", "cpu_moe", "n_cpu_moe")


def print_line(line: str) -> None:
    """Writes one line to stderr. Errors of the write are ignored, as they must not end a server."""
    with suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class ProgressBar:
    """A context manager that shows progress: a bar on a terminal, otherwise one line for each quarter."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._next_share = _LINE_SHARE
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task(self._title, total=1.0)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        else:
            print_line(self._title)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, share: float) -> None:
        """Sets the completed share, 0 to 1."""
        if self._progress is not None:
            self._progress.update(self._task, completed=share)
            return
        if share >= self._next_share:
            quarters = int(share / _LINE_SHARE)
            print_line(f"{self._title}: {quarters * 25} %")
            self._next_share = (quarters + 1) * _LINE_SHARE


def start_message(model: LoadedModel, url: str, *other_urls: str) -> str:
    """Returns the start message: warnings, the model, the server's URLs and settings, and an example command."""
    engine = model.engine
    kv = (
        f"unified KV, {engine.info.context} tokens"
        if engine.memory.kv_unified
        else f"per-slot KV, {engine.request_limit} tokens each"
    )
    facts = [
        f"Serving {', '.join(model.aliases)} on {' and '.join((url, *other_urls))}",
        *([f"{engine.slots} slot{'s' if engine.slots > 1 else ''}", kv] if engine.info.generates else []),
        engine.info.device,
        *(["deterministic"] if engine.info.exact else []),
    ]
    key = " -H 'Authorization: Bearer YOUR_KEY'" if model.options.server.has_keys else ""
    if not engine.info.generates:
        return "\n".join([" · ".join(facts), *_embedding_lines(model)])
    lines = [
        *(f"Note: {warning}" for warning in _warnings(model)),
        " · ".join(facts),
        *([f"KV layout: {engine.memory.kv_reason}"] if engine.memory.kv_reason else []),
        *_speculation_lines(model),
        *_embedding_lines(model),
        *([f"Page: {url}/"] if model.options.server.ui else []),
        f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        """  -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}'""",
    ]
    return "\n".join(lines)


def _warnings(model: LoadedModel) -> Iterator[str]:
    """Yields deviations from the options: an unusable chat template, requested proposer types without effect, and
    settings of a draft model that is not there."""
    if model.prompts.warning:
        yield model.prompts.warning
    draft = model.options.draft
    has_mtp = "draft-mtp" in model.engine.proposers
    used = (*_USED_BY_MTP, *(_USED_BY_HEAD if draft.path else ())) if has_mtp else ()
    given = [flag for flag in FLAGS if flag.table == "draft" and getattr(draft, flag.field) != flag.default]
    flags = [flag for flag in given if flag.field not in used]
    if flags and (has_mtp or not draft.path):
        names = ", ".join(next(name for name in flag.names if name.startswith("--")) for flag in flags)
        cause = "The file of -md has MTP layers" if draft.path else "There is no draft model (-md)"
        yield f"{cause}: without effect are {names}."
    requested = {*model.options.speculation.default_types, *(["draft"] if draft.path and not has_mtp else [])}
    for kind, reason in model.engine.unavailable_proposers.items():
        if kind in requested:
            yield f"Proposer {kind} is off: {reason}."


def _speculation_lines(model: LoadedModel) -> Iterator[str]:
    """Yields a line with the default proposer types; without any, with the draft model that requests can select."""
    draft = model.options.draft.path if "draft" in model.engine.proposers else ""
    if model.default_proposers:
        file = Path(model.options.draft.path).name
        in_file = ("draft", "draft-mtp") if file else ()
        names = [f"{kind} ({file})" if kind in in_file else kind for kind in model.default_proposers]
        mode = "auto" if "auto" in model.options.speculation.default_types else "on"
        yield f"Speculation: {mode} ({', '.join(names)})"
    elif draft:
        yield f"Speculation: off; requests can select draft ({Path(draft).name}); --spec-type draft enables it for all"
    else:
        yield "Speculation: off"


def _embedding_lines(model: LoadedModel) -> Iterator[str]:
    """Yields a line with the model that computes embeddings, if there is one."""
    if (embedder := model.engine.embeddings) is not None:
        info = embedder.info
        kind = "Reranking" if info.pooling == "rank" else "Embeddings"
        yield f"{kind}: {info.name}, pooling {info.pooling}, at most {info.limit} tokens for each input"


def client_url(host: str, port: int, scheme: str = "http") -> str:
    """Returns the URL at which a client on this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
