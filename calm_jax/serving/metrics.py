"""Figures of the server in Prometheus' text format.

`prometheus_client`, a small package without dependencies, writes them: escaping, histograms'
cumulative buckets and their locks would double the code in this file.
"""

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from calm_jax.serving.engine_thread import EngineThread

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


__all__ = ["CONTENT_TYPE", "Metrics"]


class Metrics:
    """Counters of one server; the engine's are read when a client asks for metrics."""

    def __init__(self, engine: EngineThread):
        self._engine = engine
        self._registry = registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter(
            "calm_requests", "Requests by status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "calm_prompt_tokens", "Tokens of prompts", model, registry=registry
        )
        self.generated_tokens = Counter(
            "calm_generated_tokens", "Tokens of answers", model, registry=registry
        )
        self.first_token = Histogram(
            "calm_time_to_first_token_seconds",
            "From the request to the first token of its answer",
            model,
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self.seconds = Histogram(
            "calm_request_seconds",
            "From the start of a request to its end",
            ["path"],
            buckets=_REQUEST,
            registry=registry,
        )
        self._waiting = Gauge(
            "calm_waiting_answers", "Answers that wait for a row", model, registry=registry
        )
        self._running = Gauge("calm_running_rows", "Rows in use", model, registry=registry)
        self._acceptance = Gauge(
            "calm_draft_acceptance_ratio", "Share of accepted drafts", model, registry=registry
        )
        self._draft = Gauge(
            "calm_draft_length",
            "Tokens drafted at a time; 0: drafts do not pay",
            model,
            registry=registry,
        )

    def page(self) -> bytes:
        for name in self._engine.models:
            usage = self._engine.usage(name)
            self._waiting.labels(name).set(usage.waiting)
            self._running.labels(name).set(usage.running)
            if usage.drafting is not None:
                self._draft.labels(name).set(usage.drafting.length)
                self._acceptance.labels(name).set(usage.drafting.acceptance or 0)
        return generate_latest(self._registry)
