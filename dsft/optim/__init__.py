"""Optimisers and schedules: which parameters get which rate, who applies it, and how it moves over the run."""

from dsft.optim.build import build
from dsft.optim.groups import parameter_groups
from dsft.optim.schedule import Schedule, apply

__all__ = ["Schedule", "apply", "build", "parameter_groups"]
