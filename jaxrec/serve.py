"""Serves an exported model: `python -m jaxrec.serve --model=exports/mine --port=8000`.

--model is a version, or a directory of versions, of which the newest answers; newer ones are taken into use as they
come. The page at / is for trying it, /docs and /openapi.json describe the interface, /v2/health/ready and /metrics are
for those who watch. docs/serving.md says the rest.

    python -m jaxrec.export --workdir=runs/quickstart --out=exports/quickstart --histories
    python -m jaxrec.serve --model=exports/quickstart
    curl -s localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"history": [1, 260], "k": 5}'
"""

import argparse
import gc
import ipaddress
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import threadpoolctl
import uvicorn
import uvloop

from jaxrec.core.log import failed, start_logging
from jaxrec.serving.app import make_app
from jaxrec.serving.candidates import COLUMNS, SOURCES, Sources
from jaxrec.serving.connections import bounded_connections
from jaxrec.serving.engine import Engine
from jaxrec.serving.exploration import exploration_of
from jaxrec.serving.formula import Formula
from jaxrec.serving.graph import GraphRules
from jaxrec.serving.guard import Limits
from jaxrec.serving.measures import Measures
from jaxrec.serving.precompile import keep_programs
from jaxrec.serving.service import Service, ServiceOptions
from jaxrec.serving.stores import open_store
from jaxrec.serving.versions import Watcher

Number = TypeVar("Number", int, float)
TOKEN_VARIABLE = "JAXREC_TOKEN"


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    given = parse_arguments(arguments)
    start_logging()
    try:
        check_options(given)
        limits = limits_of(given, os.environ.get(TOKEN_VARIABLE, ""))
        uvloop.run(serve(given, limits))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed(error)
    except KeyboardInterrupt:  # what waited was answered
        return 128 + signal.SIGINT
    return 0


async def serve(given: argparse.Namespace, limits: Limits) -> None:
    """Loads, answers until it is told to stop, and finishes what waits."""
    keep_programs()
    measures = Measures()
    shares = dict(given.share)
    exploration = exploration_of(given.explore)
    options = ServiceOptions(
        deadline_ms=given.deadline_ms,
        explore=exploration is not None,
        shares=shares,
        shadow=given.shadow,
    )
    engine = Engine(
        sources=Sources.parse(given.candidates),
        formula=Formula.parse(formula_text(given.formula)),
        exploration=exploration,
        prerequisites=None if given.graph is None else GraphRules.read(given.graph, given.needs),
    )
    service = Service(open_store(given.state), engine, options, measures)
    watcher = Watcher(service, given.model, given.watch_seconds)
    await watcher.load_first({*shares, *filter(None, [given.shadow])})
    config = uvicorn.Config(
        make_app(service, limits, measures),
        host=given.host,
        port=given.port,
        ssl_certfile=given.tls_certificate,
        ssl_keyfile=given.tls_key,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        http=bounded_connections(limits),
        ws="none",
        proxy_headers=False,  # else any client names its own address, and escapes the limit of its rate
    )
    config.load()
    server = Server(config, service.live.newest.version.name)
    share_the_interpreter()
    watcher.start()
    # Uvicorn stops at SIGTERM, and raises it again when it has: what comes after would not be done.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        await server.serve()
    finally:
        await watcher.stop()


