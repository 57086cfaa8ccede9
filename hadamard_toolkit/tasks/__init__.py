"""Tasks: named data sets with splits, columns, labels, metrics and provenance."""

from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.tasks.registry import TASKS, load_task

__all__ = ["TASKS", "Task", "load_task"]
