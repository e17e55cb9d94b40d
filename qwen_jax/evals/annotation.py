"""Blind sheets on which people compare the answers of two models, and their reading back.

A comparison is one prompt with the answers of two models. Every annotator gets all comparisons, in
an order and with sides of their own, both drawn from the seed and the annotator's name. The sheets
name no model; which is which stands in `key.json`, which annotators are not given. A sheet is the
same as CSV and as a page for the browser, which needs nothing but itself. Report section 3.3.
"""

import base64
import csv
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KEY_FILE = "key.json"
_PAGE = Path(__file__).with_name("annotation_page.html")
_COLUMNS = ("annotator", "comparison", "category", "prompt", "response_1", "response_2", "choice")
# What a person or a program may write into `choice`.
CHOICES = ("1", "2", "tie")


class Answer(NamedTuple):
    """One line of a result file."""

    prompt: str
    category: str
    response: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prompt and the answers of two models; `name` is made of these and tells nothing."""

    name: str
    category: str
    prompt: str
    models: tuple[str, str]
    responses: tuple[str, str]


class Vote(NamedTuple):
    """What somebody chose: the number of the better answer of `Comparison`, 0 or 1; None: a tie."""

    annotator: str
    comparison: str
    better: int | None


def read_answers(path: Path, response_field: str = "response") -> list[Answer]:
    """The answers of a model: a JSON list or JSON lines with `prompt`, `category`, the response.

    Without `category` an answer belongs to "all".

    Raises:
      ValueError: not such a file, or two answers to one prompt.
    """
    text = path.read_text(encoding="utf-8")
    try:
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(x) for x in text.split("\n") if x]
    except ValueError as error:
        raise ValueError(f"{path}: neither a JSON list nor JSON lines ({error})") from error
    answers, seen = [], set()
    for number, row in enumerate(rows, 1):
        for field in ("prompt", response_field):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f"{path}, record {number}: no text in field {field!r}")
        row = {"category": "all"} | row
        if row["prompt"] in seen:
            raise ValueError(f"{path}, record {number}: a second answer to {row['prompt'][:60]!r}")
        seen.add(row["prompt"])
        answers.append(Answer(row["prompt"], str(row["category"]), row[response_field]))
    if not answers:
        raise ValueError(f"{path}: there are no answers in it")
    return answers


def compare(results: dict[str, list[Answer]], baseline: str | None) -> list[Comparison]:
    """Comparisons of every model with the baseline, or of all with all if there is none.

    Raises:
      ValueError: fewer than two models, an unknown baseline, or other prompts or categories.
    """
    names = list(results)
    if len(names) < 2 or (baseline is not None and baseline not in names):
        raise ValueError(f"two models and one of them as baseline are needed; got {names}")
    by_prompt = {
        name: {answer.prompt: answer for answer in answers} for name, answers in results.items()
    }
    first = results[names[0]]
    for name in names[1:]:
        other = by_prompt[name]
        missing = {answer.prompt for answer in first} ^ other.keys()
        if missing:
            raise ValueError(
                f"{names[0]} and {name} do not answer the same prompts: {len(missing)} are in one "
                f"file only, for example {sorted(missing)[0][:60]!r}"
            )
        for answer in first:
            if other[answer.prompt].category != answer.category:
                raise ValueError(f"{answer.prompt[:60]!r} has another category in {name}")
    if baseline is None:
        pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    else:
        pairs = [(name, baseline) for name in names if name != baseline]
    found = []
    for models in pairs:
        for prompt, category, _ in first:
            responses = tuple(by_prompt[model][prompt].response for model in models)
            facts = json.dumps([prompt, models, responses])
            name = hashlib.sha256(facts.encode()).hexdigest()[:12]
            found.append(Comparison(name, category, prompt, models, responses))
    return found


def _sheet(comparisons: Sequence[Comparison], annotator: str, seed: int) -> list[tuple[int, int]]:
    """Order and sides for one annotator: (number of the comparison, which answer is shown first).

    Each model stands first in half of the comparisons.
    """
    rng = random.Random(f"{seed}/{annotator}")
    order = list(range(len(comparisons)))
    sides = [place % 2 for place in order]
    rng.shuffle(order)
    rng.shuffle(sides)
    return list(zip(order, sides))


def write_sheets(
    comparisons: Sequence[Comparison], annotators: Sequence[str], seed: int, folder: Path
) -> list[Path]:
    """Writes NAME.csv and NAME.html for each annotator, and the key; returns the sheets.

    Raises:
      ValueError: no annotators, two of one name, or a name that is no file name.
    """
    if not annotators or len(set(annotators)) != len(annotators):
        raise ValueError(f"annotators {list(annotators)}: give different names")
    for name in annotators:
        if not name or Path(name).name != name or name == Path(KEY_FILE).stem:
            raise ValueError(f"annotator {name!r}: the name becomes that of a file")
    folder.mkdir(parents=True, exist_ok=True)
    first_sides, written = {}, []
    for annotator in annotators:
        rows = []
        first_sides[annotator] = {}
        for number, side in _sheet(comparisons, annotator, seed):
            item = comparisons[number]
            first_sides[annotator][item.name] = side
            shown = item.responses[side], item.responses[1 - side]
            rows.append((annotator, item.name, item.category, item.prompt, *shown, ""))
        cells = [[_cell(text) for text in row] for row in rows]
        path = folder / f"{annotator}.csv"
        with open(path, "w", encoding="utf-8-sig", newline="") as file:  # with a mark for Excel
            csv.writer(file).writerows([_COLUMNS, *cells])
        page = folder / f"{annotator}.html"
        page.write_text(_page(annotator, rows), encoding="utf-8")
        written += [path, page]
    key = {
        "seed": seed,
        "comparisons": [dataclasses.asdict(item) for item in comparisons],
        "first_answer": first_sides,
    }
    (folder / KEY_FILE).write_text(json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    return written


def _cell(text: str) -> str:
    """A cell that spreadsheets show and do not compute: an answer may begin with `=`."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _page(annotator: str, rows: Sequence[Sequence[str]]) -> str:
    """The page with its data inside, where no text can end the element that holds them."""
    items = [dict(zip(_COLUMNS[1:-1], row[1:-1], strict=True)) for row in rows]
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:12]
    data = json.dumps({"annotator": annotator, "sheet": digest, "items": items}, ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        data = data.replace(char, f"\\u{ord(char):04x}")
    template = _PAGE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser runs this one script, and loads nothing.
    return template.replace("SCRIPT_HASH", script_hash).replace("SHEET_DATA", data)


def read_key(folder: Path) -> tuple[list[Comparison], dict[str, dict[str, int]]]:
    """The comparisons, and for each annotator which answer was shown first.

    Raises:
      ValueError: there is no key.
    """
    path = folder / KEY_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: name the folder that `sheets` wrote")
    key = json.loads(path.read_text(encoding="utf-8"))
    comparisons = [
        Comparison(
            item["name"],
            item["category"],
            item["prompt"],
            tuple(item["models"]),
            tuple(item["responses"]),
        )
        for item in key["comparisons"]
    ]
    return comparisons, key["first_answer"]


def read_votes(paths: Iterable[Path], first_answer: dict[str, dict[str, int]]) -> list[Vote]:
    """Votes from filled sheets: CSV, or CSV or JSON from the page. Empty choices are left out.

    Raises:
      ValueError: a sheet of another folder, a choice that is none, or two votes on one comparison.
    """
    votes, seen = [], set()
    for path in paths:
        for number, row in enumerate(_rows(path), 1):
            where = f"{path}, row {number}"
            annotator, name, choice = (
                row[field] for field in ("annotator", "comparison", "choice")
            )
            if annotator not in first_answer or name not in first_answer[annotator]:
                raise ValueError(f"{where}: {annotator!r} was given no comparison {name!r}")
            choice = choice.strip().lower()
            if not choice:
                continue
            if choice not in CHOICES:
                raise ValueError(f"{where}: choice {choice!r} is none of {', '.join(CHOICES)}")
            if (annotator, name) in seen:
                raise ValueError(f"{where}: a second vote of {annotator!r} on {name!r}")
            seen.add((annotator, name))
            first = first_answer[annotator][name]
            better = None if choice == "tie" else first if choice == "1" else 1 - first
            votes.append(Vote(annotator, name, better))
    return votes


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if path.suffix == ".json" else None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if rows is None:
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    for number, row in enumerate(rows, 1):
        for field in ("annotator", "comparison", "choice"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f"{path}, row {number}: no column {field!r}")
    return rows
