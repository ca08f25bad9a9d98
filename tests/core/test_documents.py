"""Check that documents of any kind and encoding are read, that citations lead back, and that what is not is named."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import pytest

from focus_core.errors import ConfigError, CorpusError, NotTextError
from focus_core.session.attachments import attached_document
from focus_core.session.citations import page_at
from focus_core.session.corpus import index_paths
from focus_core.store.places import Place
from focus_core.text.conversion import _bomb, _pages
from focus_core.text.converters import KINDS, Converter, kind_of
from focus_core.text.corpus import Document, document_of, load_documents, read_documents
from focus_core.text.encodings import decode
from tests import office

converts = pytest.mark.skipif(
    importlib.util.find_spec("kreuzberg") is None, reason="needs the converter: pip install 'focusllm[documents]'"
)
unix_names = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
BOMB = office.packed({"word/document.xml": b"a" * (17 << 20)})
FAKE = """
class _Any:
    def __init__(self, **options): pass
ExtractionConfig = PageConfig = ConcurrencyConfig = _Any
class _Result:
    metadata, tables, pages = {}, [], None
    def __init__(self, content): self.content = content
def extract_bytes_sync(data, kind, config):
    if b"hang" in data:
        import time
        time.sleep(600)
    if b"eat" in data:
        held = []
        while True: held.append(bytearray(b"x") * (16 << 20))
    if b"die" in data:
        import os
        os._exit(7)
    if b"raise" in data: raise ValueError("bad\\nform")
    print("not an answer")
    return _Result("the text of " + data.decode())
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a converter that misbehaves by order in the place of the real one."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "kreuzberg.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    with Converter() as one:
        yield one


def folder_of_everything(folder: Path) -> dict[str, list[str]]:
    """Fill a folder; return the texts that each file's pages hold."""
    pages = [f"The code of vault {number} is {number * 7919}. Café." for number in (1, 2, 3)]
    made = {
        "report.pdf": (office.pdf(pages), pages),
        "contract.docx": (office.docx([["The fee is 40 euros."], ["Né à Zürich."]]), ["40 euros", "Né à Zürich."]),
        "slides.pptx": (office.pptx(["Budget is 9 é"] * 40 + ["The door is green."]), ["9 é"] * 40 + ["door is green"]),
        "sheet.xlsx": (office.xlsx({"Costs": [["Tea", "3"]], "More": [["Milk", "2"]]}), ["Tea\t3", "Milk\t2"]),
        "book.epub": (office.epub(["A dog.", "The cat is Tom."]), ["Tom"]),
        "page.html": (b"<html><head><style>p{}</style></head><body><h1>Head</h1><p>A &amp; caf&eacute;", ["A & café"]),
        "old.htm": ("<meta charset='iso-8859-1'><p>Straße</p>".encode("latin-1"), ["Straße"]),
        "mail.eml": (b"From: a@x.org\r\nSubject: Hello\r\n\r\nThe meeting is at nine.\r\n", ["meeting is at nine"]),
        "unnamed": (office.pdf(["no suffix"]), ["no suffix"]),
        "wide.txt": ("Straße, 漢字".encode("utf-16"), ["Straße, 漢字"]),
        "western.txt": ("Le garçon a mangé une crème brûlée.".encode("latin-1"), ["crème brûlée"]),
        "code.py": (b"def f():\n    return 1\n", ["return 1"]),
        "notes.md": ("# Größe\n".encode(), ["# Größe"]),
    }
    for name, (data, _) in made.items():
        (folder / name).write_bytes(data)
    return {name: texts for name, (_, texts) in made.items()}


# -- encodings --------------------------------------------------------------------------------------------------

FRENCH = "Le garçon a mangé une crème brûlée à l'hôtel."


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Straße, 漢字\r\n", "utf-8"),
        ("Straße, 漢字\r\n", "utf-8-sig"),
        ("Straße, 漢字\r\n", "utf-16"),
        ("Straße, 漢字\r\n", "utf-32"),
        ("The cat sat.\nNaïve.", "utf-16-le"),
        ("The cat sat.\nNaïve.", "utf-16-be"),
        ("café", "latin-1"),
        (FRENCH, "latin-1"),
        ("Die Straße über den Fluß ist für Fußgänger gesperrt.", "cp1252"),
        ("He said “hello” — it’s 5€.", "cp1252"),
        ("# Größe\ndef f(x):\n    return 'é'\n" * 3, "latin-1"),
        ("Привет, как дела? Сегодня хорошая погода в Москве.", "cp1251"),
        ("Привет, как дела? Сегодня хорошая погода в Москве.", "koi8-r"),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy.", "cp1250"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたか見当がつかぬ。", "shift_jis"),
        ("안녕하세요. 오늘 날씨가 좋습니다. 서울에 갑니다.", "cp949"),
        ("Καλημέρα κόσμε, τι κάνετε σήμερα;", "iso8859-7"),
    ],
)
def test_text_of_any_encoding_is_read(text: str, encoding: str) -> None:
    """With and without a byte order mark, of one byte a character and of several."""
    assert decode(text.encode(encoding), "a.txt")[0] == text


