"""Read files that travel inside a message: decoded and converted as files on disk are, kinds without text refused."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import replace

from focus_core.errors import NotTextError
from focus_core.text.converters import KINDS
from focus_core.text.corpus import Document, document_of

_NO_TEXT = ("image/", "audio/", "video/", "font/")


def attached_document(name: str | None, data: bytes | str, mime: str | None = None) -> Document:
    """Return the document of an attached file.

    Args:
        name: its title, the document's id. ``None``: made from its bytes.
        data: its bytes, or base64 of them, or a data URL.
        mime: its media type, if it is known.

    Raises:
        NotTextError: it holds no text, or is not base64.
        CorpusError: it needs a converter that is not installed.
    """
    shown = f"attached file {name or ''!r}"
    if isinstance(data, str):
        head, _, body = data.partition(",") if data.startswith("data:") else ("", "", data)
        mime = mime or head.removeprefix("data:").partition(";")[0] or None
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise NotTextError(f"{shown} is not base64 ({error}); encode it again") from error
    if mime is not None and mime.startswith(_NO_TEXT):
        raise NotTextError(f"{shown} is {mime}, which holds no text; leave it out")
    kind = mime if mime in KINDS.values() else None
    document = document_of(name or "attached file", data, kind=kind)
    digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).hexdigest()
    return replace(document, id=name or f"attachment-{digest[:8]}", source={})
