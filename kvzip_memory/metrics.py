"""An engine's counters for Prometheus. Needs ``pip install "kvzip-memory[prometheus]"``."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvzip_memory.engine import KVzipEngine


class EngineCollector(Collector):
    """Reads :meth:`KVzipEngine.stats` whenever Prometheus asks; nothing is counted twice.

    .. code-block:: python

        export_metrics(engine)
        prometheus_client.start_http_server(9100)
    """

    def __init__(self, engine: KVzipEngine, name: str) -> None:
        self._engine, self._name = engine, name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        labels = ["engine", "tier"]
        nbytes = GaugeMetricFamily("kvzip_tier_bytes", "Bytes of contexts in a tier", labels=labels)
        budget = GaugeMetricFamily("kvzip_tier_budget_bytes", "Budget of a tier", labels=labels)
        contexts = GaugeMetricFamily("kvzip_tier_contexts", "Contexts in a tier", labels=labels)
        for tier, facts in stats["tiers"].items():
            for family, value in ((nbytes, facts["nbytes"]), (budget, facts["budget"]), (contexts, facts["contexts"])):
                if value is not None:
                    family.add_metric([self._name, tier], value)
        lookups = CounterMetricFamily("kvzip_lookups", "Lookups by the tier that answered, or built", labels=labels)
        for tier, count in {**stats["hits"], "built": stats["built"]}.items():
            lookups.add_metric([self._name, tier], count)
        events = CounterMetricFamily("kvzip_events", "Moves between tiers and what went wrong", labels=["engine", "event"])
        for event in ("promotions", "evictions", "dropped", "shrunk", "stored", "quarantined", "disk_errors"):
            events.add_metric([self._name, event], stats[event])
        for tier, count in stats["spills"].items():
            events.add_metric([self._name, f"spills_{tier}"], count)
        answers = GaugeMetricFamily("kvzip_answers", "Answers that run, and that wait for their turn", labels=["engine", "state"])
        for state in ("running", "waiting"):
            answers.add_metric([self._name, state], stats[state])
        oldest = GaugeMetricFamily("kvzip_oldest_wait_seconds", "How long the oldest of those has waited", labels=["engine"])
        oldest.add_metric([self._name], stats["oldest_wait_s"])
        turns = GaugeMetricFamily("kvzip_turns_bytes", "Bytes of turns that sessions keep as text in cache_dir", labels=["engine"])
        turns.add_metric([self._name], stats["turns"]["nbytes"])
        yield from (nbytes, budget, contexts, lookups, events, answers, oldest, turns)


def export_metrics(engine: KVzipEngine, name: str = "default", registry: CollectorRegistry = REGISTRY) -> EngineCollector:
    """Let a Prometheus registry read an engine's counters.

    Args:
        name: the ``engine`` label, to tell several apart.

    Raises:
        ValueError: the registry already has an engine; give each a registry of its own.
    """
    collector = EngineCollector(engine, name)
    registry.register(collector)
    return collector
