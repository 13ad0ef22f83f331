"""A certificate on the disk. test_server.py shows renewed ones to clients."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from muntin.errors import DataError
from muntin.serving.security.tls import Certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")


def make(path: Path) -> tuple[Path, Path]:
    certificate, key = path / "certificate.pem", path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_unusable_files_keep_the_certificate(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files, others = make(tmp_path), make(tmp_path / "other")
    certificate = Certificate(*files)
    before = certificate.pem
    assert before == (files[1].read_bytes(), files[0].read_bytes())
    assert not certificate.changed()
    shutil.copy(others[0], files[0])
    for _ in range(2):
        assert certificate.changed()
        with pytest.raises(DataError, match="cannot be used"):
            certificate.load()
        assert not certificate.changed()  # so that it is reported once
        files[0].write_text("nonsense")
    files[0].unlink()
    assert certificate.changed()
    with pytest.raises(DataError, match=r"cannot be used.*No such file"):
        certificate.load()
    assert certificate.pem is before
    for file, other in zip(files, others, strict=True):
        shutil.copy(other, file)
    assert certificate.changed()
    certificate.load()
    assert certificate.pem == (others[1].read_bytes(), others[0].read_bytes())
