"""What Prometheus reads of a service."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tca4rec_jax.serving.batcher import Ran

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self):
        self.registry = of = CollectorRegistry()
        name = "tca4rec_{}".format
        self.requests = Counter(
            name("requests"), "Answers, by route and status.", ["route", "status"], registry=of
        )
        self.seconds = Histogram(
            name("request_seconds"), "From a request's head to its answer.", ["route"],
            buckets=_SECONDS, registry=of,
        )  # fmt: skip
        self.batch_rows = Histogram(
            name("batch_rows"), "Histories searched together.", buckets=_ROWS, registry=of
        )
        self.batch_seconds = Histogram(
            name("batch_seconds"), "Of one batch.", buckets=_SECONDS, registry=of
        )
        self.waited_seconds = Histogram(
            name("waited_seconds"), "Of a history in the queue.", buckets=_SECONDS, registry=of
        )
        self.waiting = Gauge(name("waiting"), "Histories in the queue.", registry=of)
        self.ready = Gauge(name("ready"), "1 if requests are taken.", registry=of)
        self.compilations = Gauge(
            name("compilations"), "Programs compiled since the start.", registry=of
        )
        self.loads = Counter(
            name("loads"), "Runs loaded, by outcome.", ["outcome"], registry=of
        )  # fmt: skip

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def searched(self, ran: Ran) -> None:
        """One batch."""
        self.batch_rows.observe(ran.rows)
        self.batch_seconds.observe(ran.seconds)
        for seconds in ran.waited:
            self.waited_seconds.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
