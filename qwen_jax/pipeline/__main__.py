"""`python -m qwen_jax.pipeline --workdir=DIR`: tokenizer, pretraining, SFT, PMP, RM, PPO, report.

Each stage is `python -m qwen_jax.train` with a preset of `configs/pipeline.py`, in a workdir of its
own below DIR; run it again and it goes on where it stopped. PPO runs twice, with and without the
gradient of the pretraining text. Ends with a table, `report.html` and `results.json`. With
`--summarise=DIR,DIR,...` it compares finished runs of several seeds instead. Exit codes: 0 done, 2
a wrong setting; otherwise that of the stage that failed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

import qwen_jax
from qwen_jax import commandline
from qwen_jax.metrics import write_atomically
from qwen_jax.pipeline import report, task
from qwen_jax.train import EXIT_CONFIG

CONFIG = Path(qwen_jax.__file__).parent.parent / "configs" / "pipeline.py"
HELDOUT, HELDOUT_DOCUMENTS = "stdlib:heldout", 12
# Of documents; those of facts are short, so that two fifths of the tokens are facts.
TEXT = "stdlib:train@0.03,facts=jsonl:{data}/facts.jsonl@0.97"


def main(argv: Sequence[str]) -> int:
    """Runs what is missing of the pipeline, then measures and reports."""
    try:
        values = _parse_flags(argv)
        if values.summarise:
            print(report.summarise([Path(folder) for folder in values.summarise]))
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    workdir, seed = Path(values.workdir), values.seed
    began = time.perf_counter()
    data = workdir / "data"
    if not (data / "seed.txt").exists():
        task.write_data(data, seed)
        (data / "seed.txt").write_text(f"{seed}\n")
    secs = {}
    for name, overrides in _stages(workdir, data).items():
        start = time.perf_counter()
        code = _train(name, workdir, seed, overrides)
        if code:
            print(f"error: stage {name} ended with exit code {code}", file=sys.stderr, flush=True)
            return code
        secs[name] = time.perf_counter() - start
    results = _measure(workdir, data)
    results |= {"seed": seed, "stage_secs": secs, "secs": time.perf_counter() - began}
    write_atomically(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    report.write(workdir, results)
    print(report.table(results))
    print(f"{results['secs'] / 60:.1f} minutes; see {workdir / 'report.html'}")
    return 0


def _stages(workdir: Path, data: Path) -> dict[str, dict[str, str]]:
    """The settings of each stage that are paths, in the order of the stages."""
    text = TEXT.format(data=data)
    heldout_pairs = f"chat:{data}/comparisons_heldout.jsonl"
    ppo = {
        "init_from": str(workdir / "sft"),
        "ppo.reward_from": str(workdir / "rm"),
        "data.train": f"chat:{data}/queries.jsonl",
        "ppo.eval_data": f"chat:{data}/queries_heldout.jsonl",
    }
    stages = {
        "pretrain": {"data.train": text},
        "sft": {
            "init_from": str(workdir / "pretrain"),
            "data.train": f"chat:{data}/demonstrations.jsonl",
        },
        "pmp": {
            "init_from": str(workdir / "pretrain"),
            "data.train": f"chat:{data}/comparisons_noisy.jsonl",
            "data.heldout": heldout_pairs,
        },
        "rm": {
            "init_from": str(workdir / "pmp"),
            "data.train": f"chat:{data}/comparisons_clean.jsonl",
            "data.heldout": heldout_pairs,
        },
        "ppo": ppo | {"ppo.pretrain_data": text},
        "ppo_without_text": ppo,
    }
    tokenizer = str(workdir / "pretrain" / "tokenizer.tiktoken")
    for name in list(stages)[1:]:
        stages[name]["tokenizer.path"] = tokenizer
    return stages


def _train(name: str, workdir: Path, seed: int, overrides: dict[str, str]) -> int:
    print(f"== {name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "qwen_jax.train", f"--config={CONFIG}:{name}"]
    command += [f"--workdir={workdir / name}", f"--config.train.seed={seed}"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    # The presets import one another from the root of the project.
    root = str(CONFIG.parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    log = workdir / f"{name}.log"
    with log.open("a") as file:
        environment = os.environ | {"PYTHONPATH": path}
        code = subprocess.run(command, check=False, stderr=file, env=environment).returncode
    lines = log.read_text().splitlines()
    print("\n".join(lines[-1:] if code == 0 else lines[-8:]), file=sys.stderr, flush=True)
    return code


def _measure(workdir: Path, data: Path) -> dict:
    """The figures of every model that answers."""
    # Here and not above: the stages before run in processes of their own, and need the memory.
    from qwen_jax import loading
    from qwen_jax.config import PpoConfig
    from qwen_jax.pipeline import measure

    settings = json.loads((workdir / "ppo" / "config.json").read_text())["ppo"]
    reward = loading.load_reward(workdir / "rm")
    judge = measure.make_judge(
        workdir / "sft",
        reward.params,
        f"chat:{data}/queries_heldout.jsonl",
        f"chat:{data}/queries.jsonl",
        HELDOUT,
        HELDOUT_DOCUMENTS,
        PpoConfig(**settings),
    )
    models = ("pretrain", "sft", "ppo", "ppo_without_text")
    accuracy = {
        name: json.loads((workdir / name / "summary.json").read_text())["heldout_accuracy"]
        for name in ("pmp", "rm")
    }
    return {
        "models": {name: measure.measure(judge, workdir / name) for name in models},
        "rm_accuracy": accuracy,
    }


def _parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/pipeline", "where the stages' workdirs lie", **own)
    flags.DEFINE_integer("seed", 0, "of data, weights and draws", 0, **own)
    flags.DEFINE_list("summarise", [], "finished workdirs of several seeds to compare", **own)
    flags.DEFINE_bool("help", False, "shows this", **own)
    commandline.parse(values, argv, str(__doc__))
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv))
