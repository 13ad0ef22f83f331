"""The file of a form, and bodies that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.serving.http.forms import MAX_TYPE, form_file, is_form
from muntin.serving.protocol.messages import ProtocolError

TYPE = "multipart/form-data; boundary=----x7"
FILE = b"\x89PNG\r\n\r\n------x\r\n"
HEAD = b'------x7\r\nContent-Disposition: form-data; name="file"; filename="M\xc3\xbcll.png"\r\nContent-Type: image/png\r\n\r\n'
END = b"\r\n------x7--\r\n"


@pytest.mark.parametrize("kind", [TYPE, 'Multipart/Form-Data ;charset=x; boundary="----x7"'])
@pytest.mark.parametrize("content", [FILE, b"", b"\r\n"])
@pytest.mark.parametrize("head", [HEAD, b"------x7\r\n\r\n"])
def test_file(kind: str, content: bytes, head: bytes) -> None:
    assert is_form(kind)
    assert form_file(head + content + END, kind) == content
    assert form_file(memoryview(bytearray(head + content + END)), kind) == content


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (HEAD + FILE + b"\r\n" + HEAD + FILE + END, TYPE, "several parts: send one file, as curl does with -F file=@FILE"),
        (HEAD + FILE, TYPE, "ends before its closing boundary"),
        (b"", TYPE, "does not begin with its boundary"),
        (FILE, TYPE, "does not begin with its boundary"),
        (END[2:], TYPE, "does not begin with its boundary"),  # no part
        (HEAD[:20] + b"x" * 5000 + b"\r\n\r\n" + FILE + END, TYPE, "do not end within 4,096 bytes"),
        (HEAD + FILE + END, "multipart/form-data", "name the boundary"),
        (HEAD + FILE + END, "multipart/form-data; boundary=\xfc", "name the boundary"),
        (HEAD + FILE + END, TYPE + '";' * MAX_TYPE, "256 ASCII characters at most"),
    ],
)
def test_bodies_that_are_no_form(body: bytes, kind: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        form_file(body, kind)
    assert caught.value.status == 400


@given(body=st.binary(max_size=60), start=st.sampled_from([b"", b"--b", b"--b\r\n", b"--b\r\n\r\n"]), kind=st.text(max_size=40))
def test_any_body(body: bytes, start: bytes, kind: str) -> None:
    for content_type in ("multipart/form-data; boundary=b", f"multipart/form-data; boundary={kind}", kind):
        try:
            content = form_file(start + body + b"\r\n--b--", content_type)
        except ProtocolError:
            continue
        assert content in body
