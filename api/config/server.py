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
    tags: Annotated[
        tuple[str, ...],
        Meta(description="words about the model for GET /v1/models, separated by commas; without effect"),
    ] = ()
    strict_model: Annotated[
        bool, Meta(description="refuse requests that name another model, instead of serving them with this one")
    ] = False
    api_prefix: Annotated[
        str,
        Meta(
            pattern=r"^(/[^/?#\s]+)*\Z",
            examples=["/llm"],
            description="path before the paths of all endpoints, such as /llm; empty is none",
        ),
    ] = ""
    reuse_port: Annotated[
        bool,
        Meta(description="let other processes listen on the same port, among which the kernel divides connections"),
    ] = False
    ssl_key_file: Annotated[
        str, Meta(description="file with the private key for HTTPS, in PEM; needs --ssl-cert-file; empty is plain HTTP")
    ] = ""
    ssl_cert_file: Annotated[str, Meta(description="file with the certificate chain for HTTPS, in PEM")] = ""
    api_keys: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(
            min_length=1,
            description="API keys, separated by commas; each request except GET /health needs one of them as "
            "`Authorization: Bearer`, `x-api-key` or `api-key`; without keys the server is open",
        ),
    ] = ()
    api_key_file: Annotated[
        str,
        Meta(
            description="file with more API keys, one on each line, read again at SIGHUP; lines that begin with # are "
            "comments"
        ),
    ] = ""
    keys: Annotated[
        str,
        Meta(
            description="TOML or JSON file with API keys, each with a name, weight and limits, read again at SIGHUP; "
            "empty is none"
        ),
    ] = ""
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
    sse_coalesce_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="minimum milliseconds between two events of a choice, except before its last ones; tokens in "
            "between merge into one event, which saves time of server and clients; 0 merges none",
        ),
    ] = 0
    grace: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="maximum seconds for running requests to finish at shutdown")
    ] = 5.0
    on_fault: Annotated[
        Literal["exit", "stay"],
        Meta(
            description="after a fatal fault of the engine, exit ends the process with code 3 once all clients have "
            "the error; stay answers 500 and serves /metrics until a signal arrives"
        ),
    ] = "exit"
    timeout: Annotated[
        float,
        Meta(
            ge=1.0,
            le=86400.0,
            description="maximum seconds without new bytes of a request's body, and without the client receiving bytes "
            "of a response",
        ),
    ] = 600.0
    header_timeout: Annotated[
        float, Meta(ge=1.0, le=3600.0, description="maximum seconds for the head of a request to arrive")
    ] = 60.0
    # Longer than in clients' pools, so that the clients close idle connections first.
    keep_alive: Annotated[
        int, Meta(ge=1, le=86400, description="seconds after a response before an idle connection is closed")
    ] = 75
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=2**16,
            description="maximum open connections; at the limit a new one replaces the connection that has been idle "
            "for longest, or gets a 503 if none is idle; fewer if the system allows fewer open files",
        ),
    ] = 1024
    props: Annotated[bool, Meta(description="accept POST /props, which changes nothing, as in llama-server")] = False
    otlp_traces_endpoint: Annotated[
        str,
        Meta(
            pattern=r"^(https?://\S+)?\Z",
            examples=["http://127.0.0.1:4318/v1/traces"],
            description="URL of an OpenTelemetry collector for OTLP over HTTP, such as "
            "http://127.0.0.1:4318/v1/traces, that gets a span for each request; needs paceline[otel]; empty is none",
        ),
    ] = ""
    media_path: Annotated[
        str, Meta(description="folder of the files that requests may name by file:// URLs; empty allows none")
    ] = ""
    media_urls: Annotated[
        bool,
        Meta(
            description="download the images and sounds that requests name by http or https URL, within 10 seconds and "
            "from public addresses only"
        ),
    ] = False
    media_limit: Annotated[
        int, Meta(ge=1, le=1024, description="maximum images and sounds in a request, each of at most 8 MiB")
    ] = 16
    max_body: Annotated[
        int,
        Meta(
            ge=1024, le=2**30, description="maximum bytes of a request body; 8 MiB of an image take 12000000 in base64"
        ),
    ] = 8 * 2**20
    ui: Annotated[bool, Meta(description="serve a page with a chat and a live view of the server at /")] = True
    verbose: Annotated[
        bool, Meta(description="also log health checks, metric scrapes and details; replies have `__verbose`")
    ] = False

    @property
    def has_keys(self) -> bool:
        """True if requests need an API key."""
        return bool(self.api_keys or self.has_key_files)

    @property
    def has_key_files(self) -> bool:
        """True if API keys are in files, which are read again at SIGHUP."""
        return bool(self.keys or self.api_key_file)


class KVEventsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KV events for routers: the blocks of prompts that are in the prefix cache, published over ZMQ."""

    endpoint: Annotated[
        str,
        Meta(
            pattern=r"^([@>]?(tcp|ipc)://\S+)?\Z",
            examples=["tcp://*:5557"],
            description="ZMQ address at which blocks that enter or leave the prefix cache are published, with the "
            "tokens of prompts and outputs; bound if it contains `*` or `::` or begins with @ or ipc://, such as "
            "tcp://*:5557, connected to otherwise or if it begins with >; needs paceline[kv-events]; empty is none",
        ),
    ] = ""
    topic: Annotated[
        str, Meta(description="topic of the messages, such as kv@10.0.0.1:8000@model for llm-d; empty is none")
    ] = ""
    replay_endpoint: Annotated[
        str,
        Meta(
            pattern=r"^((tcp|ipc)://\S+)?\Z",
            examples=["tcp://*:5558"],
            description="address at which subscribers request messages that they missed, such as tcp://*:5558; empty "
            "is none",
        ),
    ] = ""
    buffer: Annotated[int, Meta(ge=1, le=2**20, description="last messages that are kept for the replay")] = 10_000
    format: Annotated[
        Literal["array", "map"],
        Meta(
            description="form of an event: array, as in vLLM before 0.24, which routers of all versions read, or map, "
            "as in later versions of vLLM"
        ),
    ] = "array"


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Form and destination of the log."""

    disable: Annotated[bool, Meta(description="write no log")] = False
    file: Annotated[str, Meta(description="file to which the log is appended besides stderr; empty is none")] = ""
    jsonl: Annotated[bool, Meta(description="write one JSON object for each line of the log, to stdout")] = False
    colors: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="color the levels of warnings and errors; auto does so on terminals"),
    ] = "auto"
    prefix: Annotated[bool, Meta(description="begin each line with its level")] = True
    timestamps: Annotated[bool, Meta(description="begin each line with the time")] = True
    verbosity: Annotated[
        int,
        Meta(
            ge=0,
            le=2**31 - 1,
            description="most detailed level of the log: 0 nothing, 1 errors, 2 warnings, 3 requests, 4 health checks "
            "and details, 5 and more the native library",
        ),
    ] = 3


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
    reasoning: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="value of `enable_thinking` in the template: on is true, off is false, auto leaves it to "
            "--chat-template-kwargs; requests override it"
        ),
    ] = "auto"
    reasoning_effort: Annotated[
        str,
        Meta(
            description="default of `reasoning_effort` in the template, such as low, medium or high; empty is the "
            "template's own default"
        ),
    ] = ""
    reasoning_budget_message: Annotated[
        str, Meta(description="text before the end of the reasoning when its budget is used up; empty is no text")
    ] = ""
    preserve_reasoning: Annotated[
        bool | None,
        Meta(
            description="keep the reasoning of earlier turns in the prompt, in templates that can do so; without "
            "either flag the template decides"
        ),
    ] = None
    skip_parsing: Annotated[
        bool,
        Meta(description="leave the output of chats as it is: reasoning and tool calls stay in the content, unparsed"),
    ] = False
    prefill_assistant: Annotated[
        bool,
        Meta(
            description="continue the last message if its role is assistant, unless the request has "
            "add_generation_prompt or continue_final_message"
        ),
    ] = True
