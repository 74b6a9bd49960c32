"""Wait until a server is ready and get one chat completion from it; standard library only.

python .ci/one_request.py http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request

START_TIMEOUT_S = 90.0


def main(url: str) -> None:
    started_s = time.monotonic()
    while not ready(url):
        if time.monotonic() - started_s > START_TIMEOUT_S:
            sys.exit(f"{url} was not ready within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    print(f"ready after {time.monotonic() - started_s:.1f} s")
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)
    print(f"answer: {answer['choices'][0]['message']['content']!r}, usage: {answer['usage']}")
    if answer["usage"]["completion_tokens"] != 8:
        sys.exit("asked for 8 tokens")


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    main(sys.argv[1])
