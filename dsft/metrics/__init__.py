"""Metrics: what is declared of each number, and the sums that it is formed from."""

from dsft.metrics.declared import comparable, declare
from dsft.metrics.ledger import Ledger
from dsft.metrics.metric import SHOWN, Metric, Reduction, Row, form, judged, mean
from dsft.metrics.tally import Tally

__all__ = ["SHOWN", "Ledger", "Metric", "Reduction", "Row", "Tally", "comparable", "declare", "form", "judged", "mean"]
