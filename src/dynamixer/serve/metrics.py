"""What a server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        options: dict[str, Any] = {"registry": self.registry, "namespace": "dynamixer"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **options)
        self.seconds = Histogram(
            "request_seconds", "From the head of a request to its answer.", ["path"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30), **options,
        )  # fmt: skip
        self.batch = Histogram(
            "batch_pictures", "Pictures that the model took at once.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **options
        )
        self.inside = Gauge("requests_inside", "Requests between their last byte and their answer.", **options)
        self.held = Gauge("body_bytes", "Bytes of bodies that are held.", **options)
        self.unsent = Gauge("answer_bytes", "Bytes of large answers that are being sent.", **options)
        self.ready = Gauge("ready", "1 once the warm-up inference matched its golden answer.", **options)

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)
