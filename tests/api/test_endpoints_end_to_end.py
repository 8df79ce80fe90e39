"""The real server and model: /completion, /tokenize and /detokenize, and equal prompt tokens in all endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.__main__ import main
from tests.api.server import Server, serving
from tests.api.test_tools import WEATHER
from tests.conftest import MODEL

pytestmark = pytest.mark.timeout(180)
SKY: Any = [{"role": "user", "content": "Why is the sky blue? 🌈"}]


@pytest.fixture(scope="module")
def server(short_model: Path) -> Iterator[Server]:
    with serving("-m", str(short_model), "-np", "4", "--trust-request-chat-template") as server:
        server.ready()
        yield server
        server.signal()
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


def post(server: Server, path: str, body: Any) -> Any:
    reply = httpx2.post(f"{server.url}{path}", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_completion(server: Server) -> None:
    body = {"prompt": "One, two, three,", "n_predict": 8, "temperature": 0, "return_tokens": True}
    whole = post(server, "/completion", body)
    plain = post(server, "/v1/completions", {"prompt": body["prompt"], "max_tokens": 8, "temperature": 0})
    assert plain["choices"][0]["text"] == whole["content"] != ""
    assert (whole["stop_type"], whole["tokens_predicted"], len(whole["tokens"])) == ("limit", 8, 8)
    assert post(server, "/detokenize", {"tokens": whole["tokens"]})["content"] == whole["content"]
    streamed = {**body, "stream": True, "id_slot": 2, "return_progress": True}
    with httpx2.stream("POST", f"{server.url}/completion", json=streamed, timeout=60) as reply:
        events = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [token for event in events for token in event["tokens"]] == whole["tokens"]
    assert {event["id_slot"] for event in events} == {2}
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["timings"]["predicted_n"] == 8
    assert events[-1]["timings"]["cache_n"] > 0


def test_completion_of_texts_and_tokens(server: Server) -> None:
    tokens = post(server, "/tokenize", {"content": " two, three,"})["tokens"]
    body = {"n_predict": 4, "temperature": 0, "n_probs": 2, "stop": [" six"]}
    mixed = post(server, "/completion", {**body, "prompt": ["One,", *tokens]})
    assert mixed["content"] == post(server, "/completion", {**body, "prompt": "One, two, three,"})["content"] != ""
    assert all(len(each["top_logprobs"]) == 2 for each in mixed["completion_probabilities"])
    both = post(server, "/completion", {**body, "prompt": ["One, two, three,", ["One,", *tokens]]})
    assert both[0]["content"] == both[1]["content"] == mixed["content"]


def test_completion_with_a_grammar(server: Server) -> None:
    body = {"prompt": "The year:", "n_predict": 40, "temperature": 0}
    assert post(server, "/completion", {**body, "grammar": "root ::= [0-9] [0-9]"})["content"].isdigit()
    schema = {
        "type": "object",
        "properties": {"year": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["year"],
    }
    constrained = {**body, "json_schema": {**schema, "additionalProperties": False}}
    whole = post(server, "/completion", constrained)
    assert isinstance(json.loads(whole["content"])["year"], int)
    assert (whole["stop_type"], whole["truncated"]) == ("eos", False)
    with httpx2.stream("POST", f"{server.url}/completion", json={**constrained, "stream": True}, timeout=60) as reply:
        events = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line]
    assert json.loads("".join(event["content"] for event in events)) == json.loads(whole["content"])


def test_time_limit(server: Server) -> None:
    body = {"prompt": "1.\n2.\n3.\n", "n_predict": 2000, "ignore_eos": True, "t_max_predict_ms": 1, "temperature": 0}
    reply = post(server, "/completion", {**body, "logit_bias": [["\n", 9.0]]})  # the limit acts after a line break
    assert reply["stop_type"] == "limit"
    assert reply["tokens_predicted"] < 2000


@pytest.mark.parametrize(
    "text", ["", "Hi", " two  spaces ", "naïve 日本語 👩‍👩‍👧\n\ttabs", "<|im_start|>user\n", "a\x00b"]
)
def test_tokenize_and_detokenize(server: Server, text: str) -> None:
    for parse in (False, True):
        tokens = post(server, "/tokenize", {"content": text, "parse_special": parse})["tokens"]
        assert post(server, "/detokenize", {"tokens": tokens})["content"] == text
    pieces = post(server, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    joined = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert joined.decode() == text


def test_special_tokens_have_names(server: Server) -> None:
    spelled = post(server, "/tokenize", {"prompt": "<|im_start|>user", "return_token_strs": True})
    assert spelled["token_strs"][0] == "<|im_start|>"
    assert spelled["count"] == len(spelled["tokens"]) == 2
    assert spelled["max_model_len"] == 4096 // 4, "each slot has its part"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"messages": [*SKY, {"role": "assistant", "content": "Because"}]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *SKY]},
        {"chat_template": "llama3"},
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "tool_choice": "required", "enable_thinking": False, "reasoning_effort": "low"},
    ],
    ids=str,
)
def test_all_endpoints_tokenize_a_conversation_equally(server: Server, fields: dict[str, Any]) -> None:
    body = {"messages": SKY, "max_tokens": 1, **fields}
    rendered = post(server, "/v1/chat/completions/render", body)["token_ids"]
    assert post(server, "/tokenize", body)["tokens"] == rendered
    assert post(server, "/v1/chat/completions", body)["usage"]["prompt_tokens"] == len(rendered)
    prompt = post(server, "/apply-template", body)["prompt"]
    assert post(server, "/completion", {"prompt": prompt, "n_predict": 1})["tokens_evaluated"] == len(rendered)


def test_all_endpoints_tokenize_a_text_equally(server: Server) -> None:
    texts = ["One, two", "naïve 日本語"]
    body = {"prompt": texts, "max_tokens": 1}
    rendered = [each["token_ids"] for each in post(server, "/v1/completions/render", body)]
    assert post(server, "/v1/completions", body)["usage"]["prompt_tokens"] == sum(map(len, rendered))
    assert [post(server, "/tokenize", {"prompt": text})["tokens"] for text in texts] == rendered


def test_props(server: Server) -> None:
    props = httpx2.get(f"{server.url}/props").json()
    assert props["chat_template_caps"]["supports_string_content"]
    assert "<|im_start|>" in props["chat_template"]
    assert props["default_generation_settings"]["params"]["n_predict"] == -1


def test_a_template_that_cannot_be_used(tmp_path: Path, short_model: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("{% if %}")
    with serving("-m", str(short_model), "--chat-template-file", str(file)) as server:
        server.until("^Note: The chat template cannot be used: .*line 1")
        url = server.ready()
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200
        refused = httpx2.post(f"{url}/v1/chat/completions", json={"messages": SKY})
        assert refused.status_code == 400
        assert "cannot be used" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chat-template", "llama33"), "there is no chat template named 'llama33'; the nearest is llama3"),
        (("--chat-template-file", "/nowhere/x"), "cannot read /nowhere/x"),
        (("--chat-template-kwargs", "no"), "expected a JSON object"),
    ],
)
def test_invalid_settings(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "-m", str(MODEL), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_request_that_is_not_cached(server: Server) -> None:
    body = {"prompt": "Not cached: " + "one two three " * 20, "n_predict": 4, "temperature": 0}
    first = post(server, "/completion", {**body, "cache_prompt": False})
    again = post(server, "/v1/completions", {**body, "cache_prompt": False})
    assert (first["timings"]["cache_n"], again["timings"]["cache_n"]) == (0, 0)
    cached = [post(server, "/completion", body)["timings"]["cache_n"] for _ in range(2)]
    assert cached[0] < 5, "the requests before left nothing"
    assert cached[1] > 40
    assert post(server, "/completion", {**body, "cache_prompt": False})["timings"]["cache_n"] == 0


def test_probabilities_after_sampling(server: Server) -> None:
    body = {
        "prompt": "Today was the day. Today I would finally become a",
        "n_predict": 5,
        "temperature": 1.0,
        "seed": 3,
    }
    fields = {"n_probs": 10, "post_sampling_probs": True, "top_k": 40, "top_p": 1.0, "min_p": 0.0}
    tokens = post(server, "/completion", {**body, **fields})["completion_probabilities"]
    assert len(tokens) == 5
    assert len(tokens[0]["top_probs"]) == 10
    for token in tokens:
        probs = [each["prob"] for each in token["top_probs"]]
        assert 0.0 < token["prob"] <= 1.0
        assert probs == sorted(probs, reverse=True)
        assert min(probs) > 0.0
        assert len(probs) == 10 or sum(probs) == pytest.approx(1.0)
    greedy = post(server, "/completion", {**body, **fields, "temperature": 0})["completion_probabilities"]
    assert [[each["prob"] for each in token["top_probs"]] for token in greedy] == [[1.0]] * 5
    chat = {"messages": SKY, "max_tokens": 2, "logprobs": True, "top_logprobs": 5, "post_sampling_probs": True}
    content = post(server, "/v1/chat/completions", {**chat, "temperature": 0})["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in content] == [0.0, 0.0]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
def test_progress_of_the_prefill(server: Server, path: str) -> None:
    text = f"{path} " + "a b c d " * 100
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "prompt": text, "stream": True}
    fields = {"max_tokens": 3, "return_progress": True, "timings_per_token": True, "ignore_eos": True}
    del body["prompt" if "chat" in path else "messages"]
    with httpx2.stream("POST", f"{server.url}{path}", json={**body, **fields}, timeout=60) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert progress[0]["processed"] == progress[0]["cache"]
    assert progress[-1]["processed"] == progress[-1]["total"] > 300
    timed = [event["timings"] for event in events if "timings" in event]
    assert timed[-2]["prompt_n"] == timed[-1]["prompt_n"]
    assert timed[-2]["prompt_ms"] > 0
    assert timed[-1]["predicted_n"] == 3
