"""Figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hinny.infer.server.answers import Usage
from hinny.infer.stats import Stats

FIRST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, figures: Callable[[], Stats]) -> None:
        """figures: the core's, as of its last step."""
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("hinny_requests", "Answers, by endpoint and status.", ["endpoint", "status"],
                                registry=registry)
        self.cancelled = Counter("hinny_requests_abandoned", "Requests whose client left before the end.",
                                 registry=registry)
        self.refused = Counter("hinny_queue_refusals", "Requests refused because too many were waiting.",
                               registry=registry)
        self.exceptions = Counter("hinny_exceptions", "Requests that ended by a fault of the server's own.",
                                  registry=registry)
        self.faults = Counter("hinny_stream_faults", "Streams that began and ended with an error, by its status.",
                              ["status"], registry=registry)
        self._read = Counter("hinny_prompt_tokens", "Tokens of prompts, cached ones included.", registry=registry)
        self._cached = Counter("hinny_cached_tokens", "Tokens of prompts that were not read again.", registry=registry)
        self._written = Counter("hinny_generated_tokens", "Tokens written.", registry=registry)
        self.first = Histogram("hinny_time_to_first_token_seconds", "From a request's arrival to its first token.",
                               buckets=FIRST, registry=registry)
        self.each = Histogram("hinny_time_per_token_seconds", "Between two tokens of a continuation.", buckets=EACH,
                              registry=registry)
        self.whole = Histogram("hinny_request_seconds", "From a request's arrival to its last token.", buckets=WHOLE,
                               registry=registry)
        registry.register(_Core(figures))

    def count(self, usage: Usage) -> None:
        """The tokens of an answer that has ended, however it did."""
        self._read.inc(usage.prompt)
        self._cached.inc(usage.cached)
        self._written.inc(usage.completion)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Core(Collector):
    """The core's own figures, read when they are asked for."""

    def __init__(self, figures: Callable[[], Stats]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        now = self._figures()
        for name, value, what in (
                ("sequences_running", now.running, "Continuations at work."),
                ("sequences_waiting", now.waiting, "Continuations that wait for a place."),
                ("pages", now.pages, "Pages of keys and values."),
                ("pages_used", now.pages_used, "Those in use, by sequences and by the prefix cache."),
                ("pages_cached", now.pages_cached, "Those that the prefix cache alone has: room for who needs it."),
                ("slots", now.slots, "Slots for states of Mamba layers."),
                ("slots_used", now.slots_used, "Those in use, by sequences and by the prefix cache."),
                ("slots_cached", now.slots_cached, "Those that the prefix cache alone has."),
                ("state_bytes", now.bytes, "Memory of all pages and slots."),
                ("state_bytes_used", now.bytes_used, "Memory of those in use.")):
            yield GaugeMetricFamily(f"hinny_{name}", what, value)
        for name, value, what in (
                ("read_tokens", now.read, "Tokens that ran through the model to be read, again after a pre-emption."),
                ("preemptions", now.preemptions, "Times that a sequence gave its memory to an older one."),
                ("prefix_lookups", now.prompts, "Prompts that were looked up in the prefix cache, each once."),
                ("prefix_hits", now.hits, "Prompts of which it held a beginning."),
                ("drafted_tokens", now.drafted, "Tokens guessed from the text so far."),
                ("accepted_tokens", now.accepted, "Guesses that the model confirmed."),
                ("failed_copies", now.failed_copies, "Copies of states that failed, without which requests went on.")):
            yield CounterMetricFamily(f"hinny_{name}", what, value)
