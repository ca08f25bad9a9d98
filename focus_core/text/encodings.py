"""Decode a file's bytes as the text that they are, whatever its encoding.

Byte order marks are believed first, then UTF-8, then what an HTML page says of itself; what remains is detected by
charset-normalizer. Bytes that are no text in any of them are refused.
"""

from __future__ import annotations

import codecs
import re

from charset_normalizer import from_bytes

from focus_core.errors import NotTextError

_MARKS = (  # longest first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LOOKED_AT = 1 << 16  # bytes from which an encoding is detected
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # in no text, but for a stray one
_DECLARED = re.compile(rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I)
_WESTERN = ("cp1252", "latin_1", "iso8859_15")
_EUROPEAN = ("cp125", "iso8859", "latin", "mac_", "cp437", "cp775", "cp85", "cp86", "hp_roman8")
_LETTERS = frozenset("äöüßÄÖÜéèêëàâáãåæçíìîïñóòôõøœúùûýÿÉÈÊËÀÂÁÃÅÆÇÍÌÎÏÑÓÒÔÕØŒÚÙÛŠšŽž“”‘’„‚«»–—…•€£§°±²³´·½¿¡©®™\xa0")
"""What western European texts hold beside ASCII."""


def decode(data: bytes, name: str, *, markup: bool = False) -> tuple[str, str]:
    """Return the text of some bytes and the encoding that they were read in.

    Half a surrogate pair is left for :class:`~focus_core.text.corpus.Document` to replace.

    Args:
        data: of a whole file.
        name: for messages.
        markup: it is HTML or XML, which may say its encoding.

    Raises:
        NotTextError: the bytes are no text.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None) or _wide(data)
    if encoding is None and b"\0" in data[:_LOOKED_AT]:
        raise NotTextError(f"{name} holds binary data; convert it to text first")
    if encoding is not None:
        return _strictly(data, encoding, name)
    try:
        return data.decode("utf-8-sig", "surrogatepass"), "utf-8"
    except UnicodeDecodeError:
        pass
    if len(_CONTROL.findall(data[:_LOOKED_AT])) > len(data[:_LOOKED_AT]) // 100:
        raise NotTextError(f"{name} holds binary data; convert it to text first")
    if markup and (declared := _declared(data)):
        return data.decode(declared, "replace"), declared
    encoding = _detected(data)
    if encoding is None:
        raise NotTextError(f"{name} is no text in any known encoding; convert it to UTF-8 first")
    return data.decode(encoding, "replace"), encoding


def _strictly(data: bytes, encoding: str, name: str) -> tuple[str, str]:
    try:
        return data.decode(encoding, "surrogatepass"), encoding
    except UnicodeDecodeError as error:
        raise NotTextError(
            f"{name} is not {encoding.upper()} text (byte {error.start}: 0x{data[error.start]:02x}), though it begins "
            "as such; convert it to UTF-8 first"
        ) from error


def _wide(data: bytes) -> str | None:
    """Return the encoding of UTF-16 without a mark: every second byte of its ASCII is zero, no other is."""
    head = data[: min(len(data), _LOOKED_AT) & ~1]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(data) % 2 or max(even, odd) < max(1, len(head) // 8) or min(even, odd) * 8 > max(even, odd):
        return None
    encoding = "utf-16-le" if odd > even else "utf-16-be"
    try:
        said = head.decode(encoding, "surrogatepass")
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(said.encode("utf-8", "surrogatepass")) else encoding


def _declared(data: bytes) -> str | None:
    found = _DECLARED.search(data[:2048])
    try:
        name = codecs.lookup(found.group(1).decode("ascii")).name if found else ""
        data[:_LOOKED_AT].decode(name or "ascii", "ignore")
    except (LookupError, UnicodeError):
        return None
    # browsers read Latin-1 as Windows' superset of it; what is not UTF-8 cannot be so by its own word
    return {"iso8859-1": "cp1252", "ascii": "cp1252"}.get(name, name) if not name.startswith("utf") else None


def _detected(data: bytes) -> str | None:
    """Return the encoding that a detector thinks most likely, western European ones first where its letters fit.

    Of a few accents in a short text no detector can tell one European code page from another.
    """
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines)[:_LOOKED_AT]
    high = [byte for byte in sample if byte > 0x7F]
    best = next((match for match in from_bytes(sample) if not _spread(match.encoding)), None)
    found = best.encoding if best is not None else None
    if found is None or found.startswith(_EUROPEAN) or len(high) < 16:
        for encoding in _WESTERN:
            try:
                if set(bytes(high).decode(encoding)) <= _LETTERS:
                    return encoding
            except UnicodeDecodeError:
                continue
    return found


def _spread(encoding: str) -> bool:
    """Whether an encoding is none that files are written in without saying so."""
    return encoding.startswith(("utf_16", "utf_32", "utf_7", "cp037", "cp500", "cp1026", "cp1140", "cp273", "cp424"))
