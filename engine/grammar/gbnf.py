"""GBNF, which is how llama.cpp's grammars are written, as Lark: by llguidance's converter, in time that grows with the
text and no faster."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llguidance.gbnf_to_lark import ASTNode, GrammarParser, RuleNode, RuleRefNode, resolve

from engine.grammar.forms import GrammarError

# What is not closed counts up to the end, so that nothing is gone through twice.
_PARTS = re.compile(r'("(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?)|#[^\r\n]*|\bstart\b(?![-\w])')
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


def lark_of(gbnf: str) -> str:
    """The same grammar in Lark. Raises GrammarError if it is none."""
    try:
        rules = GrammarParser().parse(_PARTS.sub(_convertible, gbnf))
        mark_terminals(rules)
        resolve(rules)
        ordered = sorted(rules.values(), key=lambda rule: rule.order)
        return "\n".join(["%llguidance {}", *map(str, ordered), ""])
    except Exception as error:  # the converter raises many kinds
        raise GrammarError(f"The grammar is not valid GBNF: {str(error) or type(error).__name__}") from None


def mark_terminals(rules: Mapping[str, RuleNode]) -> None:
    """Marks the rules that refer to none but such, which `resolve` would go through all rules again for each of."""
    users: dict[str, list[str]] = {}
    missing: dict[str, int] = {}
    for name, rule in rules.items():
        named = _named(rule.alternatives)
        missing[name] = len(named) + (name == "root")  # where a text begins is never one
        for other in named:
            users.setdefault(other, []).append(name)
    ready = [name for name, count in missing.items() if not count]
    while ready:
        name = ready.pop()
        rules[name].rule_is_terminal = True
        for user in users.get(name, ()):
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)


def _named(node: ASTNode) -> set[str]:
    """The rules that are referred to."""
    names, left = set[str](), [node]
    while left:
        node = left.pop()
        if isinstance(node, RuleRefNode):
            names.add(node.name)
        left += node.children()
    return names


def _convertible(part: re.Match[str]) -> str:
    """A part of a GBNF grammar as the converter can take it: characters above ASCII as themselves, no comments, all of
    which it would copy for each, and no rule with the name that it gives to `root`."""
    if part[0].startswith("#"):
        return ""
    if part[0] == "start":
        return "start-of-start"
    return _ESCAPE.sub(_character, part[0]) if part[1] else part[0]


def _character(escape: re.Match[str]) -> str:
    code = int(escape[1] or escape[2], 16)
    return chr(code) if 0x7F < code < 0xD800 or 0xDFFF < code <= 0x10FFFF else escape[0]
