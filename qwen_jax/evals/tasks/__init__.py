"""The table of benchmarks: one row each, by family in the files of this folder."""

from qwen_jax.evals.task import Task
from qwen_jax.evals.tasks import (
    bbh,
    code,
    code_interpreter,
    hf_agent,
    humanevalpack,
    math,
    math_latex,
    multiple_choice,
    text,
    tool_use,
)

TASKS: dict[str, Task] = {
    task.name: task
    for family in (
        multiple_choice,
        math,
        math_latex,
        bbh,
        code,
        humanevalpack,
        tool_use,
        code_interpreter,
        hf_agent,
        text,
    )  # fmt: skip
    for task in family.TASKS
}
