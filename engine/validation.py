"""Checks of requests before they are submitted. A failed check raises RequestRefused with the invalid field's name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from engine.contract import Request, RequestRefused
from engine.media import MediaReader, without_runs

# Fields of a request that count something.
_COUNTS = ("max_tokens", "min_tokens", "logprobs")


class TokenCheck:
    """Checks prompts and predictions, once for successive requests with the same ones, such as the choices of one HTTP
    request."""

    def __init__(self) -> None:
        self._prompt: tuple[int, ...] | None = None
        self._prediction: tuple[int, ...] | None = None

    def __call__(self, request: Request, vocabulary: int) -> None:
        """Raises RequestRefused unless the prompt has at least one token and all token ids are in a vocabulary of this
        size."""
        prompt, prediction = request.prompt, request.prediction
        if prompt is self._prompt and prediction is self._prediction:
            return
        if not prompt:
            raise RequestRefused("The prompt is empty: at least one token is required.", field="prompt")
        if _outside(without_runs(prompt, request.media), vocabulary):
            raise RequestRefused(f"The prompt holds a token id outside 0..{vocabulary - 1}.", field="prompt")
        if _outside(prediction, vocabulary):
            raise RequestRefused(f"The prediction holds a token id outside 0..{vocabulary - 1}.", field="prediction")
        self._prompt, self._prediction = prompt, prediction


def check_media(request: Request, reader: MediaReader | None) -> None:
    """Raises RequestRefused for a prompt with images or sounds that the engine cannot compute or continue."""
    if request.media and reader is None:
        raise RequestRefused("This model takes no images or sounds.", field="prompt")
    if request.media and request.media[-1].end == len(request.prompt):
        raise RequestRefused("The prompt ends with an image or sound: text must follow it.", field="prompt")


def check_parameters(request: Request, vocabulary: int, unavailable_proposers: Mapping[str, str]) -> None:
    """Raises RequestRefused unless a model with a vocabulary of this size can run `request`.

    `unavailable_proposers` has the reason for each type of proposer that no request can use.
    """
    outside = f"a token id outside 0..{vocabulary - 1}"
    for name in _COUNTS:  # another type would fail in a step, and with it every request
        if (value := getattr(request, name)) is not None and (type(value) is not int or value < 0):
            raise RequestRefused(f"{name} must be a whole number, 0 or more, not {value!r:.64}.", field=name)
    if _outside([token for token, _ in request.sampling.logit_bias], vocabulary):
        raise RequestRefused(f"logit_bias names {outside}.", field="logit_bias")
    if request.grammar is not None and request.grammar.vocabulary != vocabulary:
        raise RequestRefused("The grammar was compiled for another model.", field="grammar")
    for kind in request.speculation.type if request.speculation is not None else ():
        if reason := unavailable_proposers.get(kind):
            raise RequestRefused(f"Speculation type {kind!r} is not available: {reason}.", field="speculative.type")
    if _outside(request.stop_tokens, vocabulary):
        raise RequestRefused(f"stop_token_ids has {outside}.", field="stop_token_ids")


def check_slot(slot: int | None, slots: int) -> None:
    """Raises RequestRefused unless `slot` is None or the number of one of `slots` slots."""
    if slot is not None and not 0 <= slot < slots:
        raise RequestRefused(f"There is no slot {slot}; slots are 0 to {slots - 1}.", field="id_slot")


def _outside(tokens: Collection[int], vocabulary: int) -> bool:
    return bool(tokens) and (min(tokens) < 0 or max(tokens) >= vocabulary)
