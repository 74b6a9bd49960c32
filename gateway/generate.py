"""/v1/chat/completions and /v1/completions: from a body to sessions, and from their feed to an answer.

One body may hold several prompts (completions) with n choices each; all of them share one feed, and choice c of prompt p is
choice p * n + c of the answer. The head of a stream is sent with the first token, so that whatever fails before it still gets
its own HTTP status.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import Sequence

from gateway.dialect.answers import AnswerShape, ChoiceAnswer, ChunkWriter, Usage, whole_answer
from gateway.dialect.bodies import COMPLETION_MAX_TOKENS, ChatBody, CompletionBody, template_messages
from gateway.dialect.parse import parse_body
from gateway.dialect.sampling import SharedFields, check_limits, sampling_params
from gateway.explain import MAX_PLACEMENT_HEADERS, PLACEMENT_HEADER, placement_header
from gateway.http import SSE_DONE, SSE_HEADERS, Exchange, client_request_id, client_session, client_slo, sse_error, sse_event
from gateway.live import ClientLeft, Feed, LiveRequest
from gateway.service import GatewayService
from gateway.text import ChoiceText
from protocol.errors import BatonError, InvalidRequest
from protocol.request import SamplingParams, token_buffer


async def chat_completions(service: GatewayService, exchange: Exchange, raw: bytes) -> None:
    body = parse_body(ChatBody, raw)
    model = service.model.resolve(body.model)
    num_logprobs = body.num_logprobs(service.config)
    check_limits(body, service.config, service.model.tokenizer.vocab_size)
    messages = template_messages(body.messages, service.config)
    tokenizer = service.model.tokenizer

    def encode() -> array[int]:
        return tokenizer.encode_chat(
            messages, add_generation_prompt=body.add_generation_prompt is not False, variables=body.chat_template_kwargs
        )

    prompt = await service.encode(encode, sum(len(str(m["content"])) for m in messages))
    shape = _shape(service, body, model, chat=True, num_logprobs=num_logprobs)
    await _generate(service, exchange, body, shape, [prompt], max_tokens=body.most_tokens, default_max_tokens=None)


async def completions(service: GatewayService, exchange: Exchange, raw: bytes) -> None:
    body = parse_body(CompletionBody, raw)
    model = service.model.resolve(body.model)
    num_logprobs = body.num_logprobs(service.config)
    tokenizer = service.model.tokenizer
    check_limits(body, service.config, tokenizer.vocab_size)
    prompts = [
        token_buffer(p) if isinstance(p, list) else await service.encode(lambda p=p: tokenizer.encode(p), len(p))  # type: ignore[misc]
        for p in body.prompts(service.config, tokenizer.vocab_size)
    ]
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest(
                "prompt is empty: it has no token, not even a BOS; write at least one", param="prompt", code="invalid_value"
            )
    shape = _shape(service, body, model, chat=False, num_logprobs=num_logprobs)
    await _generate(service, exchange, body, shape, prompts, max_tokens=body.max_tokens, default_max_tokens=COMPLETION_MAX_TOKENS)


def _shape(service: GatewayService, body: SharedFields, model: str, *, chat: bool, num_logprobs: int | None) -> AnswerShape:
    answer_id = secrets.token_hex(16)
    return AnswerShape(
        answer_id=f"{'chatcmpl' if chat else 'cmpl'}-{answer_id}",
        chat=chat,
        model=model,
        created=int(time.time()),
        system_fingerprint=service.system_fingerprint,
        include_usage=body.include_usage,
        num_logprobs=num_logprobs,
        return_token_ids=bool(body.return_token_ids),
        token_bytes=service.model.tokenizer.token_bytes,
    )


async def _generate(
    service: GatewayService,
    exchange: Exchange,
    body: SharedFields,
    shape: AnswerShape,
    prompts: Sequence[array[int]],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
) -> None:
    limits = service.limits()
    samplings = [
        sampling_params(
            body,
            limits,
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            num_logprobs=shape.num_logprobs,
            drawn_seed=service.draw_seed(),
        )
        for prompt in prompts
    ]
    service.check_open()
    feed = Feed(len(prompts))
    client_id, answer_id = client_request_id(exchange.headers), shape.answer_id.partition("-")[2]
    names = () if client_id is None else (client_id.decode("ascii"),)
    n, slo = samplings[0].n, client_slo(exchange.headers)
    lives = [
        service.open(
            request_id=answer_id if i == 0 else secrets.token_hex(16),
            known_as=names if i == 0 else (answer_id, *names),
            traceparent=exchange.headers.get(b"traceparent", b"").decode("latin-1"),
            prompt_token_ids=prompt,
            sampling=sampling,
            texts=[_choice_text(service, body, sampling, chat=shape.chat) for _ in range(n)],
            feed=feed,
            first_index=i * n,
            tenant=exchange.tenant,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            session=client_session(exchange.headers) or body.prompt_cache_key or body.user or "",
            slo=slo,
        )
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    watcher = asyncio.get_running_loop().create_task(_cancel_on_disconnect(service, exchange, lives))
    try:
        if body.stream:
            await _stream(service, exchange, shape, feed, lives)
        else:
            await _whole(service, exchange, shape, feed, lives)
    except BatonError:
        if not exchange.status:
            _show_placement(service, exchange, lives)
        raise
    finally:
        watcher.cancel()
        for live in lives:
            service.cancel(live)


async def _stream(service: GatewayService, exchange: Exchange, shape: AnswerShape, feed: Feed, lives: Sequence[LiveRequest]) -> None:
    writer = ChunkWriter(shape)
    items = await feed.take()  # an error before the first token is answered with its own status
    _show_placement(service, exchange, lives)
    await exchange.start(200, SSE_HEADERS)
    started: set[int] = set()
    try:
        while items:
            chunks = []
            for index, delta in items:
                if shape.chat and index not in started:
                    started.add(index)
                    chunks.append(sse_event(writer.role(index)))
                chunks += [sse_event(chunk) for chunk in writer.delta(index, delta)]
            if chunks:
                await exchange.write(b"".join(chunks))
            items = await feed.take()
    except ClientLeft:
        raise
    except BatonError as error:
        await exchange.write(sse_error(error) + SSE_DONE, more=False)
        return
    last = sse_event(writer.usage(_usage(lives))) if shape.include_usage else b""
    await exchange.write(last + SSE_DONE, more=False)


async def _whole(service: GatewayService, exchange: Exchange, shape: AnswerShape, feed: Feed, lives: Sequence[LiveRequest]) -> None:
    n = lives[0].session.request.sampling.n
    choices = [ChoiceAnswer() for _ in range(n * len(lives))]
    while items := await feed.take():
        for index, delta in items:
            choices[index].add(delta)
    prompts = [live.session.request.prompt_token_ids for live in lives]
    _show_placement(service, exchange, lives)
    await exchange.answer_json(whole_answer(shape, choices, _usage(lives), prompts))


def _show_placement(service: GatewayService, exchange: Exchange, lives: Sequence[LiveRequest]) -> None:
    """Into the head of the answer, which is sent next."""
    if service.config.shows_placement:
        exchange.extra_headers += [(PLACEMENT_HEADER, placement_header(live.session)) for live in lives[:MAX_PLACEMENT_HEADERS]]


def _usage(lives: Sequence[LiveRequest]) -> Usage:
    sessions = [live.session for live in lives]
    return Usage(
        num_prompt_tokens=sum(s.request.num_prompt_tokens for s in sessions),
        num_output_tokens=sum(s.num_output_tokens for s in sessions),
        num_cached_tokens=sum(s.num_cached_tokens for s in sessions),
    )


def _choice_text(service: GatewayService, body: SharedFields, sampling: SamplingParams, *, chat: bool) -> ChoiceText:
    detokenizer = service.model.tokenizer.detokenizer(
        skip_special_tokens=body.skip_special_tokens is not False,
        continues_text=not chat,
    )
    return ChoiceText(
        detokenizer,
        stop=body.stop_strings,
        hide_last=frozenset((*sampling.eos_token_ids, *sampling.stop_token_ids)),
        min_tokens=sampling.min_tokens,
        include_stop=bool(body.include_stop_str_in_output),
    )


async def _cancel_on_disconnect(service: GatewayService, exchange: Exchange, lives: Sequence[LiveRequest]) -> None:
    await exchange.disconnected()
    for live in lives:
        service.cancel(live)
