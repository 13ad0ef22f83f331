"""The file of a form (multipart/form-data, RFC 7578), as `curl -F file=@photo.jpg` and web pages send it.

A form has one part, whose name and type do not matter. Its delimiter is searched in one pass in C, whatever the body holds; a parser that
calls back for each piece would take long for a body of many pieces.
"""

from __future__ import annotations

import re
from email.message import Message

from muntin.serving.protocol.messages import ProtocolError, shown
from muntin.serving.protocol.tensors import Buffer

FORM = "multipart/form-data"
MAX_FIELDS = 1 << 12
"""Maximum bytes of the header fields of the part."""
MAX_TYPE = 256
"""Maximum characters of the content type: the time to parse it grows with their square."""
_ADVICE = "send one file, as curl does with -F file=@FILE, or the picture alone, with --data-binary @FILE"


def is_form(content_type: str) -> bool:
    """Return True for the type of a form with files."""
    return content_type.partition(";")[0].strip().lower() == FORM


def form_file(body: Buffer, content_type: str) -> bytes:
    """Return the content of the only part of a form. Raises ProtocolError 400 for several parts and for a body that is no form."""
    delimiter = b"--" + _boundary(content_type)
    view = memoryview(body).cast("B")
    part = view[len(delimiter) :]
    if bytes(view[: len(delimiter)]) != delimiter or bytes(part[:2]) != b"\r\n":
        raise ProtocolError(f"the form does not begin with its boundary: {_ADVICE}")
    fields = re.search(rb"\r\n\r\n", part[:MAX_FIELDS])
    if fields is None:
        raise ProtocolError(f"the header fields of the form's part do not end within {MAX_FIELDS:,} bytes: {_ADVICE}")
    content = part[fields.end() :]
    end = re.search(re.escape(b"\r\n" + delimiter), content)
    if end is None:
        raise ProtocolError(f"the form ends before its closing boundary: {_ADVICE}")
    if bytes(content[end.end() : end.end() + 2]) != b"--":
        raise ProtocolError(f"the form has several parts: {_ADVICE}")
    return bytes(content[: end.start()])


def _boundary(content_type: str) -> bytes:
    header = Message()
    header["content-type"] = content_type[: MAX_TYPE + 1]
    boundary = header.get_boundary("")
    if not boundary or not boundary.isascii() or len(content_type) > MAX_TYPE:
        raise ProtocolError(f"content-type {shown(content_type)}: name the boundary, in {MAX_TYPE} ASCII characters at most")
    return boundary.encode()
