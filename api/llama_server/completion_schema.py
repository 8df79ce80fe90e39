"""Request of POST /completion in llama-server's shape."""

from __future__ import annotations

from collections.abc import Sequence

from api.schema.request_values import ProbabilityCount, PromptObject
from api.schema.requests import GenerationRequest
from engine import RequestRefused

# A prompt as a mixed list of texts and tokens.
MixedPrompt = list[str | int]


class LlamaCompletionRequest(GenerationRequest, kw_only=True):
    """Request body of POST /completion."""

    shape = "llama-server"

    prompt: str | PromptObject | list[str | int | PromptObject | MixedPrompt]
    logprobs: ProbabilityCount | None = None

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives reported for each token. None reports no log probabilities."""
        return (self.logprobs if self.n_probs is None else self.n_probs) or None

    @property
    def prompts(self) -> Sequence[str | PromptObject | MixedPrompt]:
        """The prompts. A list that contains token ids is one prompt, any other list is a list of prompts.

        Raises RequestRefused for an empty list and for a list that mixes tokens with lists or objects.
        """
        if not isinstance(self.prompt, list):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        has_token_ids = int in kinds
        if not kinds or (has_token_ids and kinds & {list, PromptObject}):
            raise RequestRefused(
                "prompt must be a text, a list of texts and token ids, or a non-empty list of such prompts.",
                field="prompt",
            )
        if has_token_ids:
            return [[item for item in self.prompt if isinstance(item, str | int)]]
        return [item for item in self.prompt if not isinstance(item, int)]
