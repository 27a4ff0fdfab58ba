"""A reverse proxy in front of an S3 endpoint that injects faults and writes down every request.

    with FaultProxy(moto.endpoint_url) as proxy:
        proxy.add(Rule("reset_after", method="PUT", path=r"/_manifest\\.json"))
        ...                                     # a client of proxy.url
        assert proxy.count("PUT", r"/_manifest\\.json") == 2

faults, and what the client meets:
    status        an S3 error document with `status`; upstream never sees the request
    reset_before  a connection reset; upstream never sees the request
    reset_after   a connection reset; the request has taken effect, its answer is lost
    truncate      the full Content-Length, half of the body, end of the connection
    short         half of the body with a Content-Length that agrees: HTTP cannot tell
    corrupt       the middle byte of the body inverted
    latency       the right answer, `seconds` late
    duplicate     the answer to a second delivery of the same request

Knows HTTP/1.1 and S3's error documents; does not know S3's operations, and never replays a request by itself.
Bodies are buffered whole, up to 256 MiB.
"""

import asyncio
import http.client
import random
import re
import socket
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Self, get_args
from urllib.parse import urlsplit

from aiohttp import web

Fault = Literal["status", "reset_before", "reset_after", "truncate", "short", "corrupt", "latency", "duplicate"]

_MAX_BODY_BYTES = 256 << 20
# Expect is answered by the proxy itself; a body is passed on with a Content-Length, never in chunks.
_NOT_PASSED_ON = {
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"upgrade",
    b"transfer-encoding",
    b"expect",
}
_ERROR_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}


@dataclass(frozen=True)
class Rule:
    """Which requests meet `fault`.

    `method` must match whole; `path` is searched for in the encoded path with its query; a `header` of that name
    must be there, where one is given. The first `skip` requests that match pass, then `times` of them (None: all)
    are hit, each with `probability`, drawn from `seed`.
    `status` belongs to the fault of that name, `seconds` to latency.
    """

    fault: Fault
    _: KW_ONLY
    method: str = ".*"
    path: str = ""
    header: str = ""
    times: int | None = 1
    skip: int = 0
    probability: float = 1.0
    seed: int = 0
    status: int = 503
    seconds: float = 1.0


@dataclass(frozen=True)
class Exchange:
    """One request as the client sent it.

    `status` is upstream's, or that of the made-up error; None when upstream was not asked or did not answer.
    `fault` is "unreachable" when upstream is down: the client's connection is then reset.
    """

    method: str
    path: str
    query: str
    status: int | None
    fault: Fault | Literal["unreachable"] | None


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class _ArmedRule:
    rule: Rule
    num_matched: int = 0
    num_hit: int = 0
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        if self.rule.fault not in get_args(Fault):
            raise ValueError(f"unknown fault {self.rule.fault!r}: one of {', '.join(get_args(Fault))}")
        self.chance = random.Random(self.rule.seed)

    def hits(self, request: web.Request) -> bool:
        rule = self.rule
        if not (re.fullmatch(rule.method, request.method) and re.search(rule.path, request.raw_path)):
            return False
        if rule.header and rule.header not in request.headers:
            return False
        self.num_matched += 1
        spent = rule.times is not None and self.num_hit >= rule.times
        if spent or self.num_matched <= rule.skip or self.chance.random() >= rule.probability:
            return False
        self.num_hit += 1
        return True


