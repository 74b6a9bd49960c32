"""From a plan to the cluster.yaml that `baton serve` and `baton sim` take: paced workers, as many as were found, at the pace of theirs.

One pace and one number of blocks serve all workers of a file. So prompts take the time of the prefill workers and decodes that of the
decode workers, which is right as long as each does its own; blocks are those of the smaller pool; and step times that are no straight line
are replaced by the one that touches them where the plan works.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.step_time import StepShape, StepTimeModel
from simulator.placement_search import Found
from simulator.pools import Link, Pool
from simulator.worker_models import BLOCK_TOKENS, WorkerModels

MAX_NUM_SEQS = 1024  # a bound; room for KV decides before it
_MORE_READS = 1000

Tree = dict[str, dict[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """What a step of the plan looks like."""

    prompt_tokens: int
    context_tokens: int
    longest_prompt_tokens: int


def cluster_tree(found: Found, copies: int, workers: WorkerModels, typical: Typical, *, link: Link, batch_tokens: int) -> Tree:
    """Sections of a configuration for so many copies of what was found. The tokens are the demo model's."""
    pools, models, name = found.pools, workers.by_gpus, workers.paced_model
    prompts, decodes = pools.prefill or pools.mixed, pools.decode or pools.mixed
    assert found.trial is not None and prompts is not None and decodes is not None
    num_decodes = max(1, round(found.trial.num_decoding / decodes.count))
    pace = _prefill_pace(models[prompts.gpus_each].step_time, typical)
    pace |= _decode_pace(models[decodes.gpus_each].step_time, num_decodes, typical)
    if pools.mixed is not None:  # weights are read once in a step of both, and the paced executor adds up
        pace["prefill_base_s"] = max(0.0, pace["prefill_base_s"] - pace["decode_base_s"])
    kv_tokens = min(models[pool.gpus_each].kv_tokens for pool in (prompts, decodes))
    token_s = models[decodes.gpus_each].kv_token_bytes / link.bytes_per_s
    step_tokens = pools.chunk_tokens or max(batch_tokens, -(-typical.longest_prompt_tokens // BLOCK_TOKENS) * BLOCK_TOKENS)
    return {
        "model": {"path": "demo", **({"served_model_name": name} if name else {})},
        "workers": {
            "executor": "paced",
            "prefill_workers": _count(pools.prefill, copies),
            "decode_workers": _count(pools.decode, copies),
            "mixed_workers": _count(pools.mixed, copies),
            "block_size": BLOCK_TOKENS,
            "num_kv_blocks": kv_tokens // BLOCK_TOKENS,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": step_tokens,
        },
        "paced": {**({"model": name} if name else {}), **{term: float(f"{value:.6g}") for term, value in pace.items()}},
        "simulation": {"link_bytes_per_s": link.bytes_per_s, "link_latency_s": link.latency_s},
        "router": {
            "disaggregate": "always" if pools.is_split else "never",
            "transfer_s_base": link.latency_s,
            "transfer_s_per_token": float(f"{token_s:.6g}"),
        },
    }


def _count(pool: Pool | None, copies: int) -> int:
    return pool.count * copies if pool is not None else 0


def _prefill_pace(steps: StepTimeModel, typical: Typical) -> dict[str, float]:
    at = StepShape().with_prefill(0, typical.prompt_tokens)
    taken_s = steps.step_s(at)
    token_s = steps.step_s(StepShape(prefill_tokens=at.prefill_tokens + 1, prefill_reads=at.prefill_reads)) - taken_s
    more = StepShape(prefill_tokens=at.prefill_tokens, prefill_reads=at.prefill_reads + _MORE_READS)
    read_s = (steps.step_s(more) - taken_s) / _MORE_READS
    base_s = max(0.0, taken_s - token_s * at.prefill_tokens - read_s * at.prefill_reads)
    return {"prefill_base_s": base_s, "prefill_token_s": token_s, "prefill_read_s": read_s}


def _decode_pace(steps: StepTimeModel, num_decodes: int, typical: Typical) -> dict[str, float]:
    reads = num_decodes * typical.context_tokens

    def taken_s(decodes: int, decode_reads: int) -> float:
        return steps.step_s(StepShape(decodes=decodes, decode_reads=decode_reads))

    here_s = taken_s(num_decodes, reads)
    sequence_s = taken_s(num_decodes + 1, reads) - here_s
    if sequence_s < 0.0:  # another line begins with one sequence more
        sequence_s = here_s - taken_s(num_decodes - 1, reads)
    read_s = (taken_s(num_decodes, reads + _MORE_READS) - here_s) / _MORE_READS
    base_s = max(0.0, here_s - sequence_s * num_decodes - read_s * reads)
    return {"decode_base_s": base_s, "decode_sequence_s": sequence_s, "decode_read_s": read_s}
