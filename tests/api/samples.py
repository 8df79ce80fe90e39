"""Outputs of models in every chat format, each with the message that the parser must return."""

from __future__ import annotations

from typing import Any, NamedTuple

from api.tools.formats import CHAT_FORMATS, AllowedCalls, ChatFormat, Tool

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALLS = AllowedCalls((Tool("weather", WEATHER), Tool("now", {"type": "object", "properties": {}})))
CITY = "Zürich 👩‍👩‍👧 東京"
ZÜRICH = '{"city": "Zürich 👩‍👩‍👧 東京"}'


class FormatSample(NamedTuple):
    """An output and its parsed fields. With `in_reasoning` the output begins inside of the reasoning."""

    format: str
    text: str
    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    in_reasoning: bool = False

    @property
    def chat_format(self) -> ChatFormat:
        return next(format for format in CHAT_FORMATS if format.name == self.format)


SAMPLES = [
    FormatSample(
        "hermes",
        f'<think>\nhm 🤔\n</think>\n\nSo:\n<tool_call>\n{{"name": "weather", "arguments": {ZÜRICH}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "So:",
        "hm 🤔",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample("hermes", "a <tool_call> is\n a tag <b>", "a <tool_call> is\n a tag <b>", "", ()),
    FormatSample("hermes", "thought</think>\n\nSaid. \n", "Said. \n", "thought", (), in_reasoning=True),
    FormatSample(
        "hermes",
        '<tool_call>{"arguments": {"city": "Bern"}, "name": "weather"}</tool_call> done',
        " done",
        "",
        (("weather", '{"city": "Bern"}'),),
    ),
    FormatSample(
        "hermes",
        f'{{"name": "weather", "arguments": {ZÜRICH}}}\n{{"name": "now", "parameters": {{}}}}\n</tool_call>',
        "",
        "",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample(
        "hermes",
        '<think>\nhm\n</think>\n\n{\n  "name" : "weather",\n  "arguments": {"city": "}"}\n}\n{"name": "x"} ok',
        '{"name": "x"} ok',
        "hm",
        (("weather", '{"city": "}"}'),),
    ),
    FormatSample(
        "hermes", '{"name": "Bern", "arguments": {"a": 1}}', '{"name": "Bern", "arguments": {"a": 1}}', "", ()
    ),
    FormatSample("hermes", '{"name": "weather", "city": "Bern"}', '{"name": "weather", "city": "Bern"}', "", ()),
    FormatSample(
        "hermes", ' {"name": "now", "arguments": 7} 👩‍👩‍👧', ' {"name": "now", "arguments": 7} 👩‍👩‍👧', "", ()
    ),
    FormatSample(
        "hermes",
        f'<think>\nhm\n</think>\n\nSo:\n```json\n{{\n  "name": "weather",\n  "arguments": {ZÜRICH}\n}}\n```\nDone.',
        "So:\n\nDone.",
        "hm",
        (("weather", ZÜRICH),),
    ),
    FormatSample(
        "hermes",
        f'```\n[{{"name": "weather", "arguments": {ZÜRICH}}},\n {{"name": "now", "parameters": {{}}}}]\n```',
        "",
        "",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample(
        "hermes",
        '```py\nf()\n```\n```json\n{"name": "x", "arguments": {}}\n```\n```json\n{"name": "now", "arguments": {}}, ```',
        '```py\nf()\n```\n```json\n{"name": "x", "arguments": {}}\n```\n, ```',
        "",
        (("now", "{}"),),
    ),
    FormatSample(
        "hermes",
        f'{{{{"name": "weather", "arguments": {ZÜRICH}}}}}\n{{{{"name": "now", "arguments": {{}}}}}}',
        "",
        "",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample(
        "hermes",
        '<tool_call>\n{{"name": "now", "arguments": {}}}\n</tool_call>\n'
        '```json\n{ {"name": "now", "arguments": {}}}\n```',
        "",
        "",
        (("now", "{}"), ("now", "{}")),
    ),
    FormatSample(
        "hermes", 'See ```json\n[{"name": "weather"}]\n```', 'See ```json\n[{"name": "weather"}]\n```', "", ()
    ),
    FormatSample(
        "qwen-xml",
        f"I see.\n<tool_call>\n<function=weather>\n<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        "I see.",
        "",
        (("weather", ZÜRICH[:-1] + ', "days": 3}'),),
    ),
    FormatSample(
        "qwen-xml",
        "hm\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "",
        "hm",
        (("now", "{}"),),
        in_reasoning=True,
    ),
    FormatSample(
        "glm",
        f"<think>why</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "",
        "why",
        (("weather", ZÜRICH[:-1] + ', "days": 2}'),),
    ),
    FormatSample(
        "llama",
        f'{{"name": "weather", "parameters": {ZÜRICH}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        "",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample("llama", '{"city": "Bern"} is JSON', '{"city": "Bern"} is JSON', "", ()),
    FormatSample("llama", 'So <|python_tag|>{"name": "now", "parameters": {}}', "So", "", (("now", "{}"),)),
    FormatSample(
        "pythonic",
        f"[weather(city='{CITY}', days=2), now()]",
        "",
        "",
        (("weather", ZÜRICH[:-1] + ', "days": 2}'), ("now", "{}")),
    ),
    FormatSample("pythonic", "[1] weather(", "[1] weather(", "", ()),
    FormatSample(
        "mistral",
        f"[THINK]oh[/THINK]Look:[TOOL_CALLS]weather[ARGS]{ZÜRICH}[TOOL_CALLS]now[ARGS]{{}}",
        "Look:",
        "oh",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample(
        "mistral-list",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ZÜRICH}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        "",
        (("weather", ZÜRICH), ("now", "{}")),
    ),
    FormatSample(
        "deepseek",
        f"Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ZÜRICH}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Well.",
        "",
        (("weather", ZÜRICH),),
    ),
    FormatSample(
        "deepseek-block",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{ZÜRICH}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "",
        (("weather", ZÜRICH),),
    ),
    FormatSample(
        "dsml",
        'hm</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">'
        f'{CITY}</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        "",
        "hm",
        (("weather", ZÜRICH[:-1] + ', "days": 2}'),),
        in_reasoning=True,
    ),
    FormatSample(
        "kimi",
        "Ok <|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{ZÜRICH}<|tool_call_end|><|tool_calls_section_end|> then",
        "Ok  then",
        "",
        (("weather", ZÜRICH),),
    ),
    FormatSample(
        "kimi-xtml",
        '<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="weather" index="1"<|sep|><|open|>argument '
        f'key="city" type="string"<|sep|>{CITY}<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
        "",
        "",
        (("weather", ZÜRICH),),
    ),
    FormatSample(
        "gemma",
        f'<|channel>thought\nhm\n<channel|>Yes<|tool_call>call:weather{{city:<|"|>{CITY}<|"|>,days:2}}<tool_call|>',
        "Yes",
        "hm",
        (("weather", ZÜRICH[:-1] + ', "days": 2}'),),
    ),
    FormatSample(
        "function-gemma",
        f"<start_function_call>call:weather{{city:<escape>{CITY}<escape>}}<end_function_call>",
        "",
        "",
        (("weather", ZÜRICH),),
    ),
    FormatSample(
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Look.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ZÜRICH}",
        "Look.",
        "hm",
        (("weather", ZÜRICH),),
    ),
    FormatSample("generic", '{"name": "now", "arguments": {}}', "", "", (("now", "{}"),)),
    FormatSample("generic", '<tool_call>\n{"name": "now"}\n</tool_call>', "", "", (("now", "{}"),)),
]
