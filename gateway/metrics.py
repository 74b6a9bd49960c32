"""What a gateway counts, in Prometheus' text form. `vllm:` names where vLLM has one, so its dashboards and scrapers work;
`baton_` for the rest. Latencies are those of protocol.timeline, and labels come from config and enums, so their number is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.events import AttemptEnded
from gateway.session import Session
from protocol.messages import Assignment, HandoffDone, TransferFailed
from protocol.timeline import Timeline
from protocol.worker import WorkerSnapshot
from router.hindsight import Overlap, overlap

# vLLM's bounds, with finer steps below 10 ms for tokens (seconds).
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (0.005, 0.02, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
BYTES_BUCKETS = tuple(float(4**e) for e in range(6, 19))  # 4 KiB ... 64 GiB
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)

FALLBACKS = ("least_work", "recompute", "unready_router")


class Metrics:
    """One registry a gateway. `snapshots` and `gauges` are read when somebody scrapes."""

    def __init__(
        self,
        model_name: str,
        *,
        snapshots: Callable[[], list[WorkerSnapshot]],
        gauges: Callable[[], dict[str, float]],
    ) -> None:
        self.registry = CollectorRegistry()
        r, names, labels = self.registry, ("model_name",), (model_name,)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, names, buckets=buckets, registry=r).labels(*labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, names, registry=r).labels(*labels)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Gap between deliveries of a choice", TOKEN_BUCKETS)
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean time a token after the first", TOKEN_BUCKETS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end", REQUEST_BUCKETS)
        self._queue = histogram("vllm:request_queue_time_seconds", "Arrival to assignment", REQUEST_BUCKETS)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "Assignment to first token", REQUEST_BUCKETS)
        self._decode = histogram("vllm:request_decode_time_seconds", "First token to last", REQUEST_BUCKETS)
        self._prompt_len = histogram("vllm:request_prompt_tokens", "Tokens of a prompt", COUNT_BUCKETS)
        self._output_len = histogram("vllm:request_generation_tokens", "Tokens of an answer", COUNT_BUCKETS)
        self._params_n = histogram("vllm:request_params_n", "n of a request", (1, 2, 5, 10, 20))
        self._params_max = histogram("vllm:request_params_max_tokens", "max_tokens of a request", COUNT_BUCKETS)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished requests")
        self._cached_tokens = counter("vllm:prompt_tokens_cached", "Prompt tokens found in a prefix cache")
        self._output_tokens = counter("vllm:generation_tokens", "Tokens delivered")
        self._success = Counter("vllm:request_success", "Finished choices", ("model_name", "finished_reason"), registry=r)
        self._model_name = model_name

        self.http_requests = Counter("baton_http_requests", "Answers by route and status", ("route", "status"), registry=r)
        self.fallbacks = Counter("baton_fallbacks", "Times something went its second-best way", ("kind",), registry=r)
        self.slow_clients = Counter("baton_slow_clients", "Streams ended because the client did not read", registry=r)
        self._requests = Counter("baton_requests", "Requests by how they ended", ("outcome",), registry=r)
        self._attempts = Counter("baton_attempts_ended", "Attempts by the state left and the final one", ("during", "state"), registry=r)
        self._migrations = Counter("baton_migrations", "Attempts lost or given up and tried elsewhere", ("phase",), registry=r)
        self._handoff_s = Histogram("baton_kv_handoff_seconds", "Offer to verified copy", ("path",), buckets=TOKEN_BUCKETS, registry=r)
        self._handoff_bytes = Histogram("baton_kv_handoff_bytes", "Bytes of a hand-off", ("path",), buckets=BYTES_BUCKETS, registry=r)
        self._handoff_failures = Counter("baton_kv_handoff_failures", "Transfers that failed, by reason", ("error",), registry=r)
        self._placements = Counter("baton_placements", "Assignments by policy and kind", ("policy", "decision"), registry=r)
        text = "Prompts that should have found a cached prefix, by what they found: half of it or more, less, none"
        self._overlaps = Counter("baton_prefix_overlap", text, ("found",), registry=r)
        text = "From placement to first token, actual over predicted"
        self._prediction = Histogram("baton_ttft_prediction_ratio", text, buckets=RATIO_BUCKETS, registry=r)
        for verdict in Overlap:
            self._overlaps.labels(verdict.value)
        for kind in FALLBACKS:
            self.fallbacks.labels(kind)
        r.register(_Live(model_name, snapshots, gauges))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def fallback_counts(self) -> dict[str, float]:
        """Times each fallback was taken, by kind."""
        samples = [sample for family in self.fallbacks.collect() for sample in family.samples]
        return {sample.labels["kind"]: sample.value for sample in samples if sample.name.endswith("_total")}

    def delivered(self, timeline: Timeline, count: int) -> None:
        """`count` tokens were just added to this choice's timeline."""
        self._output_tokens.inc(count)
        if len(timeline.token_times_s) > 1:
            self._itl.observe(timeline.token_times_s[-1] - timeline.token_times_s[-2])

    def placed(self, policy: str, *, apart: bool) -> None:
        self._placements.labels(policy, "prefill-decode" if apart else "decode-only").inc()

    def prefilled(self, placed: Assignment, num_tokens: int, found_tokens: int | None, now: float, since_s: float | None) -> None:
        """The first token of a prompt of `num_tokens` is there; `since_s`: when it was placed, None where that is not known."""
        found = None if found_tokens is None else overlap(placed.cached_tokens, found_tokens, num_tokens)
        if found is not None:
            self._overlaps.labels(found.value).inc()
        if placed.predicted_ttft_s is not None and since_s is not None:
            self._prediction.observe((now - since_s) / max(placed.predicted_ttft_s - placed.waited_s, 1e-6))

    def attempt_ended(self, ended: AttemptEnded, *, goes_on: bool) -> None:
        """`goes_on`: a next attempt follows this one."""
        self._attempts.labels(ended.during.value, ended.state.value).inc()
        if goes_on:
            self._migrations.labels(ended.during.value).inc()

    def handed_off(self, done: HandoffDone) -> None:
        self._handoff_s.labels(done.path).observe(done.duration_s)
        self._handoff_bytes.labels(done.path).observe(done.size_bytes)

    def handoff_failed(self, failed: TransferFailed) -> None:
        self._handoff_failures.labels(failed.error).inc()
        self.fallbacks.labels("recompute").inc()

    def request_ended(self, session: Session, outcome: str) -> None:
        self._requests.labels(outcome).inc()
        request, timelines = session.request, session.timelines
        first = min((t.ttft_s for t in timelines if t.ttft_s is not None), default=None)
        if first is not None:
            self._ttft.observe(first)
            if timelines[0].queue_s is not None:
                self._queue.observe(timelines[0].queue_s)
                self._prefill.observe(max(first - timelines[0].queue_s, 0.0))
        if outcome != "finished":
            return
        self._prompt_tokens.inc(request.num_prompt_tokens)
        self._cached_tokens.inc(session.num_cached_tokens)
        self._prompt_len.observe(request.num_prompt_tokens)
        self._output_len.observe(session.num_output_tokens)
        self._params_n.observe(request.sampling.n)
        self._params_max.observe(request.sampling.max_tokens)
        if timelines[0].e2e_s is not None:
            self._e2e.observe(timelines[0].e2e_s)
            if first is not None:
                self._decode.observe(max(timelines[0].e2e_s - first, 0.0))
        for timeline, reason in zip(timelines, session.finish_reasons, strict=True):
            if timeline.tpot_s is not None:
                self._tpot.observe(timeline.tpot_s)
            if reason is not None:
                self._success.labels(self._model_name, reason.value).inc()


