"""What the report and the release published, to stand beside results of one's own.

Sources: the Qwen technical report (arXiv 2309.16609, tables by number) and the README of
QwenLM/Qwen. A number of shots is given only where it is published.
"""

from typing import NamedTuple


class Figure(NamedTuple):
    """One published value. metric: as in the table of tasks; scaled as there."""

    model: str
    task: str
    metric: str
    mode: str
    shots: int
    value: float
    source: str


def _rows(source: str, mode: str, columns, rows) -> list[Figure]:
    """columns: (task, metric, shots). rows: model to values, None where nothing is published."""
    return [
        Figure(model, task, metric, mode, shots, value, source)
        for model, values in rows.items()
        for (task, metric, shots), value in zip(columns, values, strict=True)
        if value is not None
    ]


_ACC = "accuracy"
_BASE = [
    ("mmlu", _ACC, 5),
    ("ceval", _ACC, 5),
    ("gsm8k", _ACC, 8),
    ("math", _ACC, 4),
    ("humaneval", "pass@1", 0),
    ("mbpp", "pass@1", 3),
    ("bbh", _ACC, 3),
]
_CHAT = [
    ("mmlu", _ACC, 0), ("mmlu", _ACC, 5), ("ceval", _ACC, 0), ("ceval", _ACC, 5),
    ("gsm8k", _ACC, 0), ("gsm8k", _ACC, 8), ("humaneval", "pass@1", 0), ("bbh", _ACC, 0),
    ("bbh", _ACC, 3),
]  # fmt: skip
_CMMLU = [("cmmlu", _ACC, 5)]
_MMLU = [
    ("mmlu", f"accuracy/{group}", 5) for group in ("STEM", "Social Sciences", "Humanities", "Other")
]
_CODE = [("humaneval", "pass@1", 0), ("mbpp", "pass@1", 3)]
_CODE += [
    (f"humanevalpack_{language}", "pass@1", 0)
    for language in ("python", "js", "java", "go", "cpp", "rust")
]
_MATH = [(task, _ACC, 0) for task in ("gsm8k", "math500", "math401", "math23k")]
_TOOLS = [("tool_use", metric, 0) for metric in ("selection", "input_rouge_l", "false_positive")]
_CODE_RUN = [
    ("code_interpreter", f"executable/{kind}", 0) for kind in ("math", "visualization", "general")
] + [("code_interpreter", "executable", 0)]
_CODE_RIGHT = [("code_interpreter_gsm8k", _ACC, 0)]
_AGENT = [(f"hf_agent_{mode}", metric, 0) for mode in ("run", "chat")
          for metric in ("tool_selection", "tool_used", "code")]  # fmt: skip

