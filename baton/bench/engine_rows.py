"""From what was measured to rows: each engine's figure, ours beside what the machine can do, and the paired ratio against each peer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from baton.bench.engine_run import BenchPlan, MeasuredModel, Sample
from baton.bench.models import bytes_per_token, prefill_flops
from baton.bench.peers import OURS
from baton.bench.report import Row, Target, Verdict, paired_ratio
from baton.bench.workloads import Measure, Workload

SCHEMA = "baton.bench.engine.v1"
MEMORY_TARGET = Target(relation="<=", bound=400.0)  # MB of a worker beyond weights and KV pool

_RATIOS: dict[tuple[str, str, str], float] = {  # (workload, model, peer): what the paired ratio is to be at least
    ("one_stream", "15m", "vllm"): 2.5,
    **{("one_stream", model, "vllm"): 1.15 for model in ("125m", "0.5b", "moe")},
    **{("one_stream", model, "llamacpp"): 1.0 for model in ("125m", "0.5b")},
    **{("batch32", model, "vllm"): 1.15 for model in ("15m", "125m", "0.5b", "moe")},
    **{("shared_prefix", model, "vllm"): 1.15 for model in ("15m", "125m", "0.5b", "moe")},
    **{("prefill2k", model, "vllm"): 1.0 for model in ("15m", "125m", "0.5b", "moe")},
}
_SHARES: dict[tuple[str, str], float] = {("one_stream", "0.5b"): 0.9, ("prefill2k", "125m"): 0.8, ("prefill2k", "0.5b"): 0.8}
_READY_S: dict[str, float] = {"125m": 5.0}


def rows_of(plan: BenchPlan, measured: MeasuredModel) -> list[Row]:
    """All rows of one model."""
    rows = list(_machine_rows(measured))
    for workload in plan.workloads:
        for index, measure in enumerate(workload.measures):
            at = "/".join(filter(None, (measured.label, workload.name, measure.name)))
            rows += _figures(plan, measured, workload, measure, index, at)
        rows += _shares(measured, workload)
    return rows + list(_own_rows(measured))


def engines_section(measured: MeasuredModel) -> dict[str, object]:
    """Who took part, and whether their float32 tokens were ours."""
    names = dict.fromkeys([*measured.engines, *measured.tokens])
    return {name: {**measured.engines.get(name, {}), "tokens": measured.tokens.get(name)} for name in names}


def _machine_rows(measured: MeasuredModel) -> Iterator[Row]:
    if measured.stream_bytes_per_s:
        yield Row(name=f"{measured.label}/stream", value=_round(statistics.median(measured.stream_bytes_per_s) / 1e9), unit="GB/s")
        yield Row(name=f"{measured.label}/gemm_peak", value=_round(statistics.median(measured.peak_flops_per_s) / 1e9), unit="GFLOP/s")


def _figures(plan: BenchPlan, measured: MeasuredModel, workload: Workload, measure: Measure, index: int, at: str) -> Iterator[Row]:
    """A row for each engine, then one for each peer beside ours."""
    for contender in plan.contenders:
        if not contender.takes_part_in(workload.name):
            continue
        name = contender.name
        samples = measured.samples.get((name, workload.name), {})
        if not samples:
            yield Row(name=f"{at}/{name}", value=None, unit=measure.unit, details={"reason": _reason(measured, name, workload)})
            continue
        yield Row(
            name=f"{at}/{name}",
            value=_round(statistics.median(sample.values[index] for sample in _quiet(samples.values()))),
            unit=measure.unit,
            details={
                "rounds": [_round(sample.values[index]) for sample in samples.values()],
                "others": [round(sample.others, 3) for sample in samples.values()],
                "disturbed": sum(sample.is_disturbed for sample in samples.values()),
            },
        )
    for contender in plan.contenders:
        if contender.name != OURS and contender.takes_part_in(workload.name):
            yield _ratio(measured, workload, measure, index, at, contender.name)


def _ratio(measured: MeasuredModel, workload: Workload, measure: Measure, index: int, at: str, peer: str) -> Row:
    """Of the undisturbed pairs; where there is none of all pairs, and then nothing is decided."""
    bound = _RATIOS.get((workload.name, measured.label, peer))
    row = Row(name=f"{at}/vs_{peer}", value=None, unit="ratio", target=None if bound is None else Target(relation=">=", bound=bound))
    ours, theirs = measured.samples.get((OURS, workload.name), {}), measured.samples.get((peer, workload.name), {})
    pairs = [(ours[i], theirs[i]) for i in ours if i in theirs]
    if not pairs:
        lost = peer if not theirs else OURS
        return replace(row, details={"reason": f"{lost}: {_reason(measured, lost, workload)}"})
    quiet = [pair for pair in pairs if not (pair[0].is_disturbed or pair[1].is_disturbed)]
    paired = paired_ratio(_values(quiet or pairs, 0, index), _values(quiet or pairs, 1, index), measure.better)
    if not quiet:
        paired = replace(paired, verdict=Verdict.UNDECIDED)
    return replace(
        row,
        value=_round(paired.median),
        is_decided=paired.verdict is not Verdict.UNDECIDED,
        details={**paired.record(), "disturbed_pairs": len(pairs) - len(quiet)},
    )


def _values(pairs: Sequence[tuple[Sample, Sample]], side: int, index: int) -> list[float]:
    return [pair[side].values[index] for pair in pairs]


def _shares(measured: MeasuredModel, workload: Workload) -> Iterator[Row]:
    """Our decoding beside the stream bandwidth, our prefill beside the GEMM peak."""
    samples = measured.samples.get((OURS, workload.name), {})
    if not samples or not measured.stream_bytes_per_s:
        return
    quiet = _quiet(samples.values())
    value = statistics.median(sample.values[0] for sample in quiet)
    is_decided = not quiet[0].is_disturbed
    bound = _SHARES.get((workload.name, measured.label))
    target = None if bound is None else Target(relation=">=", bound=bound)
    if workload.name == "one_stream":
        read_bytes = bytes_per_token(measured.model)
        shares = [
            read_bytes / (samples[i].values[0] / 1e3) / beside
            for i, beside in measured.stream_beside.items()
            if i in samples and samples[i].is_disturbed is quiet[0].is_disturbed
        ]
        if not shares:
            return
        yield Row(
            name=f"{measured.label}/{workload.name}/stream_share",
            value=_round(statistics.median(shares)),
            unit="ratio",
            target=target,
            is_decided=is_decided,
            details={"rounds": [_round(share) for share in shares]},
        )
    if workload.name.startswith("prefill"):
        flops = prefill_flops(measured.model, workload.num_prompt_tokens)
        share = flops * value / workload.num_prompt_tokens / statistics.median(measured.peak_flops_per_s)
        yield Row(
            name=f"{measured.label}/{workload.name}/peak_share", value=_round(share), unit="ratio", target=target, is_decided=is_decided
        )


def _own_rows(measured: MeasuredModel) -> Iterator[Row]:
    for name, told in measured.engines.items():
        bound = _READY_S.get(measured.label) if name == OURS else None
        target = None if bound is None else Target(relation="<=", bound=bound)
        yield Row(name=f"{measured.label}/ready/{name}", value=told["ready_s"], unit="s", target=target)
    if measured.memory_beyond_bytes is not None:
        value = _round(measured.memory_beyond_bytes / 1e6)
        yield Row(name=f"{measured.label}/memory_beyond/{OURS}", value=value, unit="MB", target=MEMORY_TARGET)


def _quiet(samples: Iterable[Sample]) -> list[Sample]:
    """The undisturbed ones; all where there is none."""
    taken = list(samples)
    return [sample for sample in taken if not sample.is_disturbed] or taken


def _reason(measured: MeasuredModel, name: str, workload: Workload) -> str:
    return measured.lost.get((name, workload.name), "not measured")


def _round(value: float) -> float:
    """Five digits say more than any of these figures holds."""
    return float(f"{value:.5g}")
