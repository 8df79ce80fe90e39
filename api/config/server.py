"""Configuration of the HTTP server and of the chat templates, as Structs like those of `engine.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Address, access, limits and shutdown of the HTTP server."""

    host: Annotated[str, Meta(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 is any free port")] = 8000
    alias: Annotated[str, Meta(description="name of the model in the API; empty uses the file name without .gguf")] = ""
    api_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="API keys, separated by commas; each request except GET /health needs one of them as "
            "`Authorization: Bearer` or `x-api-key`; without keys the server is open"
        ),
    ] = ()
    cache_salt_by_key: Annotated[
        bool,
        Meta(
            description="share cached prefixes and learnt n-grams only between requests with the same API key and "
            "the same cache_salt"
        ),
    ] = False
    slots_endpoint: Annotated[
        bool, Meta(description="serve GET /slots: the states of the slots, without prompts and outputs")
    ] = True
    slot_save_path: Annotated[
        str,
        Meta(description="folder in which POST /slots/{id} saves and restores KV caches of slots; empty disables both"),
    ] = ""
    sse_ping: Annotated[
        float,
        Meta(ge=0.0, le=3600.0, description="seconds without an event before a stream gets a comment line; 0 is off"),
    ] = 15.0
    grace: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="maximum seconds for running requests to finish at shutdown")
    ] = 5.0
    max_body: Annotated[int, Meta(ge=1024, le=2**30, description="maximum bytes of a request body")] = 8 * 2**20
    verbose: Annotated[bool, Meta(description="also log health checks, metric scrapes and details")] = False


class ChatConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rendering of conversations to prompts, and parsing of reasoning."""

    template: Annotated[
        str,
        Meta(
            description="chat template: the name of a built-in one, such as chatml, llama3 or gemma, or Jinja source; "
            "empty uses the model's own"
        ),
    ] = ""
    template_file: Annotated[str, Meta(description="file with a chat template in Jinja")] = ""
    template_kwargs: Annotated[
        str,
        Meta(
            description='JSON object of variables for the template, such as `{"enable_thinking": false}`; '
            "chat_template_kwargs of a request override them"
        ),
    ] = ""
    trust_request_template: Annotated[
        bool,
        Meta(description="accept chat_template in requests; a template is a program and can run for a long time"),
    ] = False
    reasoning_format: Annotated[
        Literal["auto", "deepseek", "none"],
        Meta(
            description="field of the model's reasoning in replies: auto and deepseek use `reasoning_content`, none "
            "leaves reasoning in the content"
        ),
    ] = "auto"
    reasoning_budget: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**30,
            description="default limit of reasoning tokens before the answer; 0 sets `enable_thinking` to false in the "
            "template, -1 is no limit",
        ),
    ] = -1
    prefill_assistant: Annotated[
        bool,
        Meta(
            description="continue the last message if its role is assistant, unless the request has "
            "add_generation_prompt or continue_final_message"
        ),
    ] = True
