"""What Prometheus reads: requests, batches, versions, feedback, what was degraded."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Measures"]

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096)


class Measures:
    """One process' figures, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "jaxrec_requests", "Answered requests.", ["route", "status"], registry=self._registry
        )
        self._latency = Histogram(
            "jaxrec_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._batch_size = Histogram(
            "jaxrec_batch_size", "Users a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=self._registry
        )
        self._batch_seconds = Histogram(
            "jaxrec_batch_seconds", "Time to compute a batch.", buckets=_SECONDS, registry=self._registry
        )
        self._ranker_seconds = Histogram(
            "jaxrec_ranker_seconds",
            "Time of the task heads for a batch.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._feedback = Counter("jaxrec_feedback_events", "New events.", registry=self._registry)
        self._degraded = Counter(
            "jaxrec_degraded",
            "Answers without the model, its heads or their order.",
            ["why"],
            registry=self._registry,
        )
        self._reload_failures = Counter(
            "jaxrec_reload_failures", "Versions that could not be loaded.", registry=self._registry
        )
        self._alike = Histogram(
            "jaxrec_shadow_overlap",
            "Share of a list that the shadow's list has, too.",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            registry=self._registry,
        )
        self._shadow_seconds = Histogram(
            "jaxrec_shadow_seconds", "Time of the shadow's list.", buckets=_SECONDS, registry=self._registry
        )
        self._shadow_failures = Counter(
            "jaxrec_shadow_failures", "Lists that the shadow could not make.", registry=self._registry
        )
        self._version = Gauge(
            "jaxrec_model_version", "1 = the newest version.", ["version"], registry=self._registry
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """One was answered."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """One was computed."""
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def ranked(self, size: int, seconds: float) -> None:
        """Task heads have judged the candidates of a batch."""
        self._ranker_seconds.observe(seconds)

    def feedback(self, new: int) -> None:
        """Events were taken."""
        self._feedback.inc(new)

    def degraded(self, why: str) -> None:
        """An answer lacks the model, its heads or the wanted order."""
        self._degraded.labels(why).inc()

    def shadow(self, alike: float, seconds: float) -> None:
        """The shadow has answered: the share of the list that its list has, too, and its time."""
        self._alike.observe(alike)
        self._shadow_seconds.observe(seconds)

    def shadow_failed(self) -> None:
        """The shadow could not answer."""
        self._shadow_failures.inc()

    def reload_failed(self) -> None:
        """A version could not be loaded."""
        self._reload_failures.inc()

    def version(self, name: str) -> None:
        """A version is the newest now."""
        self._version.clear()
        self._version.labels(name).set(1)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
