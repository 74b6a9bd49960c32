"""Talk to a running cluster with OpenAI's own client: list models, stream a chat, complete a text.

python examples/openai_client.py [http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(base_url: str) -> None:
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    print(f"model: {model}")

    print("chat: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is a baton?"}],
        max_tokens=24,
        temperature=0.7,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            print(event.choices[0].delta.content, end="", flush=True)
        if event.usage is not None:
            print(f"\nusage: {event.usage.prompt_tokens} + {event.usage.completion_tokens} tokens")

    # What OpenAI's schema does not know goes into extra_body, as with vLLM.
    text = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=12, temperature=0, n=1, extra_body={"min_tokens": 12, "ignore_eos": True}
    )
    print(f"completion: {text.choices[0].text!r} ({text.choices[0].finish_reason})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")
