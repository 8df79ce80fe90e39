"""Converts GBNF, llama.cpp's grammars, to Lark by llguidance's converter, in time linear in the grammar's length."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llguidance.gbnf_to_lark import ASTNode, GrammarParser, RuleNode, RuleRefNode, resolve

from engine.grammar.spec import GrammarError

# Literals, character classes, comments, and rules named `start`. An unclosed literal or class matches up to the end of
# the text, so that no part is scanned twice.
_PARTS = re.compile(r'("(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?)|#[^\r\n]*|\bstart\b(?![-\w])')
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


def lark_from_gbnf(gbnf: str) -> str:
    """Returns the grammar `gbnf` in Lark. Raises GrammarError if `gbnf` is invalid."""
    try:
        rules = GrammarParser().parse(_PARTS.sub(_convertible, gbnf))
        mark_terminals(rules)
        resolve(rules)
        ordered = sorted(rules.values(), key=lambda rule: rule.order)
        return "\n".join(["%llguidance {}", *map(str, ordered), ""])
    except Exception as error:  # the converter raises exceptions of many types
        raise GrammarError(f"The grammar is not valid GBNF: {str(error) or type(error).__name__}") from None


def mark_terminals(rules: Mapping[str, RuleNode]) -> None:
    """Marks the rules that refer to no rules, or to terminal rules only, as terminals. `root` is never a terminal.

    The converter's `resolve` passes over all rules until a pass marks none, which takes quadratic time. After this
    function its first pass marks none.
    """
    users: dict[str, list[str]] = {}  # for each rule, the rules that refer to it
    unmarked: dict[str, int] = {}  # for each rule, the number of rules it refers to that are not marked yet
    for name, rule in rules.items():
        referenced = _referenced_rules(rule.alternatives)
        unmarked[name] = len(referenced) + (name == "root")
        for other in referenced:
            users.setdefault(other, []).append(name)
    ready = [name for name, count in unmarked.items() if not count]
    while ready:
        name = ready.pop()
        rules[name].rule_is_terminal = True
        for user in users.get(name, ()):
            unmarked[user] -= 1
            if not unmarked[user]:
                ready.append(user)


def _referenced_rules(node: ASTNode) -> set[str]:
    names, nodes = set[str](), [node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, RuleRefNode):
            names.add(node.name)
        nodes += node.children()
    return names


def _convertible(part: re.Match[str]) -> str:
    """Returns a part of a GBNF grammar in a form that the converter accepts.

    Replaces escapes of characters above ASCII by the characters. Drops comments, as the converter would need quadratic
    time for them. Renames a rule `start`, as the converter renames `root` to `start`.
    """
    if part[0].startswith("#"):
        return ""
    if part[0] == "start":
        return "start-of-start"
    return _ESCAPE.sub(_character, part[0]) if part[1] else part[0]


def _character(escape: re.Match[str]) -> str:
    code = int(escape[1] or escape[2], 16)
    return chr(code) if 0x7F < code < 0xD800 or 0xDFFF < code <= 0x10FFFF else escape[0]
