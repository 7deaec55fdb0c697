"""What Prometheus is told of a service that answers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge_client.inference.model import Model
from edge_client.inference.speed import resident_mb

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Figures:
    """Counts since the service started, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("clipcast_requests", "Requests by status", ["status"], registry=self.registry)
        self.pictures = Counter("clipcast_pictures", "Pictures that were answered", registry=self.registry)
        self.failures = Counter("clipcast_failures", "Pictures that the model could not answer", registry=self.registry)
        self.seconds = Histogram(
            "clipcast_answer_seconds", "From decoded picture to answer", buckets=SECONDS, registry=self.registry
        )
        self.version = Gauge("clipcast_release", "Release that answers, 0 if none", registry=self.registry)
        self.model = Gauge("clipcast_model", "The model that answers", ["model", "flavour", "round"], registry=self.registry)
        memory = Gauge("clipcast_resident_bytes", "Resident memory", registry=self.registry)
        memory.set_function(lambda: resident_mb() * 1e6)

    def text(self, model: Model | None, version: int) -> bytes:
        """Return all of it in Prometheus' format."""
        self.version.set(version)
        self.model.clear()
        if model is not None:
            self.model.labels(model.facts.model, model.facts.flavour, str(model.facts.round)).set(1)
        return bytes(generate_latest(self.registry))
