"""BIG-Bench Hard: 27 tasks, three worked examples with their reasoning (arXiv 2210.09261).

The report took its numbers from OpenCompass, whose prompt and rules these are: one line of
instruction, the examples of the task's own file, the question; up to 512 new tokens. 17 tasks end
in a letter, 10 in free text, which is compared without regard to case. The score is the mean over
tasks.

Without examples no prompt is published: here it is the description at the head of the task's file,
then the question. Base models stop where they begin a question of their own.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.evals import reading
from qwen_jax.evals.task import (
    ACCURACY,
    BASE,
    CHAT,
    Answer,
    Item,
    Metric,
    Query,
    Setting,
    Task,
    Verdict,
    Write,
    verdict,
)
from qwen_jax.evals.tasks.subjects import words

SOURCE = "github.com/suzgunmirac/BIG-Bench-Hard, bbh/*.json and cot-prompts/*.txt (MIT)"
LETTERS = words("""
    date_understanding disambiguation_qa geometric_shapes hyperbaton logical_deduction_five_objects
    logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation
    penguins_in_a_table reasoning_about_colored_objects ruin_names
    salient_translation_error_detection snarks temporal_sequences
    tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects
    tracking_shuffled_objects_three_objects
""")
FREE = words("""
    boolean_expressions causal_judgement dyck_languages formal_fallacies multistep_arithmetic_two
    navigate object_counting sports_understanding web_of_lies word_sorting
""")


def read(folder: Path, setting: Setting) -> list[Item]:
    """The items of every task that is there, with the head and examples of its prompt file."""
    items = []
    for name in sorted([*LETTERS, *FREE]):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        [content] = reading.read_json(path, "examples")
        prompt = reading.find(folder, (f"cot-prompts/{name}.txt",), SOURCE)
        parts = split_prompt(reading.read_text(prompt))
        if len(parts) <= setting.shots:
            raise ValueError(f"{prompt}: {len(parts) - 1} examples, but --shots={setting.shots}")
        shots = parts[: 1 + setting.shots]
        items += [
            Item(f"{name}/{number}", name, row, shots)
            for number, row in enumerate(content["examples"])
        ]
    if not items:
        raise ValueError(
            f"{folder}: none of the 27 task files is there; the official data: {SOURCE}"
        )
    return items


def split_prompt(text: str) -> tuple[str, ...]:
    """The description and the worked examples of a prompt file, without the canary above them."""
    text = text.partition("-----\n")[2] or text
    return tuple(re.split(r"\n\n(?=Q: )", text.strip("\n")))


def query(item: Item, setting: Setting) -> Query:
    """The question after its examples."""
    intro = "Follow the given examples and answer the question.\n" if setting.shots else ""
    shown = "\n\n".join(item.shots)
    prompt = f"{intro}{shown}\n\nQ: {item.row['input']}\nA: Let's think step by step."
    return Write(prompt, 512, () if setting.mode == CHAT else ("\n\nQ: ",))


def extract(text: str, is_letter: bool) -> str:
    """What follows the first "answer is": a letter, or the first line without its full stop."""
    parts = text.split("answer is ")
    if len(parts) > 1:
        text = parts[1].strip()
    if is_letter:
        found = re.search(r"\(([A-Z])\)*", text) or re.search(r"([A-Z])", text)
        return found.group(1) if found else text
    return text.split("\n")[0].strip().removesuffix(".").strip()


def score(item: Item, answers: Sequence[Answer], setting: Setting, tokenizer: object) -> Verdict:
    """The extracted answer against the target, both read by the same rule."""
    del setting, tokenizer
    is_letter = item.group in LETTERS
    found, target = extract(answers[0].text, is_letter), item.row["target"]
    if is_letter:
        return verdict(found, target, found == extract(target, True))
    return verdict(found, target, found.casefold() == target.casefold())


TASKS = (
    Task(
        name="bbh",
        about="27 reasoning tasks, English",
        source=SOURCE,
        folder="bbh",
        shots={BASE: 3, CHAT: 0},
        max_shots=3,
        read=read,
        query=query,
        score=score,
        metrics=(
            ACCURACY._replace(average="macro"),
            Metric("accuracy/letters", "correct", "macro", tuple(LETTERS)),
            Metric("accuracy/free_form", "correct", "macro", tuple(FREE)),
        ),
        num_groups=27,
    ),
)
