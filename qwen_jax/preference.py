"""Which model's answers do people prefer: `python -m qwen_jax.preference sheets` and `table`.

    sheets --results=ours=a.jsonl,gpt=b.jsonl --baseline=gpt --annotators=ann,bo,cy --out=DIR
    table --sheets=DIR --annotations='DIR/filled/*.csv' --baseline=gpt --out=table.json

`sheets` writes for each annotator the same blind comparisons, as NAME.csv and as NAME.html, a page
for the browser, and `key.json`, which says whose answers they are: keep that one. A result file is
a JSON list or JSON lines with `prompt`, `category` and `response` (`--response_field=text` for what
`python -m qwen_jax.generate` writes). `table` counts what came back; see `evals/preference.py`.

A reward model can stand in for people: `sheets` also writes `score_data.jsonl`; with the answers of
`python -m qwen_jax.score --data=DIR/score_data.jsonl --out=scored.jsonl`, `table --scores=
scored.jsonl` in place of `--annotations` makes the table, which says so. Exit codes: 0 done, 2 a
wrong setting or file. Report section 3.3 and appendix A.2.2.
"""

import dataclasses
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from qwen_jax import commandline
from qwen_jax.evals import annotation, preference
from qwen_jax.metrics import write_atomically
from qwen_jax.train import EXIT_CONFIG

USAGE = "usage: preference sheets ... | preference table ...; --help lists the flags"


def main(argv: Sequence[str]) -> int:
    """Writes sheets or the table and returns the exit code."""
    try:
        values, command = _parse_flags(argv)
        {"sheets": write_sheets, "table": write_table}[command](values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    return 0


def write_sheets(values: flags.FlagValues) -> None:
    """Reads result files and writes the sheets, the key and the data for a reward model.

    Raises:
      ValueError: files or names that do not fit together.
    """
    results = {}
    for item in values.results:
        name, separator, path = item.partition("=")
        if not separator or name in results:
            raise ValueError(f"--results={item!r}: write NAME=FILE, with different names")
        results[name] = annotation.read_answers(Path(path), values.response_field)
    baseline = None if values.all_pairs else values.baseline or next(iter(results), None)
    comparisons = annotation.compare(results, baseline)
    folder = Path(values.out)
    for path in annotation.write_sheets(comparisons, values.annotators, values.seed, folder):
        print(path)
    preference.write_score_data(comparisons, folder / "score_data.jsonl")


def write_table(values: flags.FlagValues) -> dict[str, Any]:
    """Counts votes, prints the table and writes it.

    Raises:
      ValueError: files that do not fit together, or no votes.
    """
    comparisons, first_answer = annotation.read_key(Path(values.sheets))
    if bool(values.annotations) == bool(values.scores):
        raise ValueError("give --annotations of people or --scores of a reward model, one of them")
    if values.scores:
        score = preference.read_scores(Path(values.scores))
        who = f"a REWARD MODEL, not by people (scores: {values.scores}, margin {values.margin})"
        votes = preference.judge(comparisons, score, "reward model", values.margin)
    else:
        paths = [Path(path) for item in values.annotations for path in sorted(glob.glob(item))]
        votes = annotation.read_votes(paths, first_answer)
        names = sorted({vote.annotator for vote in votes})
        who = f"{len(names)} annotators ({', '.join(names)})"
    if not votes:
        raise ValueError(f"--annotations={','.join(values.annotations)}: there is no vote in them")
    verdicts = preference.majority(comparisons, votes)
    baseline = values.baseline or comparisons[0].models[1]
    results = {
        "judge": who,
        "judged_by": "reward model" if values.scores else "people",
        "comparisons": len(comparisons),
        "judged": len(verdicts),
        "votes": len(votes),
        "agreement": None if values.scores else preference.agreement(votes),
        "shares": [dataclasses.asdict(line) for line in preference.table(verdicts, values.seed)],
        "elo": preference.elo(verdicts, baseline, values.seed),
    }
    print(preference.format_tables(results))
    print(f"\n{len(verdicts)} of {len(comparisons)} comparisons judged, {len(votes)} votes", end="")
    agreement = results["agreement"]
    print("" if agreement is None else f"; {agreement:.0%} of pairs of votes agree")
    if values.out:
        write_atomically(Path(values.out), json.dumps(results, indent=1) + "\n")
    return results


def _parse_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, str]:
    """The command line; every mistake on it becomes a ValueError."""
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_list("results", [], "NAME=FILE,NAME=FILE,... of the models", **own)
    flags.DEFINE_string("response_field", "response", "of the result files", **own)
    flags.DEFINE_string("baseline", "", "model that the others are compared with", **own)
    flags.DEFINE_bool("all_pairs", False, "compare every model with every other", **own)
    flags.DEFINE_list("annotators", ["annotator"], "their names", **own)
    flags.DEFINE_integer("seed", 0, "of orders, sides and resampling", **own)
    flags.DEFINE_string("sheets", "", "table: the folder that `sheets` wrote", **own)
    flags.DEFINE_list("annotations", [], "table: filled sheets or exports, globs", **own)
    flags.DEFINE_string("scores", "", "table: JSON lines of `python -m qwen_jax.score`", **own)
    flags.DEFINE_float("margin", 0.0, "table: scores this close are a tie", 0.0, **own)
    flags.DEFINE_string("out", "", "folder of the sheets, or JSON file of the table", **own)
    flags.DEFINE_bool("help", False, "shows this", **own)
    command = argv[1] if len(argv) > 1 else ""
    is_command = not command.startswith("-")
    commandline.parse(values, [argv[0], *argv[1 + is_command :]], str(__doc__))
    if command not in ("sheets", "table"):
        raise ValueError(f"{USAGE}; got {command!r}")
    needed = {"sheets": ("results", "out"), "table": ("sheets",)}[command]
    for name in needed:
        if not values[name].value:
            raise ValueError(f"--{name} is missing; {USAGE}")
    return values, command


if __name__ == "__main__":
    sys.exit(main(sys.argv))
