"""The addresses and ports that a server listens on."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack

from muntin.errors import DataError

_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""Errors for an address that this machine does not have."""


def check_ports(host: str, http_port: int, grpc_port: int | None) -> tuple[list[str], int]:
    """Return (addresses of the host, HTTP port, never 0). Raises DataError for a taken port, before a model is loaded.

    The ports are closed again, so a client that connects meanwhile is refused, not left waiting.
    """
    with ExitStack() as opened:  # the first port stays open while the second is tried: both may be the same
        http = _open(opened, "http", host, http_port)
        if grpc_port is not None:
            _open(opened, "grpc", host, grpc_port)
        return [_address_of(sock) for sock in http], http[0].getsockname()[1]


def _open(opened: ExitStack, protocol: str, host: str, port: int) -> list[socket.socket]:
    """Open one socket for each address of the host, all on one port. Addresses that this machine lacks are skipped if others remain."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            both_families = address[0] == "::" and socket.has_dualstack_ipv6()
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sock = socket.create_server((address[0], chosen, *address[2:]), family=family, dualstack_ipv6=both_families)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
            else:
                sockets.append(opened.enter_context(sock))
        if missing is not None and not sockets:
            raise missing
    except OSError as error:
        raise DataError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --{protocol}-port or --host"
        ) from error
    return sockets


def _address_of(sock: socket.socket) -> str:
    """The address, with its interface where that is part of it (fe80::1%eth0)."""
    address, _, *more = sock.getsockname()
    return f"{address}%{socket.if_indextoname(more[1])}" if more and more[1] else str(address)
