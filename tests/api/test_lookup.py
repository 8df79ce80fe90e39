"""`paceline lookup build`: a file, or one line about why there is none."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from api.__main__ import USAGE, main
from api.commands import lookup
from api.commands.lookup import PIECE, pieces
from api.templates.prompts import LONG
from engine.speculate.cache import NgramCounts
from engine.speculate.shared import key_of
from tests.api.fake import ByteVocab

TEXT = "a cat sat on a mat\n"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text, in a folder of its own, and a model whose tokens are bytes."""
    monkeypatch.setattr(lookup, "open_vocabulary", lambda path: nullcontext(ByteVocab()))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT * 5)
    return corpus


def build(*arguments: object) -> int:
    return main(["lookup", "build", *map(str, arguments)])


def test_a_file(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, made = corpus.with_name("more.txt"), corpus.with_name("static.bin")
    more.write_text("atlas")
    assert build(corpus, more, "-m", "model.gguf", "-o", made) == 0
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Counting 2 texts"
    assert last == f"Wrote {made}: serve with --spec-type ngram-cache --lookup-cache-static {made}"
    counts = NgramCounts()
    counts.load(made, key_of(ByteVocab()), ByteVocab.size)
    assert counts.followers(b"at") == {ord(" "): 10, ord("\n"): 5, ord("l"): 1}


def test_nothing_is_a_corpus_too(corpus: Path) -> None:
    corpus.write_text("")
    assert build(corpus, "-m", "m", "-o", corpus.with_name("static.bin")) == 0


def test_pieces_end_with_lines(tmp_path: Path) -> None:
    lines = [f"{number} is a nümber\r\n".encode() for number in range(PIECE // 8)]
    (tmp_path / "a").write_bytes(b"".join(lines))
    (tmp_path / "b").write_bytes(b"\xff no new line at the end")
    told = list(pieces([tmp_path / "a", tmp_path / "b"]))
    assert "".join(told[:-1]).encode() == b"".join(lines)
    assert all(piece.endswith("\n") and len(piece) < PIECE + 100 for piece in told[:-1])
    assert all(len(piece) >= PIECE for piece in told[:-2])
    assert told[-1] == "\ufffd no new line at the end"


def test_a_line_is_cut_if_it_is_long(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x\n" + "y" * (2 * LONG + 5) + "\nz\n")
    assert [len(piece) for piece in pieces([tmp_path / "a"])] == [2 + LONG, LONG, 5 + 1 + 2]


def test_an_interrupt_leaves_what_was_there(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize(self: ByteVocab, text: str, *, special: bool) -> list[int]:
        raise KeyboardInterrupt

    made = corpus.with_name("static.bin")
    made.write_text("before")
    monkeypatch.setattr(ByteVocab, "tokenize", tokenize)
    assert build(corpus, "-m", "m", "-o", made) == 1
    assert capsys.readouterr().err.endswith("paceline: interrupted; nothing was written\n")
    assert made.read_text() == "before"
    assert sorted(path.name for path in made.parent.iterdir()) == ["corpus.txt", "static.bin"]


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["-m", "m", "-o", "o"], 2, " lookup build: the following arguments are required: corpus.txt"),
        (["HERE"], 2, " lookup build: the following arguments are required: -m/--model, -o/--output"),
        (["HERE", "-m", "m", "-o", "o", "--fast"], 2, " lookup build: unrecognized arguments: --fast"),
        (["/nowhere", "-m", "m", "-o", "HERE"], 1, ": cannot read /nowhere: No such file or directory"),
        (["/tmp", "-m", "m", "-o", "HERE"], 1, ": cannot read /tmp: Is a directory"),
        (["HERE", "-m", "m", "-o", "/nowhere/o"], 1, ": cannot write /nowhere/o: No such file or directory"),
        (["HERE", "-m", "m", "-o", "/tmp"], 1, ": cannot write /tmp: Is a directory"),
    ],
    ids=str,
)
def test_mistakes(
    corpus: Path, arguments: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(*(str(corpus) if word == "HERE" else word for word in arguments)) == code
    assert capsys.readouterr().err == f"paceline{complaint}\n"
    assert corpus.read_text() == TEXT * 5


def test_a_model_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("x")
    assert build(text, "-m", text, "-o", tmp_path / "o") == 1
    assert capsys.readouterr().err == f"paceline: {text} is not a GGUF file: it begins with b'x', not b'GGUF'\n"


def test_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup"]) == main(["lookup", "make"]) == 2
    assert capsys.readouterr().err == f"{USAGE}\n" * 2
