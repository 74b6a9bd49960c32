"""One request while it lives: its session, the text of its choices, and the feed its HTTP side reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.events import ChoiceStopped, Deliver
from gateway.session import Session
from gateway.text import ChoiceText, TextDelta
from protocol.errors import BatonError


class ClientLeft(BatonError):
    """The reader went away; nobody hears of this."""


class Feed:
    """What all choices of one HTTP body have to say, in the order it came; one reader.

    `undelivered_tokens` is what the reader has not taken: the service ends a request whose client lets it grow too far.
    """

    def __init__(self, num_requests: int) -> None:
        self.undelivered_tokens = 0
        self._items: list[tuple[int, TextDelta]] = []
        self._open = num_requests
        self._error: BatonError | None = None
        self._changed = asyncio.Event()

    def put(self, index: int, delta: TextDelta) -> None:
        self._items.append((index, delta))
        self.undelivered_tokens += delta.num_tokens
        self._changed.set()

    def end(self, error: BatonError | None) -> None:
        """One of the requests is over; with an error all of them are, for the reader."""
        self._open -= 1
        self._error = self._error or error
        self._changed.set()

    async def take(self) -> list[tuple[int, TextDelta]]:
        """Everything new, as (choice index, delta); waits for something. Empty: every request is over.

        Raises:
            BatonError: a request failed, after everything that came before was taken.
        """
        while not self._items and self._open > 0 and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        items, self._items = self._items, []
        self.undelivered_tokens = 0
        if not items and self._error is not None:
            raise self._error
        return items


class LiveRequest:
    """A session with its texts. `first_index`: of choice 0 within the HTTP answer (several prompts share one feed)."""

    def __init__(self, session: Session, texts: Sequence[ChoiceText], feed: Feed, *, first_index: int) -> None:
        self.session = session
        self.feed = feed
        self._texts = texts
        self._first_index = first_index
        self._stopped: set[int] = set()

    @property
    def request_id(self) -> str:
        return self.session.request.request_id

    def deliver(self, deliver: Deliver) -> ChoiceStopped | None:
        """Tokens to text to feed. Not None: a stop string ended the choice, and the session has to hear of it at once."""
        if deliver.choice in self._stopped:  # the rest of what came with the stop string
            return None
        delta = self._texts[deliver.choice].push(deliver.token_ids, deliver.logprobs, deliver.finish_reason)
        self.feed.put(self._first_index + deliver.choice, delta)
        if not delta.stopped:
            return None
        self._stopped.add(deliver.choice)
        return ChoiceStopped(choice=deliver.choice, num_tokens=deliver.position + delta.num_tokens)
