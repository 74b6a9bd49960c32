"""The ASGI application: routes, keys, limits, errors. Hosted by uvicorn as it is, and by Ray Serve as an ingress.

Deny by default: what is not in PUBLIC asks for a key where keys are configured.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

from gateway.dialect.bodies import DetokenizeBody, TokenizeBody, check_token_ids, template_messages
from gateway.dialect.parse import parse_body
from gateway.explain import NotFound
from gateway.generate import chat_completions, completions
from gateway.http import ClientDisconnected, Exchange, Receive, Scope, Send, client_request_id, tenant_of
from gateway.live import ClientLeft
from gateway.page import PAGE
from gateway.service import GatewayService
from protocol.errors import BatonError, InvalidRequest, NoWorker, RequestError, ServiceError

log = logging.getLogger("baton.gateway")

PUBLIC = frozenset({"/", "/health", "/ready", "/metrics"})
CLIENT_CLOSED_REQUEST = 499  # never sent, only counted
TEXT = b"text/plain; charset=utf-8"

Get = Callable[[Exchange], Awaitable[None]]
Post = Callable[[Exchange, bytes], Awaitable[None]]


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class GatewayApp:
    """`await app(scope, receive, send)`. Starts its service with the first request, or at lifespan startup where there is one."""

    def __init__(self, service: GatewayService) -> None:
        self.service = service
        self._gets: dict[str, Get] = {
            "/": self._page,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/status": self._status,
        }
        self._posts: dict[str, Post] = {
            "/v1/chat/completions": lambda exchange, raw: chat_completions(service, exchange, raw),
            "/v1/completions": lambda exchange, raw: completions(service, exchange, raw),
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        await self.service.start()
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(exchange)
        except (ClientDisconnected, ClientLeft):
            exchange.status = CLIENT_CLOSED_REQUEST
        finally:
            self.service.metrics.http_requests.labels(self._route_of(exchange.path), str(exchange.status or "none")).inc()

    def _route_of(self, path: str) -> str:
        """As a label: one of few."""
        if path in self._gets or path in self._posts:
            return path
        return next((prefix[:-1] for prefix in ("/v1/models/", "/explain/") if path.startswith(prefix)), "other")

    async def _answer(self, exchange: Exchange) -> None:
        request_id = client_request_id(exchange.headers)
        if request_id is not None:
            exchange.extra_headers.append((b"x-request-id", request_id))
        try:
            if exchange.path not in PUBLIC:
                exchange.tenant = tenant_of(exchange.headers, self.service.config.api_keys)
            await self._route(exchange)
        except (ClientDisconnected, ClientLeft):
            raise
        except BatonError as error:
            if exchange.status:  # the head is out: all that is left is to end the body
                await exchange.write(b"", more=False)
            else:
                await exchange.answer_error(error)
        except Exception:
            log.exception("while answering", extra={"path": exchange.path})
            if not exchange.status:
                await exchange.answer_error(ServiceError("internal error; the server's log has the details"))

    async def _route(self, exchange: Exchange) -> None:
        path, method = exchange.path, exchange.method
        if method in ("GET", "HEAD") and path in self._gets:
            await self._gets[path](exchange)
        elif method in ("GET", "HEAD") and path.startswith("/v1/models/"):
            await self._model(exchange, path.removeprefix("/v1/models/"))
        elif method in ("GET", "HEAD") and path.startswith("/explain/"):
            await self._explain(exchange, path.removeprefix("/explain/"))
        elif method == "POST" and path in self._posts:
            config = self.service.config
            raw = await exchange.body(max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
            await self._posts[path](exchange, raw)
        elif path in self._gets or path in self._posts:
            allowed = "POST" if path in self._posts else "GET"
            raise MethodNotAllowed(f"{method} is not allowed on {path}; use {allowed}")
        else:
            raise NotFound(f"there is no {path[:128]}; see GET / for what there is")

    # --- what it tells about itself ---

    async def _page(self, exchange: Exchange) -> None:
        await exchange.answer(200, PAGE.format(model=self.service.model.name).encode(), TEXT)

    async def _health(self, exchange: Exchange) -> None:
        """The process is alive; nothing about workers."""
        await exchange.answer(200, b"ok\n", TEXT)

    async def _ready(self, exchange: Exchange) -> None:
        """A request sent now can be expected to be answered; else 503 and why."""
        reasons = self.service.reasons_not_ready
        await exchange.answer_json({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.answer(200, self.service.metrics.render(), b"text/plain; version=0.0.4; charset=utf-8")

    async def _status(self, exchange: Exchange) -> None:
        await exchange.answer_json(await self.service.status(self._eyes(exchange)))

    async def _explain(self, exchange: Exchange, name: str) -> None:
        await exchange.answer_json(await self.service.explain(name, self._eyes(exchange)))

    def _eyes(self, exchange: Exchange) -> str | None:
        """A key tells of its own tenant's requests only; where no key is asked for there is one tenant."""
        return exchange.tenant if self.service.config.api_keys else None

    async def _models(self, exchange: Exchange) -> None:
        await exchange.answer_json({"object": "list", "data": [self._card(name) for name in self.service.model.names]})

    async def _model(self, exchange: Exchange, name: str) -> None:
        await exchange.answer_json(self._card(self.service.model.resolve(name)))

    def _card(self, name: str) -> dict[str, object]:
        model = self.service.model
        card: dict[str, object] = {"id": name, "object": "model", "created": model.created, "owned_by": "baton", "root": model.name}
        with contextlib.suppress(NoWorker):  # the length is not known before the first worker
            card["max_model_len"] = self.service.limits().max_model_len
        return card

    # --- tokens ---

    async def _tokenize(self, exchange: Exchange, raw: bytes) -> None:
        body = parse_body(TokenizeBody, raw)
        self.service.model.resolve(body.model)
        tokenizer = self.service.model.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("either prompt or messages is required, and not both", param="prompt", code="invalid_value")
        if body.prompt is not None:
            prompt, special = body.prompt, body.add_special_tokens is not False
            ids = await self.service.encode(lambda: tokenizer.encode(prompt, add_special_tokens=special), len(prompt))
        else:
            messages = template_messages(body.messages or [], self.service.config)
            generation = body.add_generation_prompt is not False
            ids = await self.service.encode(lambda: tokenizer.encode_chat(messages, add_generation_prompt=generation), len(raw))
        answer: dict[str, object] = {"count": len(ids), "tokens": list(ids)}
        with contextlib.suppress(NoWorker):
            answer["max_model_len"] = self.service.limits().max_model_len
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token_text(t) for t in ids]
        await exchange.answer_json(answer)

    async def _detokenize(self, exchange: Exchange, raw: bytes) -> None:
        body = parse_body(DetokenizeBody, raw)
        self.service.model.resolve(body.model)
        tokenizer = self.service.model.tokenizer
        check_token_ids(body.tokens, tokenizer.vocab_size, "tokens")
        await exchange.answer_json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.service.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def make_app(service: GatewayService) -> GatewayApp:
    """The application of one gateway replica."""
    return GatewayApp(service)
