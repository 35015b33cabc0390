"""The listening socket, taken before the model is loaded."""

from __future__ import annotations

import errno
import socket


class AddressError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def bind_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to `host`:`port`, not yet listening; port 0 takes a free one.

    Raises:
        AddressError: The port is taken or not permitted, or the host is not of this machine.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressError(
            f"cannot resolve host {host!r} ({error}); pass --host with an address of this machine, "
            "e.g. 127.0.0.1 or 0.0.0.0"
        ) from None
    family, kind, protocol, _, address = addresses[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _address_error(error, host, port) from None
    return sock


def listen(sock: socket.socket, backlog: int = 2048) -> None:
    """Start listening.

    Raises:
        AddressError: Another process has begun to listen on the port since it was bound.
    """
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(backlog)
    except OSError as error:
        raise _address_error(error, host, port) from None


def base_url(sock: socket.socket) -> str:
    """The URL under which a client on this machine reaches `sock`."""
    host, port = sock.getsockname()[:2]
    if host == "0.0.0.0":
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _address_error(error: OSError, host: str, port: int) -> AddressError:
    if error.errno == errno.EADDRINUSE:
        return AddressError(
            f"port {port} on {host} is already in use; stop the process that uses it, or pass "
            "another one with --port (--port 0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return AddressError(
            f"no permission to listen on port {port}; pass --port with a number above 1023"
        )
    return AddressError(
        f"cannot listen on {host}:{port} ({error.strerror or error}); pass --host with an address "
        "of this machine, e.g. 127.0.0.1 or 0.0.0.0"
    )
