"""DistServe's published step times of OPT on A100-80GB: what a plan can be made from, and checked by, without a GPU. Torch-free.

    prefill   a + b * sum(l) + c * sum(l^2) + 1 a stage    l: tokens of each prompt; one stage, since we have no pipelines yet
    decode    a + b * sum(context) + c * batch             one line below 95 sequences, another from there on

Milliseconds there, seconds here. From the profile that its simulator reads (profiler-a100-80g.distserve.json and max_num_tokens.csv of
LLMServe/DistServe at 82831f1; Appendix A of DistServe, OSDI'24).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.step_time import LinearStepTime, StepShape

LARGE_BATCH = 95  # sequences from which on the second line of decode holds
STAGE_MS = 1.0  # that a prefill step spends in a stage beyond its arithmetic
RAY_CALL_S, RAY_TOKEN_S = 2e-3, 1e-7  # what a step's Ray call cost there: 2 ms and 1e-4 ms a token of context
GPU = "a100-80g"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedStepTime:
    """A `StepTimeModel` of two lines of decode. Where the batch reaches `LARGE_BATCH` time may fall, as published.

    Steps that compute prompts beside decodes were not measured there. Weights are read once in such a step and its kernels launched
    once, so of the two constant parts the larger counts; the rest adds up.
    """

    small: LinearStepTime
    large: LinearStepTime  # the same prefill
    with_ray: bool = False

    def step_s(self, shape: StepShape) -> float:
        line = self.line(shape.decodes)
        step_s = line.step_s(shape)
        if shape.prefill_tokens and shape.decodes:
            step_s -= min(line.prefill_base_s, line.decode_base_s)
        if self.with_ray and (shape.prefill_tokens or shape.decodes):
            step_s += RAY_CALL_S + RAY_TOKEN_S * (shape.prefill_tokens + shape.decode_reads)
        return step_s

    def line(self, num_decodes: int) -> LinearStepTime:
        """What holds for a batch of so many sequences."""
        return self.small if num_decodes < LARGE_BATCH else self.large


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """One model at one tensor-parallel size. `kv_tokens`: what its GPUs hold beside the weights, all together."""

    name: str
    tensor_parallel: int
    step_time: PublishedStepTime
    kv_tokens: int
    kv_token_bytes: int  # 2 * layers * heads * head_dim * 2 bytes


Line = tuple[float, float, float]  # a, b, c in ms


def _step_time(prefill: Line, small: Line, large: Line) -> PublishedStepTime:
    """sum(l^2) of whole prompts is 2 * reads - tokens, since a prompt of l reads l * (l + 1) / 2; of chunks it is the whole's too."""

    def linear(decode: Line) -> LinearStepTime:
        return LinearStepTime(
            prefill_base_s=(prefill[0] + STAGE_MS) / 1e3,
            prefill_token_s=(prefill[1] - prefill[2]) / 1e3,
            prefill_read_s=2 * prefill[2] / 1e3,
            decode_base_s=decode[0] / 1e3,
            decode_sequence_s=decode[2] / 1e3,
            decode_read_s=decode[1] / 1e3,
        )

    return PublishedStepTime(small=linear(small), large=linear(large))


_OPT_13B_TOKEN_BYTES, _OPT_66B_TOKEN_BYTES = 819_200, 2_359_296  # 40 layers of 40 heads, 64 layers of 72, of 128

PUBLISHED: dict[str, dict[int, PublishedModel]] = {
    name: {
        tp: PublishedModel(
            name=name,
            tensor_parallel=tp,
            step_time=_step_time(prefill, small, large),
            kv_tokens=kv_tokens,
            kv_token_bytes=token_bytes,
        )
        for tp, kv_tokens, prefill, small, large in rows
    }
    for name, token_bytes, rows in (
        (
            "opt-13b",
            _OPT_13B_TOKEN_BYTES,
            (
                (1, 66_144, (18.103, 0.10191, 7.122e-6), (19.935, 6.269e-4, 0.03851), (7.166, 5.798e-4, 0.15831)),
                (2, 163_008, (14.743, 0.06858, 2.450e-6), (13.295, 3.411e-4, 0.06296), (10.639, 3.118e-4, 0.08563)),
                (4, 356_736, (12.062, 0.03808, 5.226e-7), (10.256, 1.879e-4, 0.03269), (10.484, 1.712e-4, 0.04567)),
            ),
        ),
        (
            "opt-66b",
            _OPT_66B_TOKEN_BYTES,
            (
                (2, 11_600, (43.059, 0.27423, 2.248e-5), (48.288, 9.424e-4, 0.12755), (28.728, 4.745e-4, 0.29618)),
                (4, 78_496, (29.442, 0.15135, 8.317e-6), (30.760, 4.519e-4, 0.06328), (27.471, 4.047e-4, 0.12481)),
                # No capacity is published for 8; this is that of 4 GPUs in two stages, which hold the same weights.
                (8, 212_320, (25.491, 0.10659, 3.391e-6), (23.155, 2.269e-4, 0.04801), (21.718, 3.758e-4, 0.08979)),
            ),
        ),
    )
}

__all__ = ["GPU", "LARGE_BATCH", "PUBLISHED", "PublishedModel", "PublishedStepTime"]
