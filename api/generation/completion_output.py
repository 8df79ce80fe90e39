"""The output of one choice so far: its text, tokens and times, and llama-server's reply for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from api.generation.loaded_model import LoadedModel
from api.generation.schema_checks import CompiledConstraint
from api.schema.completion_replies import LlamaCompletionChunk, LlamaCompletionReply, TokenProb
from api.schema.generation_settings import request_settings
from api.schema.replies import PromptProgress, RunningUsage, TimingsReply, UnenforcedKeywords
from api.schema.requests import GenerationRequest
from api.schema.token_origins import TokenOrigin, token_origins
from engine import Finished, FinishReason, Generation, Logprob, PrefillProgress, Tokens


class CompletionOutput:
    """The output of one choice so far. Text, tokens and log probabilities are kept only for replies without a
    stream."""

    def __init__(
        self,
        model: LoadedModel,
        body: GenerationRequest,
        index: int,
        generation: Generation,
        seed: int,
        constraint: CompiledConstraint | None = None,
    ) -> None:
        """`seed` is the seed of all choices of the HTTP request."""
        self.logprobs: list[Logprob] = []
        self.prefill: PrefillProgress | None = None
        """The last progress of the prefill. None before the first step, and if the request reports no progress."""
        self._model = model
        self._body = body
        self._index = index
        self._generation = generation
        self._request = generation.request
        self._seed = seed
        self._constraint = constraint
        self._text_to_check: list[str] = []
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._origins: list[str] = []
        self._count = 0
        self._has_new_line = False
        self._started: float | None = None
        self._has_reported_progress = False

    @property
    def verbose(self) -> bool:
        """True if replies have llama-server's reply as `__verbose`."""
        return self._model.options.server.verbose if self._body.verbose is None else self._body.verbose

    @property
    def text(self) -> str:
        """The text so far; empty in a stream."""
        return "".join(self._texts)

    @property
    def seconds(self) -> float:
        """Seconds since the first token."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    @property
    def time_is_up(self) -> bool:
        """True after `t_max_predict_ms`, but not in the first line, as in llama-server."""
        limit = self._body.t_max_predict_ms
        return limit is not None and limit > 0 and self._has_new_line and self.seconds * 1e3 > limit

    def add(self, update: Tokens) -> None:
        """Adds the tokens or the prefill progress of one step."""
        if update.prefill_progress is not None:
            self.prefill = update.prefill_progress
            return
        if self._started is None:
            self._started = time.monotonic()
        self._has_new_line = self._has_new_line or "\n" in update.text
        self._count += len(update.ids)
        if self._constraint is not None and self._constraint.checks:
            self._text_to_check.append(update.text)
        if not self._body.stream:
            self._tokens += update.ids
            self._texts.append(update.text)
            self.logprobs += update.logprobs
            self._origins += update.origins

    def new_progress(self, progress: PrefillProgress) -> list[PrefillProgress]:
        """Returns the progress to report after a step. The first report of a choice has only the cached tokens."""
        is_first, self._has_reported_progress = not self._has_reported_progress, True
        start = PrefillProgress(progress.prompt, progress.cached, progress.cached, 0.0)
        if is_first and progress.processed > progress.cached:
            return [start, progress]
        return [start if is_first else progress]

    def token_origins(self) -> list[TokenOrigin] | UnsetType:
        """Returns the tokens with their origins; UNSET in a stream, and for a request without `token_origins`."""
        return token_origins(self._model.engine.vocab, self._tokens, self._origins)

    def timings(self, prefill: PrefillProgress | None = None) -> TimingsReply:
        """Returns llama-server's timings so far, or at an earlier progress `prefill`."""
        return TimingsReply.running(prefill or self.prefill, len(self._request.prompt), self._count, self.seconds)

    def usage(self, end: Finished | None = None) -> RunningUsage:
        """Returns vLLM's usage so far, at the `end` with a token that was not streamed, such as an end token."""
        prompt, count = len(self._request.prompt), self._count if end is None else end.usage.completion
        return RunningUsage(prompt, count, prompt + count)

    def unenforced_keywords(self) -> UnenforcedKeywords | UnsetType:
        """Returns the keywords of schemas that the grammar did not enforce, and whether the output satisfies them."""
        if self._constraint is None:
            return UNSET
        return self._constraint.unenforced_keywords("".join(self._text_to_check))

    # ── llama-server's replies ──

    def progress_chunk(self, progress: PrefillProgress) -> LlamaCompletionChunk:
        """Returns an event with the prefill progress."""
        return LlamaCompletionChunk(
            index=self._index,
            content="",
            tokens=(),
            id_slot=self._generation.slot,
            tokens_predicted=0,
            tokens_evaluated=len(self._request.prompt),
            timings=self.timings(progress) if self._body.timings_per_token else UNSET,
            prompt_progress=PromptProgress.of(progress),
        )

    def chunk(self, update: Tokens) -> LlamaCompletionChunk:
        """Returns the event of one step, whose tokens `add` has added."""
        return LlamaCompletionChunk(
            index=self._index,
            content=update.text,
            tokens=update.ids,
            id_slot=self._generation.slot,
            tokens_predicted=self._count,
            tokens_evaluated=len(self._request.prompt),
            timings=self.timings() if self._body.timings_per_token else UNSET,
            completion_probabilities=self._probabilities(update.logprobs) or UNSET,
            token_origins=token_origins(self._model.engine.vocab, update.ids, update.origins),
        )

    def reply(self, end: Finished) -> LlamaCompletionReply:
        """Returns the final reply. In a stream its text and tokens are empty, because earlier events contained both."""
        usage, prompt = end.usage, self._request.prompt
        stop_type, word = self._stop_reason(end)
        context_full = (
            end.reason is FinishReason.LENGTH and usage.prompt + usage.completion >= self._model.engine.request_limit
        )
        return LlamaCompletionReply(
            index=self._index,
            content=self.text,
            tokens=self._tokens if self._body.return_tokens or self.verbose else (),
            id_slot=end.slot,
            model=self._model.name,
            tokens_predicted=usage.completion,
            tokens_evaluated=usage.prompt,
            generation_settings=self._settings(),
            prompt=self._model.prompts.detokenize(prompt),
            has_new_line=self._has_new_line,
            truncated=bool(end.discarded) or (context_full and stop_type == "limit"),
            stop_type=stop_type,
            stopping_word=word,
            tokens_cached=self._tokens_cached(end),
            timings=TimingsReply.of([[end]]),
            completion_probabilities=self._probabilities(self.logprobs) or UNSET,
            token_origins=self.token_origins(),
            unenforced_schema_keywords=self.unenforced_keywords(),
        )

    def _tokens_cached(self, end: Finished) -> int:
        if not self._request.cache:
            return 0
        return end.usage.prompt + max(0, end.usage.completion - 1) - end.discarded

    def _stop_reason(self, end: Finished) -> tuple[str, str]:
        """Returns llama-server's stop type, and for type "word" the text of the stop string or stop token."""
        if end.reason is FinishReason.LENGTH:
            return "limit", ""
        if isinstance(end.stop, str):
            return "word", end.stop
        if end.stop is not None and end.stop in (self._body.stop_token_ids or ()):
            return "word", self._model.engine.vocab.text(end.stop)
        return "eos", ""

    def _probabilities(self, logprobs: list[Logprob] | tuple[Logprob, ...]) -> list[TokenProb]:
        vocab, post_sampling = self._model.engine.vocab, self._request.post_sampling
        return [TokenProb.of(vocab, entry, post_sampling=post_sampling) for entry in logprobs]

    def _settings(self) -> dict[str, object]:
        model, body = self._model, self._body
        return request_settings(
            self._request,
            self._seed,
            stream=bool(body.stream),
            keep=model.options.batch.keep,
            ends=model.engine.vocab.ends,
        ) | {
            "timings_per_token": bool(body.timings_per_token),
            "grammar": body.grammar or "",
            "json_schema": body.json_schema,
        }


def unenforced_keywords(outputs: Sequence[CompletionOutput]) -> UnenforcedKeywords | UnsetType:
    """Returns the keywords that no grammar enforced, and whether each of the outputs satisfies them."""
    found = [each for output in outputs if (each := output.unenforced_keywords()) is not UNSET]
    return UnenforcedKeywords(found[0].keywords, [one for each in found for one in each.satisfied]) if found else UNSET
