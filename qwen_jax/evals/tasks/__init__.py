"""The table of benchmarks: one row each, by family in the files of this folder."""

from qwen_jax.evals.task import Task
from qwen_jax.evals.tasks import bbh, code, humanevalpack, math, multiple_choice, text

TASKS: dict[str, Task] = {
    task.name: task
    for family in (multiple_choice, math, bbh, code, humanevalpack, text)
    for task in family.TASKS
}