class Server(uvicorn.Server):
    """Says where it answers once it does."""

    def __init__(self, config: uvicorn.Config, version: str):
        super().__init__(config)
        self._version = version

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens.

        Raises:
          OSError: it cannot.
        """
        host, port = self.config.host, self.config.port
        try:
            await super().startup(sockets)
        except SystemExit as error:  # the reason is logged
            raise OSError(
                f"the server cannot listen on --host={host} --port={port}; choose another port, or an address of this "
                "machine."
            ) from error
        scheme = "https" if self.config.is_ssl else "http"
        print(f"version {self._version} answers at {scheme}://{in_url(host)}:{port}/", flush=True)


def in_url(host: str) -> str:
    """A host as addresses write it."""
    return f"[{host}]" if ":" in host else host


def formula_text(given: str) -> str:
    """A formula, or that of a file: @FILE."""
    return Path(given[1:]).read_text(encoding="utf-8").strip() if given.startswith("@") else given


def share_the_interpreter() -> None:
    """Keeps what else the process does from holding up requests; call it when everything is loaded.

    Threads take turns every half a millisecond instead of every five. The garbage collector passes over what is there
    to stay, and looks at the rest less often: a collection of everything stops all threads for a tenth of a second.
    Products of small matrices are not dealt to threads, which would wait for each other.
    """
    threadpoolctl.threadpool_limits(1, user_api="blas")
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def check_options(given: argparse.Namespace) -> None:
    """Raises ValueError where options do not fit each other."""
    for one, other in (("graph", "needs"), ("tls_certificate", "tls_key")):
        if bool(getattr(given, one)) != bool(getattr(given, other)):
            names = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise ValueError(f"{' and '.join(names)} belong together; give both, or none.")
    if given.shadow in dict(given.share):
        raise ValueError(f"--shadow={given.shadow} is never heard, and has a --share; leave one of them out.")


def limits_of(given: argparse.Namespace, token: str) -> Limits:
    """Raises ValueError where the server would be open to others without a token."""
    if not token and not is_loopback(given.host):
        raise ValueError(
            f"--host={given.host} can be reached by others: set a token in the variable {TOKEN_VARIABLE}, or use "
            "--host=127.0.0.1."
        )
    names = ("localhost", "127.0.0.1", "[::1]", in_url(given.host))
    return Limits(
        token=token,
        requests_per_second=given.requests_per_second,
        connections=given.most_connections,
        hosts=() if token else tuple(name.lower() for name in (*names, *given.host_name)),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(
        ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in found
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model", metavar="DIR", type=Path, required=True, help="an exported version, or a directory of them"
    )
    add(
        "--state",
        metavar="WHERE",
        default="jaxrec_state.db",
        help="SQLite file, or redis://, rediss://, unix://",
    )
    add(
        "--candidates",
        metavar="SOURCE=N",
        action="append",
        default=[],
        help=f"candidates beside the model's: {', '.join(SOURCES[1:])}; the first three of "
        "versions that were exported with --candidates=SOURCE",
    )
    add(
        "--formula",
        default="score",
        help=f"what lists are ordered by, over {', '.join(COLUMNS)}, and what the version's task heads predict: a "
        "behaviour's probability by its name, value; @FILE reads one, see jaxrec.blend",
    )
    add(
        "--graph",
        metavar="FILE",
        type=Path,
        help="a knowledge graph, Parquet or CSV with the columns head, relation, tail; with --needs",
    )
    add(
        "--needs",
        metavar="RELATION",
        default="",
        help="an item is kept from those whose history lacks the tail of its edge; ~RELATION: the tail needs the head",
    )
    add(
        "--explore",
        metavar="HOW",
        default="0",
        help="a chance that a place of a list tries another item, or thompson:SCALE",
    )
    add(
        "--share",
        metavar="VERSION=S",
        type=share,
        action="append",
        default=[],
        help="a version's share of users",
    )
    add("--shadow", metavar="VERSION", default="", help="a version that is asked too, and never heard")
    add("--deadline-ms", metavar="MS", type=_at_least(1), default=2_000, help="of requests that name none")
    add(
        "--watch-seconds",
        metavar="S",
        type=_at_least(0.05),
        default=10.0,
        help="between looks for newer versions",
    )
    _add_network_arguments(parser)
    return parser.parse_args(arguments)


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server listens, and what it bears."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback want a token")
    add(
        "--host-name",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name that requests may call the server by, where no token is set: behind a proxy",
    )
    add("--port", metavar="P", type=_at_least(0, most=65_535), default=8000, help="port (default 8000)")
    add(
        "--requests-per-second",
        metavar="R",
        type=_at_least(0.0),
        default=0.0,
        help="of one client; 0 = no limit",
    )
    add("--most-connections", metavar="N", type=_at_least(1), default=1_000, help="at once")
    add("--tls-certificate", metavar="FILE", help="PEM; with --tls-key")
    add("--tls-key", metavar="FILE", help="PEM")


def _at_least(least: Number, most: float = math.inf) -> Callable[[str], Number]:
    """A finite number of this one's type."""

    def number(text: str) -> Number:
        found = type(least)(text)
        if not least <= found <= most or found == math.inf:
            bound = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text} must be a number of at least {least}{bound}.")
        return found

    return number


def share(text: str) -> tuple[str, float]:
    """VERSION=SHARE."""
    name, separator, value = text.partition("=")
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not separator or not name or not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: say VERSION=SHARE with a share above 0.")
    return name, found


if __name__ == "__main__":
    sys.exit(main())
