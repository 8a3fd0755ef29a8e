# SPDX-License-Identifier: GPL-2.0-or-later
"""Serve metrics over HTTP, on a Unix socket or on the loopback, until a signal ends it.

prometheus-client has the handler, and servers for TCP; this adds the Unix socket, which is its user's alone.

Kernel: unix(7)
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from pkramfs.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SOCKET_MODE = 0o600


class Server(ThreadingHTTPServer):
    """An HTTP server on a socket of any family. A scrape that hangs does not keep it from ending."""

    daemon_threads = True

    def __init__(self, family: int, where: Any, handler: Any) -> None:
        self.address_family = socket.AddressFamily(family)
        super().__init__(where, handler)

    def server_bind(self) -> None:
        """Bind without asking for the name of the host."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


@contextmanager
def server(where: Any, registry: "CollectorRegistry") -> Iterator[Server]:
    """Give a server, and remove its socket afterwards; UsageError if it cannot listen there."""
    from prometheus_client.exposition import MetricsHandler

    class Handler(MetricsHandler):
        """A handler that knows no address of a client: that of a Unix socket has no name."""

        def address_string(self) -> str:
            return "local"

    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    if family == socket.AF_UNIX:
        _clear(where)
    before = os.umask(0o777 & ~_SOCKET_MODE)
    try:
        made = Server(family, where, Handler.factory(registry))
    except OSError as error:
        place = where if isinstance(where, str) else f"{where[0]}:{where[1]}"
        raise UsageError(f"cannot listen on {place}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    try:
        yield made
    finally:
        made.server_close()
        if family == socket.AF_UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(where)


def _clear(path: str) -> None:
    """Remove a socket without a listener; leave everything else to bind(2), which refuses."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except OSError:
        return  # nothing is there, or bind reports the fault
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass  # bind reports the fault


def name(server: Server) -> str:
    """Return where a server listens, as a URL."""
    where: Any = server.server_address
    return f"unix:{where}" if server.address_family == socket.AF_UNIX else f"http://{where[0]}:{where[1]}/metrics"
