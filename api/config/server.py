"""Configuration of the HTTP server and of the chat templates, in the form of `engine.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Address, access, limits and shutdown of the HTTP server."""

    host: Annotated[str, Meta(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 is any free port")] = 8000
    alias: Annotated[str, Meta(description="name of the model in the API; empty is the file's name without .gguf")] = ""
    api_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="API keys, separated by commas; each request needs one of them as `Authorization: Bearer`; "
            "none is an open server"
        ),
    ] = ()
    cache_salt_by_key: Annotated[
        bool,
        Meta(
            description="share cached prefixes and learnt n-grams only between requests with the same API key, in "
            "addition to the same cache_salt"
        ),
    ] = False
    slots_endpoint: Annotated[bool, Meta(description="report slot states at GET /slots, without texts")] = True
    slot_save_path: Annotated[
        str,
        Meta(description="folder in which POST /slots/{id} saves and restores KV caches of slots; empty is no folder"),
    ] = ""
    sse_ping: Annotated[
        float,
        Meta(ge=0.0, le=3600.0, description="seconds without an event before a stream gets a comment line; 0 is off"),
    ] = 15.0
    grace: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="seconds that running requests have to finish at shutdown")
    ] = 5.0
    max_body: Annotated[int, Meta(ge=1024, le=2**30, description="maximum bytes of a request body")] = 8 * 2**20
    verbose: Annotated[bool, Meta(description="also log health checks, metric scrapes and details")] = False


class ChatConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rendering of conversations to prompts, and parsing of reasoning."""

    template: Annotated[
        str,
        Meta(
            description="chat template: the name of a built-in one, such as chatml, llama3 or gemma, or Jinja source; "
            "empty is the model's own"
        ),
    ] = ""
    template_file: Annotated[str, Meta(description="file of a chat template in Jinja; empty is no file")] = ""
    template_kwargs: Annotated[
        str,
        Meta(
            description='JSON object of variables for the template, such as `{"enable_thinking": false}`; '
            "chat_template_kwargs of a request override them"
        ),
    ] = ""
    trust_request_template: Annotated[
        bool,
        Meta(description="accept chat_template in requests; a template is a program and may run for long"),
    ] = False
    reasoning_format: Annotated[
        Literal["auto", "deepseek", "none"],
        Meta(
            description="place of the model's reasoning: auto and deepseek put it into `reasoning_content`, none "
            "leaves it in the content"
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
