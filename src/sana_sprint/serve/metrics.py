"""Prometheus metrics of one app. They live in a registry of their own, so that a process may have several apps."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from sana_sprint.serve.engine import BatchReport, Engine
from sana_sprint.serve.engine.job import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PICTURES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Queue depth, batch sizes, seconds by stage, jobs by outcome, refusals by code; the process' CPU and memory."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        depth = Gauge("sana_sprint_queue_depth", "Waiting jobs", registry=self._registry)
        depth.set_function(lambda: engine.queued)
        self._batches = Histogram(
            "sana_sprint_batch_pictures", "Pictures per batch", buckets=PICTURES, registry=self._registry
        )
        self._seconds = Histogram(
            "sana_sprint_stage_seconds",
            "Seconds by stage: queue and total per job, text, steps and decode per batch",
            ["stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._jobs = Counter(
            "sana_sprint_jobs", "Jobs by how they ended", ["status"], registry=self._registry
        )
        self._refused = Counter(
            "sana_sprint_refused",
            "Requests answered with an error, by its code",
            ["code"],
            registry=self._registry,
        )
        engine.on_submit.append(lambda job: job.future.add_done_callback(lambda _: self._ended(job)))
        engine.on_batch.append(self._batch)

    def refused(self, code: str) -> None:
        """Count a request that was answered with this error code."""
        self._refused.labels(code).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _batch(self, report: BatchReport) -> None:
        if report.pictures:
            self._batches.observe(report.pictures)
        for stage, seconds in report.seconds.items():
            self._seconds.labels(stage).observe(seconds)

    def _ended(self, job: Job) -> None:
        self._jobs.labels(job.status).inc()
        if job.status == "done" and job.ended is not None:
            self._seconds.labels("queue").observe(job.queue_s)
            self._seconds.labels("total").observe(job.ended - job.submitted)
