"""transformers as a subject of `baton bench engine --compare transformers`: generate() on one padded batch with a static cache.

    PYTHON -P benchmarks/peers/transformers.py baton/bench/spoken.py

It has neither a scheduler nor a prefix cache: requests that arrive while it runs are not for it, and shared prompts are computed for each.
"""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

SPOKEN = runpy.run_path(sys.argv[1])


class TransformersEngine:
    """AutoModelForCausalLM with its default attention (SDPA)."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        import torch
        import transformers

        torch.set_num_threads(asked["num_threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"]))
        self._model.eval()
        return {"engine": f"transformers {transformers.__version__}"}

    def prepare(self, requests: list[dict[str, Any]], is_streamed: bool) -> None:
        import torch

        if any(request["at_s"] for request in requests):
            raise SPOKEN["Unsupported"]("generate() takes no request while it runs")
        lengths = {(len(request["prompt"]), request["num_tokens"]) for request in requests}
        assert len(lengths) == 1, "prompts of one length, so that nothing is padded"
        self._num_tokens = requests[0]["num_tokens"]
        self._prompts = torch.tensor([request["prompt"] for request in requests])

    def run(self) -> dict[str, Any]:
        import torch
        from transformers import GenerationConfig

        times_s: list[float] = []
        began_s = time.perf_counter()

        def note_step(token_ids: Any, scores: Any, **_: object) -> Any:
            """A criterion that never stops: it is asked after each step."""
            times_s.append(time.perf_counter() - began_s)
            return torch.zeros(len(token_ids), dtype=torch.bool)

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._num_tokens,
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=0,
        )
        self._model.generation_config.eos_token_id = None  # nothing ends a sequence but its length
        with torch.inference_mode():
            made = self._model.generate(
                self._prompts,
                attention_mask=torch.ones_like(self._prompts),
                generation_config=config,
                stopping_criteria=[note_step],
            )
        token_ids = made[:, self._prompts.shape[1] :].tolist()
        return {"deliveries": [[(at_s, 1) for at_s in times_s]] * len(token_ids), "token_ids": token_ids}


if __name__ == "__main__":
    SPOKEN["answer"](TransformersEngine())
