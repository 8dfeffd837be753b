"""Every kind of fine-tuning, by the name that `task=NAME` gives it."""

from dsft.tasks import causal_lm, masked_lm
from dsft.tasks.task import Task, encode

__all__ = ["SETTINGS", "TASKS", "Task", "encode"]

TASKS: dict[str, Task] = {
    "causal_lm": causal_lm.TASK,
    "masked_lm": masked_lm.TASK,
}

SETTINGS = {name: task.settings for name, task in TASKS.items()}
"""Which of the settings that not every task reads each of them reads."""
