"""Every kind of fine-tuning, by the name that `task=NAME` gives it."""

from dsft.tasks import causal_lm, classify, extract, masked_lm, regress, seq2seq, tag
from dsft.tasks.task import Task, encode

__all__ = ["TASKS", "Task", "encode", "settings_by_task"]

TASKS: dict[str, Task] = {
    "causal_lm": causal_lm.TASK,
    "masked_lm": masked_lm.TASK,
    "classify": classify.TASK,
    "regress": regress.TASK,
    "tag": tag.TASK,
    "extract": extract.TASK,
    "seq2seq": seq2seq.TASK,
}


def settings_by_task() -> dict[str, frozenset[str]]:
    """Which of the settings that not every task reads each of them reads."""
    return {name: task.settings for name, task in TASKS.items()}
