"""Imports of the API point downward, and of the engine it knows the public names."""

from __future__ import annotations

from tests.engine.test_layers import ROOT, imports, upward

LAYERS = """
complaints config drafts tasks builtin_templates settings formats
schema replies speculation templates
problems exchange flags native_schema tools messages
prompts responses options bodies logprobs
served
keys metrics completions constraints props slots
turns text native
chat render tokens
app terminal
serve lookup cost
__main__
"""


def test_imports_point_down() -> None:
    assert upward("api", LAYERS) == []


def test_only_public_names_of_the_engine() -> None:
    used = {
        (path.stem, name)
        for path in (ROOT / "api").rglob("*.py")
        for name in imports(path)
        if name.startswith("engine.") and name.count(".") > 1
    }
    assert used == {("config", "engine.config.flags")}
