"""The words a starting server says: one line a phase, then how to talk to it. Text only; baton/serve.py puts it on the terminal."""

from __future__ import annotations

import json
import shlex

from control.startup import Phase, ServerReady

_PHASE_NAMES = {Phase.MODEL: "model", Phase.RAY: "ray", Phase.WORKERS: "workers", Phase.ENDPOINT: "endpoint"}
_WIDTH = max(len(name) for name in _PHASE_NAMES.values())


def phase_line(phase: Phase, detail: str, elapsed_s: float | None) -> str:
    """ "workers   1 prefill, 1 decode (3.2 s)"; no time while it is still going on."""
    took = "" if elapsed_s is None else f" ({elapsed_s:.1f} s)"
    return f"{_PHASE_NAMES[phase]:<{_WIDTH}}  {detail}{took}"


def ready_headline(ready: ServerReady, elapsed_s: float) -> list[str]:
    """What serves where; the lines inside the panel."""
    pools = [(ready.prefill_workers, "prefill"), (ready.decode_workers, "decode"), (ready.mixed_workers, "mixed")]
    workers = " + ".join(f"{count} {name}" for count, name in pools if count)
    lines = [
        f"{ready.model_id} at {ready.url}/v1",
        f"{workers} workers, ready after {elapsed_s:.1f} s",
        "Ctrl-C ends it; baton status shows it; baton chat talks to it",
    ]
    if ready.needs_api_key:
        lines.insert(2, "clients need the API key: Authorization: Bearer $BATON_API_KEY")
    return lines


def ready_snippets(ready: ServerReady) -> str:
    """A curl and an openai call, ready to be pasted; never the key itself, which would stay in logs."""
    return f"{curl_snippet(ready)}\n\n{openai_snippet(ready)}\n"


def curl_snippet(ready: ServerReady) -> str:
    body = {"model": ready.model_id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "stream": True}
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if ready.needs_api_key else ""
    return f"curl -sN {ready.url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n  -d {shlex.quote(json.dumps(body))}"


def openai_snippet(ready: ServerReady) -> str:
    key = 'os.environ["BATON_API_KEY"]' if ready.needs_api_key else '"none"'
    return "\n".join(
        [
            *(["import os"] if ready.needs_api_key else []),
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{ready.url}/v1", api_key={key})',
            "answer = client.chat.completions.create(",
            f'    model={json.dumps(ready.model_id)}, messages=[{{"role": "user", "content": "Hello"}}], max_tokens=32',
            ")",
            "print(answer.choices[0].message.content)",
        ]
    )
