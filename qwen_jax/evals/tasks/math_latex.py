"""MATH: competition problems with answers in LaTeX (arXiv 2103.03874), four examples.

The report names OpenCompass for its numbers, which uses the four examples of Minerva (arXiv
2206.14858, appendix D): `Problem:`, `Solution:`, `Final Answer: The final answer is $X$. I hope it
is correct.` They are read from a file of the user's, blocks separated by blank lines; the problem
follows in the same form. `math` is the whole test split, `math500` the 500 problems of Lightman et
al. 2023, which the report uses for Math-Qwen. Chat models get the same text in one user turn, or
the problem alone.

The answer is what the last balanced `\\boxed{}` holds, else what follows "answer is", cleaned as
Minerva does. Answers are equal when they are the same text after the normalisation of the authors
of MATH: fractions, roots, units, spaces, degrees. (OpenCompass cuts the sentence at the first full
stop and so loses decimals; that is not copied.)
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
    ACCURACY,
    BASE,
    CHAT,
    Answer,
    Item,
    Query,
    Setting,
    Task,
    Verdict,
    Write,
    verdict,
)

SOURCE = "github.com/hendrycks/math, MATH.tar: test/*/*.json (MIT)"
SOURCE_500 = "github.com/openai/prm800k, prm800k/math_splits/test.jsonl (MIT)"
PROMPT_SOURCE = "appendix D of arXiv 2206.14858, or minerva_math of lm-evaluation-harness (MIT)"
_REMOVED = """
    square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes digits
    cents degrees cm gm pounds meters meals edges students childrentickets multiples
""".split()  # noqa: SIM905
_REMOVED += ["\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}"]
_REMOVED += ["\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"']
_REMOVED += ["\\dots", "\n", "\r", "\f"]
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"), ("\\le", "<"),
)  # fmt: skip
_SENTENCE = re.compile(
    r"answer is:?\s*(.*?)\s*(?:\.?\s*I hope it is correct|\.\s|\.?$|\n)", re.IGNORECASE
)


def read(is_500: bool, folder: Path, setting: Setting) -> list[Item]:
    """The test problems with the examples."""
    items = []
    if is_500:
        path = reading.find(folder, ("test.jsonl", "*500*.jsonl"), SOURCE_500)
        for number, row in enumerate(reading.read_json(path, "problem", "answer")):
            items.append(Item(str(number), "", row))
    else:
        for path in reading.find_all(folder, "test/*/*.json", SOURCE):
            [row] = reading.read_json(path, "problem", "solution")
            answer = last_boxed(row["solution"])
            if answer is None:
                raise ValueError(f"{path}: the solution has no \\boxed answer")
            row = {**row, "answer": answer}
            items.append(Item(f"{path.parent.name}/{path.stem}", path.parent.name, row))
    shots = _examples(folder, setting.shots)
    return [item._replace(shots=shots) for item in items]


def _examples(folder: Path, count: int) -> tuple[str, ...]:
    if not count:
        return ()
    path = reading.find(folder, ("prompt_4shot.txt", "*prompt*.txt"), PROMPT_SOURCE)
    blocks = re.split(r"\n\s*\n(?=Problem:)", reading.read_text(path).strip())
    if len(blocks) < count:
        raise ValueError(f"{path}: {len(blocks)} examples, but --shots={count}")
    return tuple(blocks[:count])


def query(item: Item, setting: Setting) -> Query:
    """The problem after the examples, in their form."""
    problem = item.row["problem"]
    if setting.mode == CHAT and not item.shots:
        return Write(problem, 512)
    shown = "".join(block + "\n\n" for block in item.shots)
    stops = () if setting.mode == CHAT else ("Problem:",)
    return Write(f"{shown}Problem:\n{problem}\nSolution:\n", 512, stops)


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` or `\\fbox{}` holds; None without one, or when it never closes."""
    place = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if place < 0:
        return None
    short = re.match(r"\\f?boxed? ([^$\s]+)", text[place:])
    if short:
        return short.group(1)
    depth, start = 0, text.find("{", place)
    if start < 0:
        return None
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 1 : end]
    return None


def extract(text: str) -> str | None:
    """The answer in a solution."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    found = _SENTENCE.findall(text)
    return clean(found[-1]) if found else None


def clean(answer: str) -> str:
    """A final answer without units, words and mark-up (Minerva)."""
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    answer = re.sub(r"\\(?:text|textbf|overline)\{(.*?)\}", r"\1", answer)
    inside = re.findall(r"\$(.*?)\$", answer)
    answer = (inside[-1] if inside else answer).strip()
    answer = re.sub(r"(frac)([^{])(.)", r"\1{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"\1{\2}", answer).replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


def equivalent(first: str | None, second: str | None) -> bool:
    """Whether two answers are the same text once normalised."""
    return first is not None and second is not None and normal(first) == normal(second)


def normal(text: str) -> str:
    """An answer in the normal form of the authors of MATH."""
    for removed in ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%"):
        text = text.replace(removed, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.split("\\text{ ")[0]  # units stand at the end
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    parts = text.split("=")
    if len(parts) == 2 and len(parts[0]) <= 2:  # `k = 5`
        text = parts[1]
    text = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    text = re.sub(r"\\frac(?!\{)(.)(?!\{)(.)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(?!\{)(.)(?=\{)", r"\\frac{\1}", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def score(item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object) -> Verdict:
    """The answer of the solution against the gold one."""
    del setting, tokenizer
    found = extract(answers[0].text)
    return verdict(found, item.row["answer"], equivalent(found, item.row["answer"]))


TASKS = tuple(
    Task(
        name=name,
        about=about,
        source=f"{source}; examples: {PROMPT_SOURCE}",
        folder=name,
        shots={BASE: 4, CHAT: 0},
        max_shots=4,
        read=partial(read, is_500),
        query=query,
        score=score,
        metrics=(ACCURACY,),
    )
    for name, about, source, is_500 in (
        ("math", "5,000 competition problems, LaTeX", SOURCE, False),
        ("math500", "500 of them (Lightman et al. 2023)", SOURCE_500, True),
    )
)
