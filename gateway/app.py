"""The gateway put together: who is started in which order, and how it all stops.

Three nurseries, one inside the other; their order is the shutdown order. Innermost the edges, then the core's actors
(worker port, ticker), outermost the local workers. SIGINT or SIGTERM starts the drain: the edges refuse what is new,
what runs is finished within `drain_s`, then edges, core and workers end in this order. A second signal ends at once.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import trio
import zmq

from kvasir.gateway.admin.admin import Admin, open_admin_link
from kvasir.gateway.admin.expiry import end_expired
from kvasir.gateway.admin.metrics import render_metrics
from kvasir.gateway.admin.views import Gateway
from kvasir.gateway.config import GatewayConfig, ModelConfig
from kvasir.gateway.core.admission import Bill
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.gateway.edges.cors import Cors
from kvasir.gateway.edges.grammar_check import GrammarCheck, GrammarModel
from kvasir.gateway.edges.http_api import HttpApi
from kvasir.gateway.edges.prepare import Preparer
from kvasir.gateway.edges.published import Published
from kvasir.gateway.edges.zmq_edge import ZmqEdge
from kvasir.gateway.http.limits import HttpLimits
from kvasir.gateway.http.server import HttpServer, open_listeners
from kvasir.gateway.ledger.accounts import load_accounts
from kvasir.gateway.ledger.database import open_ledger
from kvasir.gateway.ledger.writer import LedgerWriter
from kvasir.gateway.lock import hold_lock
from kvasir.gateway.log import AccessLog, log, no_log
from kvasir.gateway.tenants.directory import TenantDirectory
from kvasir.gateway.tenants.quotas import kv_quotas
from kvasir.gateway.tenants.store import open_store
from kvasir.gateway.text.model_text import ModelText, load_text
from kvasir.gateway.workers.port import WorkerPort
from kvasir.gateway.workers.supervisor import Supervisor
from kvasir.protocol.address import is_loopback
from kvasir.protocol.client_messages import MAX_CLIENT_FRAME_BYTES
from kvasir.protocol.errors import KvasirError
from kvasir.protocol.link import open_router
from kvasir.protocol.prefix import derive_namespace, derive_root
from kvasir.protocol.profile import LinkProfile

RESERVED_DESCRIPTORS = 256  # for ZeroMQ's peers, workers' pipes, files: libzmq aborts when accept finds none left
LAST_COMMIT_S = 5.0
LAST_WORDS_MS = 500  # for what the last requests got before a stop
ORACLE = "oracle:"  # the test model: no folder, no tokenizer


async def serve(config: GatewayConfig) -> None:
    """Run a gateway until a signal or `kvasir`'s drain command ends it.

    Raises:
        ConfigurationError: it cannot start: a directory, socket, database or model folder is not as it must be, or
            all local workers refused to start.
    """
    http_limits = HttpLimits(max_connections=_max_http_connections())
    with ExitStack() as stack:
        stack.enter_context(hold_lock(config.state_dir))
        if config.run_dir != config.state_dir:
            stack.enter_context(hold_lock(config.run_dir))
        _make_socket_folders(config)
        store = open_store(config.state_dir, config.database)
        stack.callback(store.close)
        context: zmq.Context[zmq.Socket[bytes]] = stack.enter_context(_zmq_context())
        texts = {model.name: _load_text(model) for model in config.models}
        directory = TenantDirectory(store.secret, store.load())
        database = open_ledger(config.state_dir, config.database)
        stack.callback(database.close)
        token = trio.lowlevel.current_trio_token()

        def tell(bills: Sequence[Bill], error: KvasirError | None) -> None:
            with suppress(trio.RunFinishedError):  # a disk that hung until after the end
                token.run_sync_soon(core.reserved, bills, error)

        ledger = LedgerWriter(database, tell)
        stack.callback(ledger.stop, LAST_COMMIT_S)  # also where the end comes at once
        billing = Billing(directory.terms, directory.price, ledger)
        load_accounts(database, billing.admission, time.time())

        port = WorkerPort(open_router(context, [config.worker_endpoint]))
        core = Core(
            _core_config(config, store.secret),
            port.send,
            trio.current_time,
            epoch=os.urandom(8),
            notify=lambda notice: supervisor.notice(notice),
            billing=billing,
        )
        core.kv.set_quotas(lambda num_blocks: kv_quotas(directory.tenants(), num_blocks))
        supervisor = Supervisor(config, core)
        published = Published(core, directory, texts, store.secret, config.block_size)
        published.warm()
        core.kv.set_pins(published.pins)
        grammars = GrammarCheck(
            {
                model.name: GrammarModel(model.path, text.vocab_size, text.eos_token_ids)
                for model in config.models
                if (text := texts[model.name]) is not None
            }
        )
        preparer = Preparer(core, published, texts, store.secret, config.block_size, grammars=grammars)
        client_link = open_router(context, config.client_endpoints, LinkProfile(max_frame_bytes=MAX_CLIENT_FRAME_BYTES))
        stack.callback(client_link.close, linger_ms=LAST_WORDS_MS)  # runs before the context ends, and is waited for
        access_log = AccessLog()
        access = access_log if config.access_log else no_log
        edge = ZmqEdge(client_link, core, preparer, directory, access=access)
        api = HttpApi(
            core,
            preparer,
            directory,
            lambda: render_metrics(core.statistics(), server.statistics, ledger.statistics()),
            metrics_token=config.metrics_token,
            access=access,
            cors=Cors(config.cors_origins),
            version=_version(),
        )
        server = HttpServer(api, http_limits)
        listeners = [] if config.http is None else await open_listeners(*config.http)
        stopping = trio.Event()
        views = Gateway(
            config,
            core,
            published,
            supervisor,
            directory,
            billing,
            stopping.set,
            max_http_connections=http_limits.max_connections,
        )
        admin = Admin(open_admin_link(context, config.admin_endpoint), directory, store, views, version=_version())

        async with trio.open_nursery() as outer:
            outer.start_soon(_watch_signals, stopping, outer.cancel_scope)
            async with supervisor.running(), trio.open_nursery() as middle:
                ledger.start()
                await middle.start(port.run, core)
                middle.start_soon(access_log.run)
                middle.start_soon(end_expired, directory, views)
                async with trio.open_nursery() as edges:
                    await edges.start(admin.run)
                    edges.start_soon(grammars.run)
                    await edges.start(edge.run)
                    if listeners:
                        await edges.start(server.run, listeners)
                    gc.collect()
                    gc.freeze()  # what lives as long as the process need not be looked at again
                    if config.http is not None and not is_loopback(config.http[0]):
                        log("http_is_not_encrypted", advice="put a TLS proxy before it, see docs/tls.md")
                    log("gateway_ready", pid=os.getpid(), **views.endpoints())
                    await stopping.wait()
                    log("draining", unfinished=core.num_unfinished, deadline_s=config.drain_s)
                    core.drain()
                    edge.drain()
                    server.drain()
                    with trio.move_on_after(config.drain_s):
                        while core.num_unfinished or server.statistics.num_open:  # noqa: ASYNC110 two plain counters
                            await trio.sleep(0.05)
                    edge.flush()
                    edges.cancel_scope.cancel()
                with trio.move_on_after(LAST_COMMIT_S, shield=True):
                    await trio.to_thread.run_sync(ledger.stop, LAST_COMMIT_S)
                middle.cancel_scope.cancel()
            outer.cancel_scope.cancel()
    log("stopped")


def _make_socket_folders(config: GatewayConfig) -> None:
    """Give each local socket its folder, which is the gate before it: clients for our group, the others for us alone.

    A folder that is there keeps its mode and group: making it beforehand is how another group is let in.
    """
    for endpoint, mode in (
        (config.admin_endpoint, 0o700),
        (config.worker_endpoint, 0o700),
        (config.client_endpoints[0], 0o750),
    ):
        Path(endpoint.removeprefix("ipc://")).parent.mkdir(mode, exist_ok=True)


def _max_http_connections() -> int:
    """Raise the bound of open descriptors as far as we may; return how many of them HTTP clients may take."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # "unlimited" can be more than the kernel gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    wanted = HttpLimits().max_connections
    if limit == resource.RLIM_INFINITY:
        return wanted
    found = max(1, min(wanted, limit - min(RESERVED_DESCRIPTORS, limit // 2)))
    if found < wanted:
        log("few_descriptors", limit=limit, max_http_connections=found, remedy="raise `ulimit -Hn` or LimitNOFILE")
    return found


def _core_config(config: GatewayConfig, secret: bytes) -> CoreConfig:
    return CoreConfig(
        public_namespace=derive_namespace(secret, "public"),
        root=partial(derive_root, secret),
        block_size=config.block_size,
        models=frozenset(model.name for model in config.models),
        liveness=LivenessConfig(stall_s=config.stall_s),
    )


def _load_text(model: ModelConfig) -> ModelText | None:
    return None if str(model.path).startswith(ORACLE) else load_text(model.path, model.tool_parser)


async def _watch_signals(stopping: trio.Event, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        async for number in received:
            log("signal", name=signal.Signals(number).name)
            if stopping.is_set():
                scope.cancel()  # the second one: no more waiting
            stopping.set()


@contextmanager
def _zmq_context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


def _version() -> str:
    try:
        return version("kvasir-gateway")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
