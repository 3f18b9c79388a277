"""The statistics of a reward server as Prometheus text, for a scraper on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ds_inpaint_protos.reward.v1 import reward_pb2
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reward_servers.errors import SetupError

HOST = "127.0.0.1"
PREFIX = "reward_server_"


class StatsCollector(Collector):
    """Turns what GetStats answers into metrics, whenever they are asked for."""

    def __init__(self, read_stats: Callable[[], reward_pb2.GetStatsResponse]) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        """All metrics, from one reading."""
        stats = self._read_stats()
        yield GaugeMetricFamily(f"{PREFIX}uptime_seconds", "Since the server started.", stats.uptime_seconds)
        yield GaugeMetricFamily(f"{PREFIX}queue_items", "Items that wait or are being computed.", stats.queue_items)
        requests = CounterMetricFamily(f"{PREFIX}requests", "Score calls by how they ended.", labels=["outcome"])
        for outcome in ("scored", "pushed_back", "refused", "dropped"):
            requests.add_metric([outcome], getattr(stats, f"requests_{outcome}"))
        yield requests
        items = CounterMetricFamily(f"{PREFIX}items", "Items with and without a score.", labels=["scorer", "outcome"])
        compute = CounterMetricFamily(f"{PREFIX}compute_seconds", "Time spent in a scorer.", labels=["scorer"])
        score = GaugeMetricFamily(f"{PREFIX}score", "Of all scores since the start.", labels=["scorer", "statistic"])
        for scorer in stats.scorers:
            items.add_metric([scorer.name, "scored"], scorer.items_scored)
            items.add_metric([scorer.name, "failed"], scorer.items_failed)
            compute.add_metric([scorer.name], scorer.compute_seconds)
            for statistic in ("mean", "std", "min", "max"):
                score.add_metric([scorer.name, statistic], getattr(scorer, statistic))
        yield from (items, compute, score)


@contextmanager
def metrics_endpoint(port: int, read_stats: Callable[[], reward_pb2.GetStatsResponse]) -> Iterator[str]:
    """Serve metrics over HTTP, on a thread, while the context lasts; gives the address as ``HOST:PORT``.

    Args:
        port: 0 picks a free one.
        read_stats: called on threads of its own, once for each time the metrics are fetched.

    Raises:
        SetupError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(StatsCollector(read_stats))
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise SetupError(
            f"--metrics-port {port} cannot be listened on at {HOST}: {error.strerror}. Choose another (0 picks a free "
            "one)."
        ) from error
    try:
        yield f"{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
