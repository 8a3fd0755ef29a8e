# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl metrics: the measures of a machine in Prometheus' text format, printed once or served.

    pkramctl metrics                                  for a textfile collector, or to look at
    pkramctl metrics --listen unix:/run/pkramfs.sock  for who may open the socket, which is its user's alone
    pkramctl metrics --listen 127.0.0.1:9464          for a Prometheus on this host

Only a loopback address is listened on: whoever wants more puts a proxy in front, which can ask who is asking. Nothing
is cached, and nothing runs between two scrapes. SIGINT and SIGTERM end it, and remove the socket.
"""

import argparse
import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, render
from pkramfs.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_LOOPBACK = {"127.0.0.1": socket.AF_INET, "localhost": socket.AF_INET, "[::1]": socket.AF_INET6}
_SOCKET_MODE = 0o600


def add(made: argparse.ArgumentParser) -> None:
    """Add the option of `metrics` to its parser."""
    text = "serve them over HTTP, on unix:PATH or 127.0.0.1:PORT"
    made.add_argument("--listen", metavar="WHERE", type=address, help=text)


def address(text: str) -> tuple[int, Any]:
    """Parse `unix:PATH`, `127.0.0.1:PORT` or `[::1]:PORT` into a family and an address."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return socket.AF_UNIX, rest
    host, _, port = text.rpartition(":")
    if host not in _LOOPBACK:
        raise argparse.ArgumentTypeError(f"invalid address {text!r}: write unix:PATH or 127.0.0.1:PORT")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"invalid port {port!r}: give 1 to 65535, or 0 for any")
    return _LOOPBACK[host], ("::1" if host == "[::1]" else "127.0.0.1", int(port))


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl metrics`."""
    from prometheus_client import CollectorRegistry, generate_latest

    from pkramfs.cli.measures import Measures

    registry = CollectorRegistry()
    registry.register(Measures(arguments.machine(args)))
    if args.listen is None:
        render.emit(generate_latest(registry).decode())
    else:
        family, where = args.listen
        with _server(family, where, registry) as server:
            render.tell(f"serving metrics on {_name(server)}")
            server.serve_forever()


class _Server(ThreadingHTTPServer):
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
def _server(family: int, where: Any, registry: "CollectorRegistry") -> Iterator[_Server]:
    """Give a server, and remove its socket afterwards; UsageError if it cannot listen there."""
    from prometheus_client.exposition import MetricsHandler

    class Handler(MetricsHandler):
        """A handler that knows no address of a client: that of a Unix socket has no name."""

        def address_string(self) -> str:
            return "local"

    if family == socket.AF_UNIX:
        _clear(where)
    before = os.umask(0o777 & ~_SOCKET_MODE)
    try:
        server = _Server(family, where, Handler.factory(registry))
    except OSError as error:
        raise UsageError(f"cannot listen on {where}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    try:
        yield server
    finally:
        server.server_close()
        if family == socket.AF_UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(where)


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on any more; leave everything else to bind(2), which refuses."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except OSError:
        return  # nothing is there, or bind says what is wrong
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass  # bind says what is wrong


def _name(server: _Server) -> str:
    where: Any = server.server_address
    return f"unix:{where}" if server.address_family == socket.AF_UNIX else f"http://{where[0]}:{where[1]}/metrics"
