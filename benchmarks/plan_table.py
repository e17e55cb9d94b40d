"""Compiles every shipped pair of preset and hardware, checks the programs, and prints a table.

.venv-plan/bin/python -m benchmarks.plan_table --json=plans.jsonl    # after `make plan-env`

Pairs that are in the file already are not compiled again. This is how the table of docs/scale.md
was made.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

COLUMNS = ("preset", "hardware", "mesh", "microbatches x rows", "remat", "peak / limit GiB")
COLUMNS += ("step s", "bound", "MFU %", "days", "compile s")


def main() -> None:
    """Compiles what is missing and prints the table; exit code 1 when a check found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, required=True, help="one line of figures for each pair"
    )
    parser.add_argument("--only", help="a pair, as the parent process passes it on")
    options = parser.parse_args()
    from qwen_jax.plan.shipped import SHIPPED

    if options.only:
        keep(compile_pair(options.only), options.json)
        return
    done = read(options.json)
    for name in SHIPPED:
        if name not in done:
            # A process for each: compilers keep memory, and those of TPUs and GPUs stay apart.
            command = [sys.executable, "-m", "benchmarks.plan_table", f"--json={options.json}"]
            subprocess.run([*command, f"--only={name}"], check=True)
    done = read(options.json)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name in SHIPPED:
        print(row(name, done[name]))
    problems = [f"{name}: {text}" for name in SHIPPED for text in done[name]["problems"]]
    print("\n".join(problems) or "all checks of the compiled programs passed")
    sys.exit(bool(problems))


def compile_pair(name: str) -> dict:
    """The figures of one pair, and what the checks found."""
    from qwen_jax.plan import checks, report
    from qwen_jax.plan.__main__ import parse_flags, read
    from qwen_jax.plan.program import compile_step
    from qwen_jax.plan.shipped import arguments

    program = compile_step(*read(parse_flags(arguments(name))))
    figures = report.as_dict(program, None)
    return figures | {"pair": name, "problems": checks.all_problems(program)}


def keep(figures: dict, path: Path) -> None:
    """Adds the figures of a pair to a file."""
    with path.open("a") as file:
        file.write(json.dumps(figures) + "\n")


def read(path: Path) -> dict[str, dict]:
    """Figures by pair."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {figures["pair"]: figures for figures in map(json.loads, lines)}


def row(name: str, figures: dict) -> str:
    """A line of the table."""
    memory = figures["memory_gib"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()) or "one"
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    cells = [
        figures["config"], f"{slices}{figures['topology']}", mesh,
        f"{figures['num_microbatches']} x {figures['rows_per_microbatch']}", figures["remat"],
        f"{memory['peak']:.1f} / {memory['limit']:.1f}", f"{figures['step_secs']:.2f}",
        figures["bound"], f"{100 * figures['mfu']:.1f}", f"{figures['days']:,.1f}",
        f"{figures['compile_secs']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
