"""Configuration of the HTTP server and of the chat templates, as Structs like those of `engine.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Address, access, limits and shutdown of the HTTP server."""

    host: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="addresses to listen on, separated by commas, all with the same port"),
    ] = ("127.0.0.1",)
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 is any free port")] = 8000
    alias: Annotated[
        tuple[str, ...],
        Meta(
            description="names of the model in the API, separated by commas, the first for replies; none uses the file "
            "name without .gguf"
        ),
    ] = ()
    strict_model: Annotated[
        bool, Meta(description="refuse requests that name another model, instead of serving them with this one")
    ] = False
    api_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="API keys, separated by commas; each request except GET /health needs one of them as "
            "`Authorization: Bearer`, `x-api-key` or `api-key`; without keys the server is open"
        ),
    ] = ()
    cache_salt_by_key: Annotated[
        bool,
        Meta(
            description="share cached prefixes and learnt n-grams only between requests with the same API key and "
            "the same cache_salt"
        ),
    ] = False
    cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="origins whose web pages may call the server, separated by commas; `*` is every origin, "
            "`localhost` every origin of this machine"
        ),
    ] = ("*",)
    cors_methods: Annotated[
        tuple[str, ...], Meta(description="methods that web pages may use, separated by commas")
    ] = ("GET", "POST", "DELETE", "OPTIONS")
    cors_headers: Annotated[
        tuple[str, ...], Meta(description="request headers that web pages may send, separated by commas; `*` is all")
    ] = ("*",)
    cors_credentials: Annotated[
        bool, Meta(description="let web pages send cookies and HTTP authentication; with origins `*` of every origin")
    ] = True
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="names besides localhost that a Host header may have, separated by commas; `*` is all; checked "
            "if the server listens on loopback addresses only and has no API keys"
        ),
    ] = ()
    any_content_type: Annotated[
        bool, Meta(description="accept JSON bodies with any Content-Type, which web pages can send without CORS")
    ] = False
    slots_endpoint: Annotated[
        bool, Meta(description="serve GET /slots: the states of the slots, without prompts and outputs")
    ] = True
    slot_save_path: Annotated[
        str,
        Meta(description="folder in which POST /slots/{id} saves and restores KV caches of slots; empty disables both"),
    ] = ""
    spm_infill: Annotated[
        bool,
        Meta(
            description="put the text after the gap first in fill-in-the-middle prompts (suffix, prefix, middle), as "
            "some models prefer"
        ),
    ] = False
    response_store: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="MiB of memory for the latest responses of POST /v1/responses, which previous_response_id "
            "continues; 0 stores none",
        ),
    ] = 64
    sse_ping: Annotated[
        float,
        Meta(ge=0.0, le=3600.0, description="seconds without an event before a stream gets a comment line; 0 is off"),
    ] = 15.0
    grace: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="maximum seconds for running requests to finish at shutdown")
    ] = 5.0
    max_body: Annotated[int, Meta(ge=1024, le=2**30, description="maximum bytes of a request body")] = 8 * 2**20
    verbose: Annotated[
        bool, Meta(description="also log health checks, metric scrapes and details; replies have `__verbose`")
    ] = False


class ChatConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rendering of conversations to prompts, and parsing of reasoning."""

    template: Annotated[
        str,
        Meta(
            description="chat template: the name of a built-in one, such as chatml, llama3 or gemma, Jinja source, or "
            "a literal text; empty uses the model's own"
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
