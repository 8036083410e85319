"""What to optimise and what to report, apart from the model: ``loss`` and ``metrics`` of outputs and a batch."""

from eqvision.tasks.classification import MultiLabel, Regression, SingleLabel, Task, make_task

__all__ = ["MultiLabel", "Regression", "SingleLabel", "Task", "make_task"]
