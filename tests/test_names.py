"""One name has one meaning in the tree: a search for a class or a public constant finds one definition."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONVENTIONAL = {"log"}


def public_names(path: Path) -> Iterator[str]:
    """Yields the classes, constants and type aliases at the top level of a module whose names do not begin with `_`."""
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.ClassDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for package in ("engine", "api", "bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for name in public_names(path):
                places[name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1 and name not in CONVENTIONAL} == {}