def test_bytes_that_are_no_text_are_refused() -> None:
    """Binary data with and without zeros; UTF-16 by its mark alone."""
    for data in (b"\x7fELF\0\0\0", bytes(range(256)) * 4, bytes(range(1, 256)) * 4, os.urandom(4096)):
        with pytest.raises(NotTextError, match="a holds binary data; convert"):
            decode(data, "a")
    with pytest.raises(NotTextError, match="a is not UTF-16 text"):
        decode(b"\xff\xfea", "a")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_half_a_surrogate_pair_in_a_file_is_replaced_with_a_notice(encoding: str, tmp_path: Path) -> None:
    """One character for one: offsets behind it are those of the file's text."""
    said = "the \ud800cat"
    (tmp_path / "a.txt").write_bytes(said.encode(encoding, "surrogatepass"))
    with pytest.warns(UserWarning, match=r"text of document .*a\.txt' holds half a surrogate pair"):
        found = load_documents([tmp_path])[0]
    assert found.text == "the \ufffdcat"
    assert found.text.index("cat") == said.index("cat")
    found.text.encode()


# -- documents --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@converts
def test_a_folder_of_everything_is_read_with_page_citations(run: Any, tmp_path: Path) -> None:
    """One index command, one question: each file is there, each passage cited is the converted text's, on its page."""
    (tmp_path / "files").mkdir()
    wanted = folder_of_everything(tmp_path / "files")
    code, _, err = run("index", tmp_path / "files", "--name", "all", "--memory", tmp_path / "store", "--strict")
    assert code == 0, err
    assert f"{len(wanted)} new" in err
    assert "no UTF-8, read as cp1252: " in err
    held = {Path(one.id).name: one for one in Place(tmp_path / "store", "all").open().read("all").documents.values()}
    assert set(held) == set(wanted)
    paged = {"report.pdf": 3, "contract.docx": 2, "slides.pptx": 41, "sheet.xlsx": 2, "unnamed": 1}
    for name, texts in wanted.items():
        document, at = held[name], 0
        for page, text in enumerate(texts, 1):
            at = document.text.index(text, at)
            assert page_at(document.metadata, at) == (page if name in paged else None), name
            at += 1
        assert len(document.metadata.get("page_starts", ())) == paged.get(name, 0)
        assert "<" not in document.text
    _, out, _ = run("ask", "which vault?", "--memory", tmp_path / "store", "--json", "--sources", 99, "--max-tokens", 1)
    passages = json.loads(out)["passages"]
    assert {Path(one["document_id"]).name for one in passages} == set(wanted)
    for one in passages:
        document = held[Path(one["document_id"]).name]
        assert one["text"] == document.text[one["start"] : one["end"]]
        assert one.get("page") == page_at(document.metadata, one["start"])
    report = tmp_path / "files" / "report.pdf"
    _, _, err = run("ask", "which vault?", report, "--max-tokens", 1, "--chunk-size", 32)
    told = re.search(r"report\.pdf:(\d+)-\d+, page (\d)", err)
    assert told is not None, err
    assert int(told[2]) == page_at(held["report.pdf"].metadata, int(told[1]))


@pytest.mark.slow
@converts
def test_what_was_converted_is_not_converted_again(make_engine: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Indexing again converts the changed file alone; a file that cannot be read now is not taken for vanished."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.pdf").write_bytes(office.pdf([f"the {name}", "end"]))
    engine, place, seen = make_engine(), Place(tmp_path / "store", "x"), []
    convert = Converter.convert

    def counted(self: Converter, data: bytes, kind: str, name: str) -> Any:
        seen.append(Path(name).name)
        return convert(self, data, kind, name)

    monkeypatch.setattr(Converter, "convert", counted)
    index_paths(engine, place, [tmp_path])
    (tmp_path / "b.pdf").write_bytes(office.pdf(["the c", "end"]))
    report = index_paths(engine, place, [tmp_path])
    assert seen == ["a.pdf", "b.pdf", "b.pdf"]
    assert [Path(name).name for name in (*report.unchanged, *report.changed)] == ["a.pdf", "b.pdf"]
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 broken")
    report = index_paths(engine, place, [tmp_path], sync=True)
    assert report.removed == []
    assert len(place.open().listing("x")) == 2


