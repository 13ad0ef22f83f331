"""The steps of every gRPC call: authorisation, limits on memory, the access log, errors as gRPC statuses.

Every method is registered with streamed requests, which are the same on the wire: so the token is checked before the message has arrived,
and the message has to arrive within `Bounds.body_seconds`. A message counts as held once it is complete (grpc shows nothing of it before),
an answer until the client has taken it or the call has ended.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc

from muntin.errors import bare
from muntin.serving.inference.service import Answered
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.security.bearer_tokens import Tokens
from muntin.serving.telemetry.access_log import AccessLog

Context = Any
"""A `grpc.aio.ServicerContext` whose messages are bytes."""


class End(NamedTuple):
    """How a call ended: the outcome that the metrics count, the HTTP status and the gRPC status."""

    outcome: str
    status: int
    code: str

    @classmethod
    def of(cls, error: ProtocolError) -> End:
        return cls(error.outcome, error.status, error.grpc_code)


ANSWERED, CANCELLED = End("answered", 200, "OK"), End("cancelled", 499, "CANCELLED")


@dataclass(slots=True)
class RpcCall:
    """A call, or one request of a stream, for the access log. `arrived`: `time.monotonic` of its headers, later of its message."""

    context: Context
    method: str
    arrived: float
    model: str = ""
    request_id: str = ""
    sent: int = 0
    logged: bool = False


class CallSlots:
    """Limits the calls of one kind in progress. `unread`: called with the error for a call beyond `most`."""

    def __init__(self, most: int, kind: str, unread: Callable[[ProtocolError], ProtocolError]) -> None:
        self._most, self._kind, self._unread = most, kind, unread
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Count the call while the block runs. Raises ProtocolError 429 beyond `most`."""
        if self.taken >= self._most:
            raise self._unread(ProtocolError(f"this server answers at most {self._most} {self._kind} at once: try again", status=429))
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Calls:
    """Admits calls, receives their messages, sends their answers and logs them. `ledger`: shared with the HTTP server."""

    def __init__(self, ledger: MemoryBudget, tokens: Tokens, log: AccessLog | None) -> None:
        self.ledger, self._tokens, self._log = ledger, tokens, log
        self.places = CallSlots(ledger.bounds.connections, "calls", self.unread)
        self.accepts_ipv6 = True
        """False without an IPv6 address: grpc listens to both families on 0.0.0.0."""
        self.cut_at = math.inf
        """Time after which calls in progress count as cut off."""
        self.cut_off = 0
        """Number of calls that were cut off at shutdown."""

    def handler(
        self,
        method: str,
        behaviour: Callable[[RpcCall], Awaitable[None]],
        *,
        needs_token: bool = True,
        logs_success: bool = True,
    ) -> grpc.RpcMethodHandler:
        """Return the handler of a method. `behaviour`: receives messages and sends answers, or raises."""

        async def handle(_: Any, context: Context) -> None:
            error = await self._run(
                RpcCall(context, method, time.monotonic()), behaviour, needs_token=needs_token, logs_success=logs_success
            )
            if error is not None:  # raised here: grpc keeps the frames of an abort, and these hold no message
                await _abort(context, error)

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _run(
        self, call: RpcCall, behaviour: Callable[[RpcCall], Awaitable[None]], *, needs_token: bool, logs_success: bool
    ) -> ProtocolError | None:
        end = CANCELLED
        try:
            with unforeseen():
                self._check_address(call.context)
                if needs_token:
                    self._tokens.check(_authorization(call.context))
                await behaviour(call)
            end = ANSWERED
        except ProtocolError as error:
            end = End.of(error)
            return bare(error)
        finally:
            # At shutdown grpc cancels the call, or ends its requests as if the client had sent none.
            if end.status not in (200, 503) and time.monotonic() >= self.cut_at:
                self.cut_off += 1
            if logs_success or end not in (ANSWERED, CANCELLED):
                self.log(call, end)
        return None

    def _check_address(self, context: Context) -> None:
        peer = unquote(context.peer())
        if not self.accepts_ipv6 and peer.startswith("ipv6:[") and not peer.startswith("ipv6:[::ffff:"):  # that is IPv4
            raise ProtocolError("this server answers over IPv4 alone: it was given no address of IPv6", status=403)

    async def message(self, call: RpcCall, seconds: float | None = None) -> bytes:
        """Receive the only message of a call within `seconds`, by default `Bounds.body_seconds`. Raises ProtocolError."""
        try:
            async with asyncio.timeout(self.ledger.bounds.body_seconds if seconds is None else seconds):
                wire = await call.context.read()
        except TimeoutError:
            raise self.unread(ProtocolError("the request did not arrive in time", status=408)) from None
        if wire is grpc.aio.EOF:
            raise ProtocolError("the call ended without a message: send one")
        call.arrived = time.monotonic()
        assert isinstance(wire, bytes)
        return wire

    def check_room(self, size: int) -> None:
        """Raise RefusedRequestError if a message of so many bytes does not fit into the memory budget."""
        if not self.ledger.has_room(size):
            raise self.unread(RefusedRequestError("the bodies of other requests fill what this server holds: try again"))

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count so many bytes as held while the block runs."""
        self.ledger.held += size
        try:
            yield
        finally:
            self.ledger.held -= size

    async def send(self, call: RpcCall, answer: bytes) -> None:
        """Send an answer. It counts as held until the client has taken it or the call ends."""
        call.sent = len(answer)
        with self.holding(len(answer)):
            await call.context.write(answer)

    def unread(self, error: ProtocolError) -> ProtocolError:
        """Count a request that is refused unread. Returns the error."""
        self.ledger.refused[error.status] += 1
        return error

    def log(self, call: RpcCall, end: End, answered: Answered | None = None) -> None:
        """Write a call into the access log, once."""
        if self._log is None or call.logged:
            return
        call.logged = True
        self._log.write(
            face="grpc", client=str(call.context.peer()), method=call.method, path=call.model, status=end.status, code=end.code,
            sent=call.sent, seconds=time.monotonic() - call.arrived, request_id=call.request_id, answered=answered,
        )  # fmt: skip


@contextmanager
def unforeseen() -> Iterator[None]:
    """Report an unforeseen error to the event loop's handler, and raise ProtocolError 500 with its type only."""
    try:
        yield
    except (ProtocolError, grpc.aio.BaseError):
        raise
    except Exception as error:
        asyncio.get_running_loop().call_exception_handler({"message": "a call failed", "exception": error})
        raise ProtocolError(f"the server failed ({type(error).__name__})", status=500) from error


def _authorization(context: Context) -> bytes:
    value = next((value for name, value in context.invocation_metadata() or () if name == "authorization"), b"")
    return value.encode() if isinstance(value, str) else bytes(value)


async def _abort(context: Context, error: ProtocolError) -> None:
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, RefusedRequestError):  # the second is for clients that retry by themselves
        seconds = max(1, math.ceil(error.retry_after))
        trailing = (("retry-after", str(seconds)), ("grpc-retry-pushback-ms", str(1000 * seconds)))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), trailing)