class FaultProxy:
    """Serves on a free loopback port, from a thread of its own, between __enter__ and __exit__."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream = urlsplit(upstream_url)
        self._rules: tuple[_ArmedRule, ...] = ()
        self._ledger: list[Exchange] = []
        self._stop = asyncio.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._senders = ThreadPoolExecutor(32, "fault-proxy-upstream")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def requests(self) -> tuple[Exchange, ...]:
        """What was asked so far, in the order of the answers."""
        return tuple(self._ledger)

    def count(self, method: str = ".*", path: str = "") -> int:
        """How many requests match, by the rules of Rule (hit by a fault or not)."""
        return sum(
            1
            for seen in self.requests
            if re.fullmatch(method, seen.method) and re.search(path, f"{seen.path}?{seen.query}")
        )

    def add(self, rule: Rule) -> None:
        """Arm `rule`; where several match a request, the one added first decides."""
        self._rules = (*self._rules, _ArmedRule(rule))

    def clear(self) -> None:
        """Disarm all rules and forget the requests so far."""
        self._rules = ()
        self._ledger.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._senders.shutdown()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_route("*", "/{target:.*}", self._handle)
        # auto_decompress would unpack a request body whose Content-Encoding is part of what was signed.
        runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, self._listener).start()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        rule = next((armed.rule for armed in self._rules if armed.hits(request)), None)
        fault = rule.fault if rule else None
        if rule and rule.fault == "status":
            self._note(request, rule.status, fault)
            return web.Response(status=rule.status, body=_error(rule.status), content_type="application/xml")
        if fault == "reset_before":
            self._note(request, None, fault)
            return _reset(request)
        if rule and rule.fault == "latency":
            await asyncio.sleep(rule.seconds)
        try:
            if fault == "duplicate":
                await self._send_upstream(request, body)
            answer = await self._send_upstream(request, body)
        except (OSError, http.client.HTTPException):
            self._note(request, None, "unreachable")
            return _reset(request)
        self._note(request, answer.status, fault)
        return _reset(request) if fault == "reset_after" else await _respond(request, answer, fault)

    def _note(self, request: web.Request, status: int | None, fault: Fault | Literal["unreachable"] | None) -> None:
        path, _, query = request.raw_path.partition("?")
        self._ledger.append(Exchange(request.method, path, query, status, fault))

    async def _send_upstream(self, request: web.Request, body: bytes) -> _Answer:
        headers = [(name, value) for name, value in request.raw_headers if name.lower() not in _NOT_PASSED_ON]
        if body and "Content-Length" not in request.headers:
            headers.append((b"Content-Length", b"%d" % len(body)))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._senders, self._exchange, request.method, request.raw_path, headers, body
        )

    def _exchange(self, method: str, target: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> _Answer:
        """Send one request on a connection of its own, exactly once.

        aiohttp's client is not used here: it silently repeats a PUT whose connection broke.
        """
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=120)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name.decode("ascii"), value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            return _Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()


async def _respond(request: web.Request, answer: _Answer, fault: str | None) -> web.StreamResponse:
    """Send `answer` to the client, its body spoilt as `fault` asks."""
    body, half = answer.body, len(answer.body) // 2
    if fault == "short":
        body = body[:half]
    elif fault == "corrupt" and body:
        body = body[:half] + bytes([body[half] ^ 0xFF]) + body[half + 1 :]
    response = web.StreamResponse(status=answer.status)
    bodiless = request.method == "HEAD" or answer.status in (204, 304)
    for (
        name,
        value,
    ) in answer.headers:  # moto names its Server twice, which strict clients refuse: keep the last
        own = name.lower() == "content-length" and not bodiless
        if not own and name.lower().encode() not in _NOT_PASSED_ON:
            response.headers[name] = value
    if not bodiless:
        response.content_length = len(body)
    await response.prepare(request)
    if fault == "truncate" and request.transport is not None:
        await response.write(body[:half])
        request.transport.close()
        return response
    if not bodiless:
        await response.write(body)
    await response.write_eof()
    return response


def _reset(request: web.Request) -> web.Response:
    """Close the client's connection with RST instead of FIN; what is returned is never sent."""
    if request.transport is not None:
        no_linger = struct.pack("ii", 1, 0)
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        request.transport.abort()
    return web.Response()


def _error(status: int) -> bytes:
    code = _ERROR_CODES.get(status, "InternalError")
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
        f"<Message>injected fault {status}</Message><RequestId>fault-proxy</RequestId></Error>"
    ).encode()