@pytest.mark.slow
@converts
@pytest.mark.parametrize("name", ["a.docx", "a.xlsx", "a.pptx", "a.epub", "a"])
def test_a_zip_bomb_is_refused(name: str, converter: Converter) -> None:
    """Seventeen kilobytes that unpack to seventeen megabytes, under every name, before they are unpacked."""
    with pytest.raises(NotTextError, match=rf"^{name} unpacks from 1.,... bytes to 17,825,792, as a zip bomb does"):
        document_of(name, BOMB, kind=kind_of(name, BOMB) or KINDS[".docx"], converter=converter)
    assert len(_many()) < 1 << 22
    assert "packs 20,001 files" in str(_bomb(_many()))
    assert _bomb(office.docx([["a fair document"]])) is None


def _many() -> bytes:
    return office.packed(dict.fromkeys(map(str, range(20_001)), b""))


@converts
def test_damaged_and_empty_documents_are_named(converter: Converter) -> None:
    """A torn PDF, an archive that is none, a PDF without text; the next document is converted all the same."""
    whole = office.pdf(["the cat"])
    for name, data, why in (
        ("a.pdf", b"%PDF-1.4\nnonsense", "cannot be converted .*Invalid PDF"),
        ("a.docx", b"PK\x03\x04 nonsense", "cannot be converted .*not a zip file"),
        ("a.pdf", office.pdf([""]), "holds no text; pages that are pictures need OCR"),
    ):
        with pytest.raises(NotTextError, match=f"^{name} {why}"):
            document_of(name, data, converter=converter)
    assert document_of("a.pdf", whole, converter=converter).text.strip() == "the cat"


@pytest.mark.slow
def test_a_converter_that_hangs_or_eats_memory_is_stopped_and_named(fake: None) -> None:
    """Time, memory, a crash, an error: each a message, none takes the next document with it."""
    started = time.monotonic()
    with Converter(seconds=20, memory=1 << 28) as one:
        assert one.convert(b"a", "application/pdf", "a").text == "the text of a"
        one.seconds = 0.5
        with pytest.raises(NotTextError, match=r"^b took more than 0\.5 seconds .*FOCUSLLM_CONVERT_SECONDS allows"):
            one.convert(b"hang", "application/pdf", "b")
        one.seconds = 60
        with pytest.raises(NotTextError, match=r"^c .*0\.25 GiB.*FOCUSLLM_CONVERT_MEMORY"):
            one.convert(b"eat", "application/pdf", "c")
        with pytest.raises(NotTextError, match=r"^d ended its converter \(exit code 7\)"):
            one.convert(b"die", "application/pdf", "d")
        with pytest.raises(NotTextError, match=r"^e cannot be converted \(bad form\)"):
            one.convert(b"raise", "application/pdf", "e")
        worker = one._worker
        assert one.convert(b"f", "application/pdf", "f").text == "the text of f"
        assert one._worker is worker
        assert worker is not None
    assert worker.process.poll() is not None
    assert time.monotonic() - started < 120


