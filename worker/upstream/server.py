"""One upstream server as we find it: its facts, whether it lives, and its three calls. Holds no request."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import trio

from kvasir.protocol.errors import ConfigurationError
from kvasir.worker.log import log
from kvasir.worker.upstream import vllm
from kvasir.worker.upstream.http_client import HttpClient, HttpStream, UpstreamUnreachable
from kvasir.worker.upstream.vllm import EventSource, Metrics, SchedulerLimits, ServedModel

ASK_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 10.0  # for one token, once it says that it is up
LOOK_AGAIN_S = 1.0
COMPLAIN_S = 10.0  # how often to say that it is not up
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server said of itself when it was found. `events`: of our rank; None where it publishes none.

    `has_generate`: it takes and gives token ids by vLLM's own route; else by completions. `has_grammars`: it holds
    answers to grammars in our notation.
    """

    version: str
    model: ServedModel
    metrics: Metrics
    limits: SchedulerLimits
    events: EventSource | None
    has_generate: bool
    has_grammars: bool


class Server:
    """One data-parallel rank of a vLLM server. `rank` None: the server has one only.

    `slots`: how many streams may be open, of all servers that have the same; further ones wait.
    """

    def __init__(
        self,
        client: HttpClient,
        upstream_model: str | None,
        rank: int | None = None,
        *,
        slots: trio.CapacityLimiter | None = None,
    ) -> None:
        if rank is not None:
            client = HttpClient(client.address, {**client.headers, "X-data-parallel-rank": str(rank)})
        self._client = client
        self._wanted = upstream_model
        self._slots = slots or trio.CapacityLimiter(math.inf)
        self.rank = rank

    @property
    def name(self) -> str:
        address = self._client.address
        rank = "" if self.rank is None else f" rank {self.rank}"
        return f"{address.host}:{address.port}{rank}"

    async def find(self) -> Facts:
        """Ask for everything that does not change while the server lives, and have it draw one token.

        Raises:
            UpstreamUnreachable, trio.TooSlowError: it is not up, or its engine draws nothing.
            ConfigurationError: it is no vLLM server, wants another key, or does not serve the model.
        """
        try:
            model = vllm.read_models(await self._get("/v1/models"), self._wanted)
            metrics = await self.metrics()
            sources = vllm.read_event_sources(await self._get("/kv_event_sources", default=b"{}"))
            limits = vllm.read_limits(await self._get("/server_info?config_format=json", default=b"{}"))
            version = msgspec.json.decode(await self._get("/version", default=b"{}"), type=dict[str, str])
        except vllm.UNREADABLE as error:
            raise ConfigurationError(f"{self.name} answers what no vLLM server does: {error}.") from None
        has_generate = await self._probe(model.id)
        events = sources.get(self.rank or 0)
        has_grammars = await self._holds_to_grammars(model.id, has_generate=has_generate)
        return Facts(version.get("version", "unknown"), model, metrics, limits, events, has_generate, has_grammars)

    async def ranks(self) -> list[int | None]:
        """Return the data-parallel ranks of the server; [None] if it has one. Raises as `find`."""
        ranks = vllm.read_ranks((await self._get("/metrics")).decode(errors="replace"))
        return [None] if len(ranks) == 1 else list(ranks)

    async def metrics(self) -> Metrics:
        """Return our rank's figures. Raises as `find`."""
        return vllm.read_metrics((await self._get("/metrics")).decode(errors="replace"), self.rank or 0)

    async def illness(self) -> str | None:
        """Return why the server counts as dead, None if its port says that it lives. Its engine may hang all the same.

        Raises:
            trio.TooSlowError: no answer in time.
        """
        try:
            status, _ = await self._client.ask("GET", "/health", timeout_s=ASK_TIMEOUT_S)
        except UpstreamUnreachable as error:
            return str(error)
        return None if status == 200 else f"{self.name} answers /health with {status}"

    @asynccontextmanager
    async def generate(self, body: bytes, facts: Facts) -> AsyncIterator[HttpStream]:
        """Open the stream of one request, when there is a slot for it."""
        async with self._slots, self._client.open("POST", vllm.route(facts.has_generate), body) as stream:
            yield stream

    async def abort(self, facts: Facts, request_id: str) -> bool:
        """Ask the server to stop a request: its stream then ends by itself. False: it takes no such request."""
        if not facts.has_generate:  # both routes are switched on together
            return False
        try:
            status, _ = await self._client.ask("POST", vllm.ABORT, vllm.abort_body(request_id), timeout_s=ASK_TIMEOUT_S)
        except (UpstreamUnreachable, trio.TooSlowError):
            return False
        return status == 200

    async def _probe(self, model: str) -> bool:
        """Draw one token; return whether vLLM's own route takes it."""
        for has_generate in (True, False):
            status, _ = await self._draw(vllm.probe_body(model, has_generate=has_generate), has_generate)
            if status == 200:
                return has_generate
            if status >= 500:
                raise UpstreamUnreachable(f"{self.name} answers a request for one token with {status}")
        raise ConfigurationError(f"{self.name} takes token ids at neither {vllm.GENERATE} nor {vllm.COMPLETIONS}.")

    async def _holds_to_grammars(self, model: str, *, has_generate: bool) -> bool:
        """Ask for an answer that only a grammar explains; return whether that came."""
        body = vllm.probe_body(model, has_generate=has_generate, has_grammar=True)
        status, answer = await self._draw(body, has_generate)
        if status != 200:
            return False
        try:
            choices = vllm.CHUNKS.decode(answer).choices
        except vllm.UNREADABLE:
            return False
        return bool(choices) and tuple(choices[0].token_ids or ()) == vllm.PROBED

    async def _draw(self, body: bytes, has_generate: bool) -> tuple[int, bytes]:
        return await self._client.ask("POST", vllm.route(has_generate), body, timeout_s=PROBE_TIMEOUT_S)

    async def _get(self, path: str, default: bytes | None = None) -> bytes:
        status, body = await self._client.ask("GET", path, timeout_s=ASK_TIMEOUT_S)
        if status == 200:
            return body
        if status in (401, 403) and default is None:
            raise ConfigurationError(f"{self.name} refuses our key for {path} ({status}); see --api-key-file.")
        if status >= 500 and default is None:
            raise UpstreamUnreachable(f"{self.name} answers {path} with {status}")
        if default is None:
            raise ConfigurationError(f"{self.name} answers {path} with {status}; is it a vLLM server?")
        return default


async def wait_until_up(server: Server, ask: Callable[[], Awaitable[T]], *, was_up: bool = False) -> T:
    """Return what `ask` does, as soon as the server answers it. Says now and then that it does not.

    Raises:
        ConfigurationError: out of `ask`: what waiting cannot mend. Not if the server `was_up` before: whoever starts it
            anew may mend it, and the other servers of this process go on meanwhile.
    """
    complain_at = trio.current_time()
    while True:
        try:
            return await ask()
        except (UpstreamUnreachable, trio.TooSlowError, ConfigurationError) as error:
            if isinstance(error, ConfigurationError) and not was_up:
                raise
            if trio.current_time() >= complain_at:
                reason = str(error) or "it does not answer in time"
                log("upstream_not_ready", upstream=server.name, reason=reason, hint="still trying")
                complain_at = trio.current_time() + COMPLAIN_S
        await trio.sleep(LOOK_AGAIN_S)
