"""Request ids, API keys, health, metrics and the log."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from api.config.server import ServerConfig
from api.generation.loaded_model import AppState
from api.server.app import create_app
from engine import EngineFault, Overloaded
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import INFO, FakeEngine, app_state

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/models/x", "/metrics"])
async def test_every_response_has_an_id(app_of: Apps, path: str) -> None:
    for app in (app_of(), app_of(api_keys=["k"])):
        first, second = await call(app, "GET", path), await call(app, "GET", path)
        assert re.fullmatch("[0-9a-f]{32}", first.headers["x-request-id"])
        assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_a_crash_has_an_id_too(app: ASGIApp, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "generate", lambda request: 1 / 0)
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"x-request-id", b"me")]}
    with pytest.raises(ZeroDivisionError):
        await app(scope, receive, send)
    assert messages[0]["status"] == 500
    assert (b"x-request-id", b"me") in messages[0]["headers"]
    assert b"server_error" in messages[1]["body"]
    assert b"division" not in messages[1]["body"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3/x", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)],
)
async def test_ids_of_clients_are_kept_if_safe(app: ASGIApp, given: str, kept: bool) -> None:
    answer = await call(app, "GET", "/health", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) is kept


async def test_ids_go_with_streams(app: ASGIApp) -> None:
    answer = await post(app, CHAT, {**HELLO, "stream": True}, headers={"x-request-id": "me"})
    assert answer.headers["x-request-id"] == "me"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer one"}, 200),
        ({"authorization": "bearer two"}, 200),
        ({"x-api-key": "two"}, 200),
        ({"api-key": "one"}, 200),
        ({"authorization": "Bearer three"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic one"}, 401),
        ({"authorization": "one"}, 401),
        ({"authorization": "Bearer \xff"}, 401),
        ({"x-api-key": "on"}, 401),
        ({"x-api-key": "schlüssel".encode().decode("latin-1")}, 200),  # the test client sends Latin-1
    ],
    ids=str,
)
async def test_keys(app_of: Apps, headers: dict[str, str], status: int) -> None:
    app = app_of(api_keys=["one", "two", "schlüssel"])
    answer = await post(app, CHAT, HELLO, headers=headers)
    assert answer.status == status
    if status == 401:
        error = answer.json["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert (await call(app, "GET", "/v1/health")).status == (await call(app, "GET", "/health")).status == 200
    assert (await call(app, "GET", "/metrics")).status == 401


async def test_while_loading() -> None:
    app = create_app(AppState(ServerConfig()))
    for path in ("/health", CHAT, "/v1/models", "/metrics", "/props"):
        answer = await call(app, "POST" if path == CHAT else "GET", path, b"not even read")
        assert answer.status == 503
        assert answer.json["error"]["message"] == "Loading model"
        assert answer.headers["retry-after"] == "1"
    assert (await call(app, "GET", "/livez")).json == {"status": "ok"}


async def test_health(app: ASGIApp) -> None:
    assert (await call(app, "GET", "/health")).json == {"status": "ok"}


async def test_probes_of_routers(app: ASGIApp) -> None:
    assert (await call(app, "GET", "/is_sleeping")).json == {"is_sleeping": False}
    info = (await call(app, "GET", "/server_info")).json
    assert info == (await call(app, "GET", "/get_server_info")).json
    assert (info["served_model_name"], info["context_length"], info["max_running_requests"]) == ("fake-1", 512, 4)
    assert (info["max_total_tokens"], info["is_embedding"]) == (100, False)
    assert (await call(app, "GET", "/model_info")).json["is_generation"] is True


async def test_while_draining(engine: FakeEngine) -> None:
    state = app_state(engine)
    app = create_app(state)
    state.draining = True
    assert (await call(app, "GET", "/health")).status == 503
    answer = await post(app, CHAT, HELLO)
    assert (answer.status, answer.json["error"]["code"]) == (503, "shutting_down")
    assert answer.headers["retry-after"] == "5"
    # A restart by a failed liveness probe would cut the streams that drain.
    assert (await call(app, "GET", "/livez")).status == 200
    engine.fault = EngineFault("gone", fatal=True)
    assert (await call(app, "GET", "/livez")).status == 500


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
async def samples(app: ASGIApp) -> Samples:
    """The samples of /metrics, by name and labels."""
    answer = await call(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert int(answer.headers["process-start-time-unix"]) > 1_700_000_000
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(b"".join(answer.chunks).decode())
        for sample in family.samples
    }


async def test_metrics(samples: Samples) -> None:
    assert samples["paceline_requests_total", (("reason", "stop"),)] == 3
    assert samples["paceline_prompt_tokens_total", ()] == 7
    assert samples["paceline_busy_seconds_total", ()] == 2.5
    assert samples["paceline_requests_running", ()] == 2
    assert samples["paceline_time_to_first_token_seconds_bucket", (("le", "0.1"),)] == 2
    assert samples["paceline_time_to_first_token_seconds_bucket", (("le", "1.0"),)] == 3
    assert samples["paceline_time_to_first_token_seconds_bucket", (("le", "+Inf"),)] == 4
    assert samples["paceline_time_to_first_token_seconds_count", ()] == 4
    assert samples["paceline_time_to_first_token_seconds_sum", ()] == 3.5
    suffix = ("type", "suffix")
    assert samples["paceline_spec_drafts_total", (suffix,)] == 6
    assert samples["paceline_spec_draft_tokens_total", (suffix,)] == 20
    assert samples["paceline_spec_accepted_tokens_total", (suffix,)] == 8
    name = "paceline_spec_accepted_tokens_per_pos_total"
    assert [samples[name, (("position", str(position)), suffix)] for position in range(2)] == [5, 3]
    assert [samples[f"paceline_embedding_{name}_total", ()] for name in ("inputs", "tokens", "decodes")] == [2, 5, 1]
    assert samples["process_resident_memory_bytes", ()] > 0


async def test_metrics_of_vllm(samples: Samples) -> None:
    # All have vLLM's two labels, by which its dashboards filter.
    model = {("engine", "0"), ("model_name", "fake-1")}
    vllm = {
        (name.removeprefix("vllm:"), *(text for _, text in sorted(set(labels) - model))): value
        for (name, labels), value in samples.items()
        if name.startswith("vllm:") and model <= set(labels)
    }
    assert len(vllm) == sum(name.startswith("vllm:") for name, _ in samples)
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.5,
        "gpu_cache_usage_perc": 0.5,
        "prefix_cache_queries_total": 7,
        "prefix_cache_hits_total": 7,
        "gpu_prefix_cache_queries_total": 7,
        "gpu_prefix_cache_hits_total": 7,
        "prompt_tokens_total": 7,
        "generation_tokens_total": 7,
        "num_preemptions_total": 5,
        "time_to_first_token_seconds_count": 4,
        "inter_token_latency_seconds_count": 4,
        "request_queue_time_seconds_count": 4,
        "spec_decode_num_drafts_total": 8,
        "spec_decode_num_draft_tokens_total": 29,
        "spec_decode_num_accepted_tokens_total": 12,
    }
    assert {name: vllm[name,] for name in expected} == expected
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    assert [vllm[name, str(position)] for position in range(3)] == [7, 4, 1]
    assert vllm["request_success_total", "stop"] == 3
    assert vllm["cache_config_info", "32", "3"] == 1  # block_size, num_gpu_blocks


async def test_metrics_of_llama_server(samples: Samples) -> None:
    llama = {name.removeprefix("llamacpp:"): value for (name, _), value in samples.items() if "llamacpp:" in name}
    assert llama == {
        "spec_decode_num_accepted_tokens_per_pos_total": 1,  # at the last position
        "prompt_tokens_total": 6 + 5,
        "prompt_tokens_cached_total": 7,
        "prompt_seconds_total": 0.5,
        "tokens_predicted_total": 7,
        "tokens_predicted_seconds_total": 3.5,
        "n_decode_total": 5 + 1,
        "n_tokens_max": 99,
        "spec_decode_num_draft_tokens_total": 29,
        "spec_decode_num_accepted_tokens_total": 12,
        "spec_decode_num_drafts_total": 8,
        "prompt_tokens_seconds": 12,
        "predicted_tokens_seconds": 3 / 3.5,
        "requests_processing": 2,
        "requests_deferred": 1,
        "n_busy_slots_per_decode": 3,
    }


async def test_the_log_has_one_line_for_a_request(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "paceline"):
        await post(app, CHAT, {**HELLO, "n": 2}, headers={"x-request-id": "me"})
        await call(app, "GET", "/health")
    (line,) = caplog.messages
    prompt = 1 + len("user\nhi") + 1 + len("\n") + 1 + len("assistant\n")
    pattern = rf"me POST {CHAT} 200 0\.\d+s prompt={2 * prompt} cached=4 completion=24 ttft=\d+ms 11\.0 tok/s stop"
    assert re.fullmatch(pattern, line)


async def test_a_path_cannot_forge_a_line(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "paceline"):
        await call(app, "GET", "/a\nb c")
    assert " GET /a%0Ab%20c 404 " in caplog.messages[0]


async def test_the_log_has_the_error_that_ended_a_stream(
    app: ASGIApp, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda request: [b"a", 0.01, EngineFault("no luck")]
    with caplog.at_level(logging.INFO, "paceline"):
        await post(app, CHAT, {**HELLO, "stream": True})
    assert "error='no luck'" in caplog.text


def test_the_fingerprint_depends_on_the_layout() -> None:
    """`ModelInfo.layout` names the model, the library, the KV types and the kernels."""

    def fingerprint(layout: str) -> str:
        return app_state(FakeEngine(info=structs.replace(INFO, layout=layout))).model.fingerprint

    assert fingerprint("a") == fingerprint("a")
    assert len({fingerprint("a"), fingerprint("b"), fingerprint("")}) == 3


async def test_responses_are_counted_by_route(app_of: Apps, engine: FakeEngine) -> None:
    app = app_of(api_keys=["k"], api_prefix="/llm")
    key = {"authorization": "Bearer k"}
    for _ in range(2):
        await post(app, "/llm/v1/completions", {"prompt": "x"})
    await post(app, "/llm/v1/completions", {"prompt": "x"}, headers=key)
    engine.refusal = Overloaded(2.0)
    await post(app, "/llm/v1/completions", {"prompt": "x"}, headers=key)
    engine.refusal, engine.script = None, lambda request: [b"a", EngineFault("gone")]
    await post(app, "/llm/v1/completions", {"prompt": "x", "stream": True}, headers=key)
    for number in range(3):
        await call(app, "GET", f"/llm/v1/responses/{number}", headers=key)
        await call(app, f"M{number}", f"/llm/{number}", headers=key)
    text = b"".join((await call(app, "GET", "/llm/metrics", headers=key)).chunks).decode()
    counts = dict(re.findall(r"^paceline_http_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE))
    assert counts == {
        'method="POST",route="/v1/completions",status="200"': "2.0",
        'method="POST",route="/v1/completions",status="401"': "2.0",
        'method="POST",route="/v1/completions",status="429"': "1.0",
        'method="GET",route="/v1/responses/{id}",status="404"': "3.0",
        'method="other",route="other",status="404"': "3.0",
    }
    assert "paceline_http_failed_streams_total 1.0" in text
