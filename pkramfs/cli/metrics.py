# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl metrics: the figures of a machine in Prometheus' text format, printed once or served.

    pkramctl metrics                                  for a textfile collector, or to look at
    pkramctl metrics --listen unix:/run/pkramfs.sock  only this user may open the socket
    pkramctl metrics --listen 127.0.0.1:9464          for a Prometheus on this host

It listens on loopback addresses only. For others put a proxy before it, which can authenticate its clients. Nothing
is cached, and nothing runs between two scrapes. SIGINT and SIGTERM end it, and remove the socket.
"""

import argparse
from typing import Any

from pkramfs.cli import arguments, render

_LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "[::1]": "::1"}


def add(made: argparse.ArgumentParser) -> None:
    """Add the option of `metrics` to its parser."""
    text = "serve the figures over HTTP, on unix:PATH or 127.0.0.1:PORT"
    made.add_argument("--listen", metavar="WHERE", type=address, help=text)


def address(text: str) -> Any:
    """Parse `unix:PATH`, `127.0.0.1:PORT` or `[::1]:PORT` into a path, or a host and a port."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return rest
    host, _, port = text.rpartition(":")
    if host not in _LOOPBACK:
        raise argparse.ArgumentTypeError(f"invalid address {text!r}: write unix:PATH or 127.0.0.1:PORT")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"invalid port {port!r}: give 1 to 65535, or 0 for any")
    return _LOOPBACK[host], int(port)


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl metrics`."""
    from prometheus_client import CollectorRegistry, generate_latest

    from pkramfs.cli.measures import Measures

    registry = CollectorRegistry()
    registry.register(Measures(arguments.machine(args)))
    if args.listen is None:
        render.emit(generate_latest(registry).decode())
    else:
        from pkramfs.cli import serving

        with serving.server(args.listen, registry) as server:
            render.tell(f"serving metrics on {serving.name(server)}")
            server.serve_forever()
