"""Figures of the server in Prometheus' text format.

`prometheus_client`, a small package without dependencies, writes them: escaping, histograms'
cumulative buckets and their locks would double the code in this file.
"""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from calm_jax.serving.engine_thread import EngineThread

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server; the engine's are read when a client asks for metrics."""

    def __init__(self, engine: EngineThread):
        self._engine = engine
        self._registry = CollectorRegistry()
        counter, histogram, gauge = (
            functools.partial(kind, registry=self._registry) for kind in (Counter, Histogram, Gauge)
        )
        path, model = ["path"], ["model"]
        self.requests = counter("calm_requests", "Requests by status", [*path, "status"])
        self.prompt_tokens = counter("calm_prompt_tokens", "Tokens of prompts", model)
        self.generated_tokens = counter("calm_generated_tokens", "Tokens of answers", model)
        what = "From the request to the first token of its answer"
        self.first_token = histogram(
            "calm_time_to_first_token_seconds", what, model, buckets=_FIRST_TOKEN
        )
        what = "From the start of a request to its end"
        self.seconds = histogram("calm_request_seconds", what, path, buckets=_REQUEST)
        self._waiting = gauge("calm_waiting_answers", "Answers that wait for a row", model)
        self._running = gauge("calm_running_rows", "Rows in use", model)
        self._acceptance = gauge("calm_draft_acceptance_ratio", "Share of accepted drafts", model)
        what = "Tokens drafted at a time; 0: drafts do not pay"
        self._draft = gauge("calm_draft_length", what, model)

    def page(self) -> bytes:
        for name in self._engine.models:
            usage = self._engine.usage(name)
            self._waiting.labels(name).set(usage.waiting)
            self._running.labels(name).set(usage.running)
            if usage.drafting is not None:
                self._draft.labels(name).set(usage.drafting.length)
                self._acceptance.labels(name).set(usage.drafting.acceptance or 0)
        return generate_latest(self._registry)
