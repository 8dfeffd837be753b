"""Metrics: their names and units, and the sums they are made of."""

from dsft.metrics.names import METRICS, Metric
from dsft.metrics.tally import Tally

__all__ = ["METRICS", "Metric", "Tally"]