def test_without_the_converter_a_document_is_named_with_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    """A folder: left out. A file alone: an error."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "kreuzberg.py").write_text("raise ImportError('no module')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "a" / "b.txt").write_text("the cat")
    left = []
    found = load_documents([tmp_path / "a"], skipped=lambda path, why: left.append((path.name, why)))
    assert [one.text for one in found] == ["the cat"]
    assert left == [("a.pdf", "needs a converter; pip install 'focusllm[documents]'")]
    with pytest.raises(CorpusError, match=r"a\.pdf needs a converter; pip install 'focusllm\[documents\]'"):
        load_documents([tmp_path / "a" / "a.pdf"])


def test_limits_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUSLLM_CONVERT_SECONDS", "7")
    monkeypatch.setenv("FOCUSLLM_CONVERT_MEMORY", "0.5")
    assert (Converter().seconds, Converter().memory) == (7, 1 << 29)
    for bad in ("x", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("FOCUSLLM_CONVERT_SECONDS", bad)
        with pytest.raises(ConfigError, match="FOCUSLLM_CONVERT_SECONDS must be a positive number"):
            Converter()


def test_pages_are_counted_whatever_the_converter_gives() -> None:
    """Sheets from tables, pages with a blank one between, slides by their marks; nothing where there are none."""

    def result(content: str = "", pages: Any = None, tables: Any = (), **metadata: Any) -> Any:
        return SimpleNamespace(content=content, pages=pages, tables=tables, metadata=metadata)

    tables = [SimpleNamespace(page_number=2, cells=[["a", 1], ["b", 2]])]
    assert _pages(result(tables=tables, sheet_names=["X", "Y"]), "m") == ["X", "Y\na\t1\nb\t2"]
    pages = [{"page_number": 1, "content": "a\r\nb"}, {"page_number": 3, "content": "c"}]
    assert _pages(result("a b c c", pages), "m") == ["a\nb", "", "c"]
    assert _pages(result("m1\n\none\n\nm2\n\ntwo", [{"page_number": 1, "content": ""}]), "m") == ["one", "two"]
    assert _pages(result("text"), "m") is None


# -- what is left out, and names --------------------------------------------------------------------------------


def test_what_is_left_out_is_named_once_and_strict_makes_it_an_error(run: Any, tmp_path: Path) -> None:
    """Binary data, a dead link, a pipe, a link to a folder; nothing is written when strict."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat")
    (folder / "b.bin").write_bytes(b"\x7fELF\0\0")
    (folder / "dead").symlink_to(tmp_path / "nothing")
    (folder / "other").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    left = []
    found = load_documents([folder, folder, folder / "a.txt"], skipped=lambda path, why: left.append((path.name, why)))
    assert [one.text for one in found] == ["the cat"]
    assert sorted(left) == [
        ("b.bin", "holds binary data; convert it to text first"),
        ("dead", "cannot be read (No such file or directory)"),
        ("other", "it is a link to a folder; name it to read it"),
        ("pipe", "it is no file but a pipe, socket or device"),
    ]
    code, _, err = run("index", folder, "--memory", tmp_path / "m", "--strict")
    assert code == 2
    assert err.count("left out") == 4
    assert "error: 4 of the entries cannot be read" in err
    assert not (tmp_path / "m").exists()
    assert run("ask", "who?", folder, "--max-tokens", 1, "--strict")[0] == 2
    code, _, err = run("ask", "who?", folder, "--max-tokens", 1)
    assert code == 0
    assert err.count("left out") == 4


@pytest.mark.slow
@unix_names
def test_names_of_any_bytes_lead_back_to_their_files(run: Any, make_engine: Any, tmp_path: Path) -> None:
    """b"caf\\xe9.txt" beside a file that is called as the first is written, in a folder of such a name."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/fold\xe9r"))
    folder.mkdir()
    names = {b"caf\xe9.txt": "the cat", b"caf\\xe9.txt": "the dog", b"new\nline\x1b.txt": "the mat"}
    for name, text in names.items():
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(text)
    found = list(read_documents([folder]))
    assert sorted(one.text for one in found) == sorted(names.values())
    assert len({one.id for one in found}) == 3
    for one in found:
        one.id.encode()
        assert Path(os.fsdecode(unquote_to_bytes(urlsplit(one.metadata["url"]).path))).read_text() == one.text
    engine, place = make_engine(), Place(tmp_path / "store", "x")
    assert len(index_paths(engine, place, [folder]).added) == 3
    again = index_paths(engine, place, [folder])
    assert (len(again.unchanged), again.changed, again.vanished) == (3, [], [])
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).unlink()
    gone = index_paths(engine, place, [folder], sync=True)
    assert len(place.open().listing("x")) == 2, gone
    assert run("ask", "who?", folder, "--max-tokens", 1)[0] == 0


# -- attached files ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@converts
def test_attached_files_are_read_as_files_are() -> None:
    """Bytes, base64, a data URL; a PDF has pages; pictures are refused by name."""
    data = office.pdf(["one", "two"])
    text = base64.b64encode(data).decode()
    for given, mime in ((data, None), (text, "application/pdf"), (f"data:application/pdf;base64,{text}", None)):
        found = attached_document("a", given, mime)
        assert (found.id, len(found.metadata["page_starts"])) == ("a", 2)
    assert attached_document(None, "café".encode("latin-1")).text == "café"
    with pytest.raises(NotTextError, match="attached file 'a' is image/png, which holds no text"):
        attached_document("a", b"x", "image/png")
    with pytest.raises(NotTextError, match="attached file 'a' is not base64"):
        attached_document("a", "?")


def test_equal_texts_have_equal_attachments() -> None:
    assert attached_document(None, b"x") == attached_document(None, b"x") != Document("x", "x")
