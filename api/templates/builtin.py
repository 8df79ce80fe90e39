"""Chat templates of model families by llama-server's names, for GGUF files without a correct template.

The templates render system, user and assistant messages, but no tools. The format of all of them is `Generic`, so
tools are described in the prompt.
"""

from __future__ import annotations

# The template for models without one.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _bracketed(before: str, inside: str, content: str = "message.content") -> str:
    """Mistral before tokenizer v7, with the system text in the next user turn.

    `before` and `inside` are the white space before `[INST]` and at the start of its body.
    """
    return (
        "{{ bos_token }}{% set ns = namespace(open=false) %}{% for message in messages %}"
        "{% if not ns.open and message.role != 'assistant' %}{% set ns.open = true %}"
        f"{before}[INST]{inside}"
        "{% endif %}{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
        "{% elif message.role == 'user' %}"
        f"{{{{ message.content }}}}{before}[/INST]"
        "{% else %}{% set ns.open = false %}"
        f"{inside}{{{{ {content} }}}}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )


def _tagged_system(space: str) -> str:
    """Mistral since tokenizer v7: the system message has tags of its own."""
    return (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
        f"[SYSTEM_PROMPT]{space}{{{{ message.content }}}}[/SYSTEM_PROMPT]"
        "{% elif message.role == 'user' %}"
        f"[INST]{space}{{{{ message.content }}}}[/INST]"
        "{% else %}"
        f"{space}{{{{ message.content }}}}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )


def _headed(start: str, end: str, end_of_turn: str) -> str:
    """Llama since version 3: the role in a header, trimmed content, an end-of-turn token."""
    head = f"{start}{{{{ role }}}}{end}\n\n"
    return (
        "{{ bos_token }}{% for message in messages %}{% set role = message.role %}"
        f"{head}{{{{ message.content | trim }}}}{end_of_turn}"
        "{% endfor %}{% if add_generation_prompt %}{% set role = 'assistant' %}"
        f"{head}"
        "{% endif %}"
    )


def _barred(between: str, after: str) -> str:
    """Messages that are the role as `<|role|>`, the text `between`, the content, and the text `after`."""
    return (
        "{% for message in messages %}"
        f"<|{{{{ message.role }}}}|>{between}{{{{ message.content }}}}{after}"
        "{% endfor %}{% if add_generation_prompt %}"
        f"<|assistant|>{between}"
        "{% endif %}"
    )


# Jinja drops line breaks after tags and at the end of a template, but keeps a line break in an expression.
_BREAK = "{{ '\n' }}"

BUILTIN_TEMPLATES = {
    "chatml": CHATML,
    "llama2": (
        "{% for message in messages %}{% if message.role == 'system' %}"
        "{{ bos_token + '[INST] <<SYS>>\n' + message.content + '\n<</SYS>>\n\n' }}"
        "{% elif message.role == 'user' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'system' %}{{ bos_token + '[INST] ' }}{% endif %}"
        "{{ message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama3": _headed("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": _headed("<|header_start|>", "<|header_end|>", "<|eot|>"),
    "mistral-v1": _bracketed(" ", " "),
    "mistral-v3": _bracketed("", " ", "message.content | trim"),
    "mistral-v3-tekken": _bracketed("", ""),
    "mistral-v7": _tagged_system(" "),
    "mistral-v7-tekken": _tagged_system(""),
    "gemma": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ns.system = ns.system + (message.content | trim) + '\n\n' %}"
        "{% else %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
        "{% if message.role != 'assistant' %}{{ ns.system }}{% set ns.system = '' %}{% endif %}"
        "{{ (message.content | trim) + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": _barred(_BREAK, "<|end|>" + _BREAK),
    "phi4": (
        "{% for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    ),
    "falcon3": _barred(_BREAK, _BREAK),
    "zephyr": _barred(_BREAK, "{{ eos_token }}" + _BREAK),
    "openchat": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
        "{% else %}GPT4 Correct {{ message.role | title }}: {{ message.content }}{% endif %}<|end_of_turn|>"
        "{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
        "{% elif message.role == 'user' %}{{ 'USER: ' + message.content + '\n' }}"
        "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "deepseek3": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
        "{% elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
        "{% else %}{{ '<｜Assistant｜>' + message.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
        "{% if message.role == 'system' %}<|SYSTEM_TOKEN|>{% elif message.role == 'user' %}<|USER_TOKEN|>"
        "{% else %}<|CHATBOT_TOKEN|>{% endif %}{{ message.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "granite": (
        "{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}"
        "<|end_of_text|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    ),
}
