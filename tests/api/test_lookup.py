"""`paceline lookup build`: a file of counts, or an error of one line."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from api.__main__ import USAGE, main
from api.commands import lookup
from api.commands.lookup import CHUNK_CHARS, chunks
from api.templates.text_tokens import LONG_TEXT_CHARS
from engine.speculate.ngram_counts import NgramCounts
from engine.speculate.vocabulary import vocabulary_digest
from tests.api.fake import ByteVocab

TEXT = "a cat sat on a mat\n"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the path of a text in its own folder; the tokens of the model are bytes."""
    monkeypatch.setattr(lookup, "open_vocabulary", lambda path: nullcontext(ByteVocab()))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT * 5)
    return corpus


def build(*arguments: object) -> int:
    return main(["lookup", "build", *map(str, arguments)])


def test_two_texts_are_counted(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second, output = corpus.with_name("more.txt"), corpus.with_name("static.bin")
    second.write_text("atlas")
    assert build(corpus, second, "-m", "model.gguf", "-o", output) == 0
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Counting 2 texts"
    assert last == f"Wrote {output}: serve with --spec-type ngram-cache --lookup-cache-static {output}"
    counts = NgramCounts()
    counts.load(output, vocabulary_digest(ByteVocab()), ByteVocab.size)
    assert counts.followers(b"at") == {ord(" "): 10, ord("\n"): 5, ord("l"): 1}


def test_an_empty_corpus(corpus: Path) -> None:
    corpus.write_text("")
    assert build(corpus, "-m", "m", "-o", corpus.with_name("static.bin")) == 0


def test_chunks_end_with_lines(tmp_path: Path) -> None:
    lines = [f"{number} is a nümber\r\n".encode() for number in range(CHUNK_CHARS // 8)]
    (tmp_path / "a").write_bytes(b"".join(lines))
    (tmp_path / "b").write_bytes(b"\xff no new line at the end")
    found = list(chunks([tmp_path / "a", tmp_path / "b"]))
    assert "".join(found[:-1]).encode() == b"".join(lines)
    assert all(chunk.endswith("\n") and len(chunk) < CHUNK_CHARS + 100 for chunk in found[:-1])
    assert all(len(chunk) >= CHUNK_CHARS for chunk in found[:-2])
    assert found[-1] == "\ufffd no new line at the end"


def test_a_line_is_cut_if_it_is_long(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x\n" + "y" * (2 * LONG_TEXT_CHARS + 5) + "\nz\n")
    assert [len(chunk) for chunk in chunks([tmp_path / "a"])] == [2 + LONG_TEXT_CHARS, LONG_TEXT_CHARS, 5 + 1 + 2]


def test_an_interrupt_keeps_the_old_file(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize(self: ByteVocab, text: str, *, special: bool) -> list[int]:
        raise KeyboardInterrupt

    output = corpus.with_name("static.bin")
    output.write_text("before")
    monkeypatch.setattr(ByteVocab, "tokenize", tokenize)
    assert build(corpus, "-m", "m", "-o", output) == 1
    assert capsys.readouterr().err.endswith("paceline: interrupted; nothing was written\n")
    assert output.read_text() == "before"
    assert sorted(path.name for path in output.parent.iterdir()) == ["corpus.txt", "static.bin"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
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
def test_errors(
    corpus: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(*(str(corpus) if word == "HERE" else word for word in arguments)) == code
    assert capsys.readouterr().err == f"paceline{message}\n"
    assert corpus.read_text() == TEXT * 5


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("x")
    assert build(text, "-m", text, "-o", tmp_path / "o") == 1
    assert (
        capsys.readouterr().err
        == f"paceline: the model {text} is not a GGUF file: it begins with 'x', not with 'GGUF'\n"
    )


def test_unknown_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup"]) == main(["lookup", "make"]) == 2
    error = "paceline: unknown command 'lookup'; the nearest is lookup build"
    assert capsys.readouterr().err == f"{error}\n{USAGE}\n" * 2
