"""The certificate that a server shows, and its key: both as they lie on the disk, so that who renews them need not end it.

Connections that are open keep what they were begun with.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from muntin.errors import DataError


class Certificate:
    """Two files in PEM. Raises DataError where they cannot be used. `context`: for new connections; on the event loop alone."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.pem = b"", b""
        """(key, certificate), as grpc takes them."""
        self._seen: object = None
        self.load()

    @property
    def files(self) -> tuple[Path, Path]:
        """The certificate's file and its key's."""
        return self._files

    def changed(self) -> bool:
        """Whether the files are others than when they were tried last."""
        return self._state() != self._seen

    def load(self) -> None:
        """Shows what the files hold from now on. Raises DataError where that cannot be used; what was shown before is still shown then."""
        self._seen = self._state()
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # it may be one half of two that belong together
            certificate, key = (file.read_bytes() for file in self._files)
            if self.changed():
                raise OSError("it is being written")
            self._load(self.context)
        except OSError as error:  # an SSLError is one
            raise DataError(f"the TLS certificate or its key cannot be used ({error}): give both in PEM") from error
        self.pem = key, certificate

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(*self._files, password=_no_passphrase)

    def _state(self) -> object:
        """What tells one state of the files from another; None where there is none."""
        try:
            return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in (file.stat() for file in self._files))
        except OSError:
            return None


def _no_passphrase() -> str:
    """Else OpenSSL would ask whoever sits before the terminal."""
    raise DataError("the TLS key has a passphrase, and nobody is there to say it: give a key without one (openssl pkey -in KEY -out PLAIN)")