FIGURES: tuple[Figure, ...] = (
    *_rows("report, table 2", "base", _BASE, {
        "Qwen-1.8B": (44.6, 54.7, 21.2, 5.6, 17.1, 14.8, 28.2),
        "Qwen-7B": (58.2, 63.5, 51.7, 11.6, 29.9, 31.6, 45.0),
        "Qwen-14B": (66.3, 72.1, 61.3, 24.8, 32.3, 40.8, 53.4),
    }),
    *_rows("README of QwenLM/Qwen", "base", _BASE + _CMMLU, {
        "Qwen-72B": (77.4, 83.3, 78.9, 35.2, 35.4, 52.2, 67.7, 83.6),
        "Qwen-1.8B (released)": (45.3, 56.1, 32.3, 2.3, 15.2, 14.2, 22.3, 52.1),
    }),
    *_rows("report, table 13", "base", _MMLU, {
        "Qwen-1.8B": (39.6, 50.0, 40.4, 51.0),
        "Qwen-7B": (50.2, 68.6, 52.5, 64.9),
        "Qwen-14B": (59.4, 76.2, 60.9, 71.8),
    }),
    *_rows("report, appendix A.2", "base", _CMMLU, {
        "Qwen-1.8B": (49.3,), "Qwen-7B": (62.2,), "Qwen-14B": (71.0,),
    }),
    *_rows("report, table 5", "chat", _CHAT, {
        "Qwen-1.8B-Chat": (42.4, 43.9, 50.7, 50.3, 27.8, 19.5, 14.6, 27.1, 25.0),
        "Qwen-7B-Chat": (55.8, 57.0, 59.7, 59.3, 50.3, 54.1, 37.2, 39.6, 46.7),
        "Qwen-14B-Chat": (64.6, 66.5, 69.8, 71.7, 60.1, 59.3, 43.9, 46.9, 58.7),
        "GPT-3.5": (None, 69.1, None, 52.5, None, 78.2, 73.2, None, 70.1),
        "GPT-4": (None, 83.0, None, 69.9, None, 91.4, 86.6, None, 86.7),
        "LLaMA2-Chat-70B": (None, 63.8, None, 44.3, None, 59.3, 32.3, None, 60.8),
    }),
    *_rows("report, section 4", "chat", _CODE, {
        "Qwen-7B-Chat": (None, 35.8, 37.2, 23.2, 32.9, 20.7, 22.0, 9.1),
        "Qwen-14B-Chat": (None, 46.4, 43.9, 38.4, 42.7, 34.1, 24.4, 18.9),
        "Code-Qwen-7B-Chat": (43.3, 44.2, 43.3, 41.5, 49.4, 29.3, 32.9, 20.1),
        "Code-Qwen-14B-Chat": (66.4, 52.4, 66.4, 58.5, 56.1, 47.6, 54.2, 28.7),
    }),
    *_rows("report, section 4", "base", _CODE, {
        "Code-Qwen-7B": (40.2, 41.8, 40.2, 40.4, 40.2, 26.2, 20.7, 15.8),
        "Code-Qwen-14B": (45.1, 51.4, 45.1, 51.8, 57.3, 39.6, 18.2, 20.7),
    }),
    *_rows("report, table 12", "chat", _MATH, {
        "Math-Qwen-7B-Chat": (62.5, 17.2, 80.8, 75.4),
        "Math-Qwen-14B-Chat": (69.8, 24.2, 85.0, 78.4),
        "Qwen-7B-Chat": (None, 6.8, 57.4, 51.2),
        "Qwen-14B-Chat": (None, 18.4, 70.1, 67.0),
        "GPT-4": (92.0, 42.5, 83.5, 74.0),
        "GPT-3.5": (80.8, 34.1, 75.1, 60.0),
    }),
    *_rows("report, table 6", "chat", _TOOLS, {
        "GPT-4": (95, 90, 15.0), "GPT-3.5": (85, 88, 75.0), "Qwen-1.8B-Chat": (92, 89, 19.3),
        "Qwen-7B-Chat": (98, 91, 7.3), "Qwen-14B-Chat": (98, 93, 2.4),
    }),
    *_rows("report, table 7", "chat", _CODE_RUN, {
        "GPT-4": (91.9, 85.9, 82.8, 86.8), "GPT-3.5": (89.2, 65.0, 74.1, 72.9),
        "Qwen-1.8B-Chat": (33.8, 30.1, 8.6, 26.8), "Qwen-7B-Chat": (82.4, 64.4, 67.2, 70.2),
        "Qwen-14B-Chat": (89.2, 84.1, 65.5, 81.7),
    }),
    *_rows("report, table 8", "chat", _CODE_RIGHT, {
        "GPT-4": (82.8,), "GPT-3.5": (47.3,), "Qwen-1.8B-Chat": (14.7,), "Qwen-7B-Chat": (41.9,),
        "Qwen-14B-Chat": (58.4,),
    }),
    *_rows("report, table 9", "chat", _AGENT, {
        "GPT-4": (100, 100, 97.4, 97.9, 97.9, 98.5),
        "GPT-3.5": (95.4, 96.3, 87.0, 97.3, 96.8, 89.6),
        "Qwen-1.8B-Chat": (85.2, 84.3, 61.1, 93.6, 93.6, 73.2),
        "Qwen-7B-Chat": (87.0, 87.0, 71.5, 94.7, 94.7, 85.1),
        "Qwen-14B-Chat": (93.5, 94.4, 87.0, 97.9, 97.9, 95.5),
    }),
)  # fmt: skip


def models() -> list[str]:
    """Every model with a published value."""
    return list(dict.fromkeys(figure.model for figure in FIGURES))


def figures_of(model: str) -> list[Figure]:
    """The published values of one model.

    Raises:
      ValueError: there are none; the text names those that have some.
    """
    found = [figure for figure in FIGURES if figure.model == model]
    if not found:
        raise ValueError(f"--report={model}: nothing published; choose of {', '.join(models())}")
    return found
