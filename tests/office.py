"""Make documents of every kind for tests: PDF and docx by libraries, the rest by hand."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence

_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
_R = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_OFFICE = "application/vnd.openxmlformats-officedocument"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_S = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_P = "http://schemas.openxmlformats.org/presentationml/2006/main"
_A = "http://schemas.openxmlformats.org/drawingml/2006/main"


def pdf(pages: Iterable[str]) -> bytes:
    from fpdf import FPDF

    made = FPDF()
    made.set_font("helvetica", size=12)
    for page in pages:
        made.add_page()
        made.multi_cell(0, 8, page)
    return bytes(made.output())


def docx(pages: Iterable[Sequence[str]]) -> bytes:
    """Return a document with page breaks between lists of paragraphs."""
    from docx import Document

    made = Document()
    for number, paragraphs in enumerate(pages):
        if number:
            made.add_page_break()
        for text in paragraphs:
            made.add_paragraph(text)
    stream = io.BytesIO()
    made.save(stream)
    return stream.getvalue()


def xlsx(sheets: dict[str, Sequence[Sequence[str]]]) -> bytes:
    names = "".join(f'<sheet name="{n}" sheetId="{i}" r:id="rId{i}"/>' for i, n in enumerate(sheets, 1))
    parts = {
        f"xl/worksheets/sheet{number}.xml": f'{_XML}<worksheet xmlns="{_S}">{_rows(rows)}</worksheet>'
        for number, rows in enumerate(sheets.values(), 1)
    }
    book = f'{_XML}<workbook xmlns="{_S}" xmlns:r="{_R}"><sheets>{names}</sheets></workbook>'
    return _office("xl/workbook.xml", "spreadsheetml.sheet.main", book, "spreadsheetml.worksheet", "worksheet", parts)


def _rows(rows: Sequence[Sequence[str]]) -> str:
    cell = '<c r="{}{}" t="inlineStr"><is><t>{}</t></is></c>'
    made = "".join(
        f'<row r="{at}">{"".join(cell.format(chr(65 + x), at, text) for x, text in enumerate(row))}</row>'
        for at, row in enumerate(rows, 1)
    )
    return f"<sheetData>{made}</sheetData>"


def pptx(slides: Sequence[str]) -> bytes:
    ids = "".join(f'<p:sldId id="{255 + number}" r:id="rId{number}"/>' for number in range(1, len(slides) + 1))
    head = f'{_XML}<p:presentation xmlns:p="{_P}" xmlns:r="{_R}"><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>'
    parts = {f"ppt/slides/slide{number}.xml": _slide(text) for number, text in enumerate(slides, 1)}
    return _office(
        "ppt/presentation.xml", "presentationml.presentation.main", head, "presentationml.slide", "slide", parts
    )


def _slide(text: str) -> str:
    return (
        f'{_XML}<p:sld xmlns:p="{_P}" xmlns:a="{_A}"><p:cSld><p:spTree><p:nvGrpSpPr><p:cNvPr id="1" name=""/>'
        "<p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/><p:sp><p:nvSpPr><p:cNvPr id='2' name='T'/><p:cNvSpPr/>"
        f"<p:nvPr/></p:nvSpPr><p:spPr/><p:txBody><a:bodyPr/><a:p><a:r><a:t>{text}</a:t></a:r></a:p></p:txBody></p:sp>"
        "</p:spTree></p:cSld></p:sld>"
    )


def _office(main: str, main_type: str, head: str, part_type: str, relation: str, parts: dict[str, str]) -> bytes:
    folder, name = main.split("/")
    types = {main: main_type, **dict.fromkeys(parts, part_type)}
    overrides = "".join(
        f'<Override PartName="/{part}" ContentType="{_OFFICE}.{kind}+xml"/>' for part, kind in types.items()
    )
    content = (
        f'{_XML}<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Default Extension="xml" ContentType="application/xml"/>{overrides}</Types>'
    )
    own = {part.removeprefix(f"{folder}/"): relation for part in parts}
    return packed(
        {
            "[Content_Types].xml": content,
            "_rels/.rels": _relations({main: "officeDocument"}),
            main: head,
            f"{folder}/_rels/{name}.rels": _relations(own),
            **parts,
        }
    )


def _relations(targets: dict[str, str]) -> str:
    items = "".join(
        f'<Relationship Id="rId{number}" Type="{_R}/{kind}" Target="{target}"/>'
        for number, (target, kind) in enumerate(targets.items(), 1)
    )
    return f'{_XML}<Relationships xmlns="{_PACKAGE}/relationships">{items}</Relationships>'


def epub(chapters: Sequence[str]) -> bytes:
    items = "".join(
        f'<item id="c{number}" href="c{number}.xhtml" media-type="application/xhtml+xml"/>'
        for number in range(len(chapters))
    )
    spine = "".join(f'<itemref idref="c{number}"/>' for number in range(len(chapters)))
    package = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="i">'
        '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:identifier id="i">x</dc:identifier>'
        f"<dc:title>Book</dc:title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
    container = (
        '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    pages = {
        f"c{number}.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><body><p>{text}</p></body></html>'
        for number, text in enumerate(chapters)
    }
    return packed({"mimetype": "application/epub+zip", "META-INF/container.xml": container, "c.opf": package, **pages})


def packed(files: dict[str, str | bytes]) -> bytes:
    """Return a zip archive; a file called ``mimetype`` is stored as it is."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data, zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED)
    return stream.getvalue()