class _Live(Collector):
    """Gauges of the moment: this gateway's requests and the workers' last snapshots."""

    def __init__(self, model_name: str, snapshots: Callable[[], list[WorkerSnapshot]], gauges: Callable[[], dict[str, float]]) -> None:
        self._model_name = model_name
        self._snapshots = snapshots
        self._gauges = gauges

    def describe(self) -> list[Metric]:
        return []  # the names below are ours alone; nothing needs to be collected to know them

    def collect(self) -> Iterator[Metric]:
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"baton_{name}", name.replace("_", " "), value=value)
        labels = ("model_name", "engine")
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the running batch", labels=labels)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences waiting on the worker", labels=labels)
        pulling = GaugeMetricFamily("baton_kv_pulls", "Of those that wait: KV on its way to the worker", labels=("worker",))
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 is all", labels=labels)
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Sequences preempted", labels=labels)
        blocks = GaugeMetricFamily("baton_kv_blocks", "KV blocks by kind", labels=("worker", "kind"))
        unaccounted = GaugeMetricFamily("baton_kv_blocks_unaccounted", "Blocks that break the conservation law", labels=("worker",))
        steps = CounterMetricFamily("baton_worker_steps", "Steps made", labels=("worker",))
        counters = CounterMetricFamily("baton_worker_events", "What a worker counts", labels=("worker", "counter"))
        notes = GaugeMetricFamily("baton_worker_notes", "Fallbacks in force on a worker, such as torch kernels", labels=("worker",))
        for s in self._snapshots():
            engine = (self._model_name, s.worker_id)
            running.add_metric(engine, s.num_running)
            waiting.add_metric(engine, s.num_waiting)
            pulling.add_metric((s.worker_id,), s.num_pulling)
            held = s.num_blocks_owned + s.num_blocks_leased
            usage.add_metric(engine, held / s.num_blocks_total if s.num_blocks_total else 0.0)
            preemptions.add_metric(engine, s.num_preemptions)
            for kind, count in kv_blocks(s).items():
                if kind != "unaccounted":
                    blocks.add_metric((s.worker_id, kind), count)
            unaccounted.add_metric((s.worker_id,), s.num_blocks_unaccounted)
            steps.add_metric((s.worker_id,), s.step_count)
            notes.add_metric((s.worker_id,), len(s.notes))
            for name, total in sorted(s.counters.items()):
                counters.add_metric((s.worker_id, name), total)
        yield from (running, waiting, pulling, usage, preemptions, blocks, unaccounted, steps, counters, notes)


def kv_blocks(snapshot: WorkerSnapshot) -> dict[str, int]:
    """Blocks by kind: the terms of the conservation law, and what breaks it."""
    return {
        "total": snapshot.num_blocks_total,
        "free": snapshot.num_blocks_free,
        "owned": snapshot.num_blocks_owned,
        "leased": snapshot.num_blocks_leased,
        "cached": snapshot.num_blocks_cached,
        "unaccounted": snapshot.num_blocks_unaccounted,
    }
