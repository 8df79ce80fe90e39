"""Creates the choices of a prepared chat, for the endpoints of all chat APIs."""

from __future__ import annotations

from api.generation.choices import Choices
from api.generation.loaded_model import LoadedModel
from api.generation.prepared_chat import PreparedChat
from api.http.request_context import RequestContext
from api.schema.requests import ChatRequest
from engine import ContextExceeded


async def chat_choices(
    model: LoadedModel, context: RequestContext, request: ChatRequest, chat: PreparedChat, *, progress: bool = False
) -> Choices:
    """Returns the choices of `request`, which are not submitted yet. Raises RequestRefused with the request's field.

    With `progress` each step of the prefill is an update.
    """
    try:
        return Choices(
            model,
            context,
            request,
            [chat.prompt],
            token_limit=request.token_limit,
            logprobs=request.num_logprobs,
            prediction=await model.prompts.tokenize_prediction(request.prediction),
            control_texts=chat.control_texts,
            stop_scope=chat.stop_scope,
            reasoning=chat.reasoning_budget,
            grammar=await chat.grammar(model.engine),
            progress=progress,
            media=[chat.media],
        )
    except ContextExceeded as error:
        error.field = "messages"
        raise
