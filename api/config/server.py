"""How the server listens, answers and stops, and how it writes prompts.

Fields carry their flags, units and ranges, as in `engine.config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.config import flags


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side."""

    host: Annotated[
        str, Meta(min_length=1, description="address to listen on", extra=flags("--host", env="LLAMA_ARG_HOST"))
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="port to listen on; 0 lets the system choose",
            extra=flags("--port", env="LLAMA_ARG_PORT"),
        ),
    ] = 8000
    alias: Annotated[
        str,
        Meta(
            description="the model's name for clients; empty is the file's name without .gguf",
            extra=flags("-a", "--alias", env="LLAMA_ARG_ALIAS"),
        ),
    ] = ""
    api_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="keys, with commas between them, of which clients must send one as `Authorization: Bearer`; "
            "without any, none is asked for",
            extra={**flags("--api-key", env="LLAMA_API_KEY"), "separated": True},
        ),
    ] = ()
    cache_salt_by_key: Annotated[
        bool,
        Meta(
            description="prefixes, and what proposers learn, are shared only between requests of equal API key, "
            "besides equal cache_salt",
            extra=flags("--cache-salt-by-key"),
        ),
    ] = False
    slots_endpoint: Annotated[
        bool,
        Meta(
            description="tell at GET /slots what runs in each slot, in numbers",
            extra=flags("--slots", env="LLAMA_ARG_ENDPOINT_SLOTS"),
        ),
    ] = True
    slot_save_path: Annotated[
        str,
        Meta(
            description="folder in which POST /slots/{id} saves what a slot ran last; empty is none",
            extra=flags("--slot-save-path"),
        ),
    ] = ""
    sse_ping: Annotated[
        float,
        Meta(
            ge=0.0,
            le=3600.0,
            description="seconds of silence after which a stream gets a comment line; 0 is off",
            extra=flags("--sse-ping", "--sse-ping-interval", env="LLAMA_ARG_SSE_PING_INTERVAL"),
        ),
    ] = 15.0
    grace: Annotated[
        float,
        Meta(
            ge=0.0,
            le=3600.0,
            description="seconds that running requests have to finish at shutdown",
            extra=flags("--grace"),
        ),
    ] = 5.0
    max_body: Annotated[
        int,
        Meta(ge=1024, le=2**30, description="bytes of a request's body at most", extra=flags("--max-body")),
    ] = 8 * 2**20
    verbose: Annotated[
        bool, Meta(description="log health checks, scrapes and details too", extra=flags("-v", "--verbose"))
    ] = False


class ChatConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How conversations become prompts."""

    template: Annotated[
        str,
        Meta(
            description="chat template: the name of a built-in one, such as chatml, llama3 or gemma, or Jinja; "
            "empty is the model's own",
            extra=flags("--chat-template", env="LLAMA_ARG_CHAT_TEMPLATE"),
        ),
    ] = ""
    template_file: Annotated[
        str,
        Meta(
            description="file with a chat template in Jinja; empty is none",
            extra=flags("--chat-template-file", env="LLAMA_ARG_CHAT_TEMPLATE_FILE"),
        ),
    ] = ""
    template_kwargs: Annotated[
        str,
        Meta(
            description='JSON object of names for the template, such as `{"enable_thinking": false}`; those of a '
            "request's chat_template_kwargs win",
            extra=flags(
                "--chat-template-kwargs", "--default-chat-template-kwargs", env="LLAMA_ARG_CHAT_TEMPLATE_KWARGS"
            ),
        ),
    ] = ""
    trust_request_template: Annotated[
        bool,
        Meta(
            description="let requests bring a chat_template of their own, which is a program: it may take long",
            extra=flags("--trust-request-chat-template"),
        ),
    ] = False
    reasoning_format: Annotated[
        Literal["auto", "deepseek", "none"],
        Meta(
            description="what a model thinks before it answers: told apart as `reasoning_content` (auto, deepseek), "
            "or left in the content",
            extra=flags("--reasoning-format", env="LLAMA_ARG_THINK"),
        ),
    ] = "auto"
    reasoning_budget: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**30,
            description="tokens that a model may think before it must answer; 0 asks it not to think, -1 is any "
            "number; of requests that do not say",
            extra=flags("--reasoning-budget", env="LLAMA_ARG_THINK_BUDGET"),
        ),
    ] = -1
    prefill_assistant: Annotated[
        bool,
        Meta(
            description="go on with the last message if it is the assistant's and the request says neither "
            "add_generation_prompt nor continue_final_message",
            extra=flags("--prefill-assistant", env="LLAMA_ARG_PREFILL_ASSISTANT"),
        ),
    ] = True
