"""The TLS certificate of a server and its key, read again when their files change. Open connections keep the old one."""

from __future__ import annotations

import ssl
from pathlib import Path

from muntin.errors import DataError


class Certificate:
    """A certificate and its key, two PEM files. Raises DataError if they cannot be used.

    `context`: for new connections; changed on the event loop only. `pem`: (key, certificate), as grpc takes them.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.pem = b"", b""
        self._loaded_state: object = None
        self.load()

    @property
    def files(self) -> tuple[Path, Path]:
        """Files of the certificate and its key."""
        return self._files

    def changed(self) -> bool:
        """Return True if the files have changed since the last `load`."""
        return self._state() != self._loaded_state

    def load(self) -> None:
        """Load the files. Raises DataError if they cannot be used, and keeps the old certificate."""
        self._loaded_state = self._state()
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a trial: the two files may not belong together
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
        """Return a value that is equal for equal states of the files; None if one is missing."""
        try:
            return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in (file.stat() for file in self._files))
        except OSError:
            return None


def _no_passphrase() -> str:
    """Refuse a key with a passphrase; without this function OpenSSL would ask for it on the terminal."""
    raise DataError("the TLS key has a passphrase, and nobody is there to say it: give a key without one (openssl pkey -in KEY -out PLAIN)")
