"""A worker process of our own engine: started from its command line, served by `worker.loop`, and its exit code."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Sequence

import zmq

from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.messages import Hello
from kvasir.worker.dial import check_hello, open_socket
from kvasir.worker.engine.engine import Engine
from kvasir.worker.events.kv_events import KvEvents
from kvasir.worker.events.publisher import KvPublisher
from kvasir.worker.log import log
from kvasir.worker.loop import BYE_TIMEOUT_S, EXIT_REFUSED, Worker
from kvasir.worker.options import Options, parse_options
from kvasir.worker.startup import build

STDIN_FD = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker process; return its exit code: 0 drained or left alone, 1 sick, 2 not able to start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    try:
        options = parse_options(argv)
        engine, hello = build(options)
        check_hello(hello)
        with open_socket(context, options.gateway) as socket:
            return _serve(options, engine, hello, socket)
    except ConfigurationError as error:
        log("cannot_start", error=error.message)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
    finally:
        context.term()


def _serve(options: Options, engine: Engine, hello: Hello, socket: zmq.Socket[bytes]) -> int:
    signal_fd = _catch_signals()
    limits = hello.limits
    events = _open_events(options, engine)
    log(
        "ready",
        worker=hello.worker_id,
        model=hello.model,
        device=hello.device,
        attention=hello.attention,
        dtype=hello.dtype,
        num_blocks=hello.num_blocks,
        max_context=limits.max_context,
        max_requests=limits.max_requests,
        gateway=options.gateway,
    )
    worker = Worker(
        engine,
        hello,
        socket,
        signal_fd=signal_fd,
        stdin_fd=STDIN_FD if options.exit_with_stdin else None,
        drain_s=options.drain_s,
        events=events,
    )
    gc.collect()
    gc.freeze()  # weights and blocks live as long as the process: the collector need not look at them again
    try:
        exit_code = worker.run()
    finally:
        if events is not None:
            events.outlet.close()
    socket.setsockopt(zmq.LINGER, int(1000 * BYE_TIMEOUT_S))  # for the last words, on their way already
    return exit_code


def _open_events(options: Options, engine: Engine) -> KvEvents | None:
    """Begin to publish the engine's block events if that is asked for."""
    if options.kv_events is None:
        return None
    events = KvEvents(engine.cache, options.kv_form, KvPublisher(options.kv_events, options.kv_form))
    engine.on_blocks = events.on_step
    log("kv_events", endpoint=options.kv_events.endpoint, curve=options.kv_events.secret_key is not None)
    return events


def _catch_signals() -> int:
    """Turn SIGTERM and SIGINT into bytes on a pipe, so that one poll waits for everything; return its reading end."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return read_fd
