"""Training, fine-tuning, decoding and PPO on one NVIDIA H100 or H200, in less than ten minutes.

    python -m benchmarks.gpu --out=gpu.md --json=gpu.json [--only=P1,D1] [--cache=DIR]
    python -m benchmarks.gpu --smoke                       # the same lines on a CPU, tiny sizes
    .venv-plan/bin/python -m benchmarks.gpu --compile_only --json=predicted.json    # without a GPU

P1 is Qwen-1.8B pretraining, rows as one stream (concat) and with documents apart (concat_masked);
P3 Qwen-7B fine-tuning with adapters on packed rows; D1 Qwen-1.8B decoding at a context of 1024,
batch 1 and 64; R1 PPO with four Qwen-1.8B, 256 tokens in and 256 out. P1 concat and D1 batch 1 are
also run by torch and transformers (`benchmarks/gpu_peer.py`).

The memory holds one contender at a time, so each turn is a process of its own; those of P1 concat
alternate, ours and theirs twice, with half of the steps in each turn. A turn has --warmup and
--steps and a share of what is left of --minutes: when that is used up it stops at the steps it has,
and the table says how many. The first run on a machine compiles; the second finds the programs in
--cache and has time for more steps. --only=P1 gives all of the time to P1. A step ends when the
device has ended it; the table shows the median and the quartiles. Exit status 1 if a check or a
contender fails. With --predicted (the JSON of --compile_only) the predicted memory stands beside
the measured one.
"""

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_figures as figures
from benchmarks.gpu_figures import say
from qwen_jax.allocator import GPU_SHARE

GIB = 2**30
TARGETS_FOR = ("NVIDIA H100", "NVIDIA H200")
PROBE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
SPARE_SECS = 40  # after --minutes, for the last turn to end


class Turn(NamedTuple):
    """A process. names: of its results. secs: its part of the time. share: of all steps."""

    benchmark: str
    contender: str
    names: tuple[str, ...]
    arguments: tuple[str, ...]
    secs: float
    share: float = 1.0


_OURS = Turn("P1", "ours", ("P1 concat",), ("--packing=concat",), 60, 0.5)
_THEIRS = Turn("P1", "torch", ("P1 concat",), (), 60, 0.5)
TURNS = (
    _OURS, _THEIRS, _OURS, _THEIRS,
    Turn("P1", "ours", ("P1 concat_masked",), ("--packing=concat_masked",), 70),
    Turn("P3", "ours", ("P3",), (), 70),
    Turn("D1", "ours", ("D1 batch 1", "D1 batch 64"), (), 45),
    Turn("D1", "torch", ("D1 batch 1",), (), 30),
    Turn("R1", "ours", ("R1",), (), 110),
)  # fmt: skip
NEEDED_BY_TORCH = ("torch", "transformers")


def environment(cache: Path, smoke: bool, xla: str) -> dict[str, str]:
    """What every contender's process is started with. XLA's autotuning goes into JAX's cache."""
    changes = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "XLA_CLIENT_MEM_FRACTION": str(GPU_SHARE),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if xla:
        changes["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla}".strip()
    if smoke:
        changes["JAX_PLATFORMS"] = "cpu"
    return os.environ | changes


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    """Whether it fails is the caller's to look at."""
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def backend(environment: dict[str, str]) -> str:
    """What JAX would run on; asked in another process, which gives the memory back."""
    program = "import jax; print(jax.default_backend())"
    done = _run([sys.executable, "-c", program], env=environment | PROBE)
    if done.returncode:
        raise RuntimeError(f"JAX does not start: {done.stderr[-2000:]}")
    return done.stdout.split()[-1]


def usable_flags(flags: list[str], environment: dict[str, str]) -> list[str]:
    """Those XLA flags that this XLA knows: it ends the process over one that it does not."""
    program = "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"

    def known(tried: list[str]) -> bool:
        flags = PROBE | {"XLA_FLAGS": " ".join(tried)}
        return not _run([sys.executable, "-c", program], env=environment | flags).returncode

    if not flags or known(flags):
        return flags
    return [flag for flag in flags if known([flag])]


def missing_packages() -> list[str]:
    """What the peer lacks."""
    missing = []
    for name in NEEDED_BY_TORCH:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def run_turn(turn: Turn, args, environment: dict[str, str], secs: float, most: float) -> list[dict]:
    """One process. secs: after which it ends by itself, most: after which it is ended.

    A process that fails gives results with the reason and no times.
    """
    module = "gpu_ours" if turn.contender == "ours" else "gpu_peer"
    warmup, steps = (math.ceil(turn.share * number) for number in (args.warmup, args.steps))
    command = [
        sys.executable, "-m", f"benchmarks.{module}", f"--benchmark={turn.benchmark}",
        *turn.arguments, f"--warmup={warmup}", f"--steps={steps}", f"--seconds={secs:.0f}",
        *(["--smoke"] if args.smoke else []),
    ]  # fmt: skip
    say(f"{turn.contender}, {' and '.join(turn.names)}: up to {secs:.0f} s")
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
                timeout=most, cwd=Path(__file__).parent.parent, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason = f"ended after {most:.0f} s, before its last step"
        else:
            if done.returncode == 0:
                return json.loads(done.stdout.splitlines()[-1])
            log.seek(0)
            text = log.read()
            say(text[-4000:])
            lines = text.strip().splitlines() or ["no output"]
            reason = f"exit code {done.returncode}: {lines[-1][:200]}"
    return [
        {"name": name, "contender": turn.contender, "secs": [], "failed": [reason], "notes": []}
        for name in turn.names
    ]


def run_all(args, environment: dict[str, str]) -> tuple[list[dict], list[str]]:
    """The results of all turns, and what was left out and why."""
    deadline = time.monotonic() + 60 * args.minutes
    wanted = [turn for turn in TURNS if turn.benchmark in args.only.split(",")]
    missing, left_out = missing_packages(), []
    if missing:
        wanted = [turn for turn in wanted if turn.contender != "torch"]
        left_out.append(f"torch as a peer: no {' and no '.join(missing)} is installed")
    results: list[list[dict]] = []
    while wanted:
        turn, left = wanted[0], deadline - time.monotonic()
        share = turn.secs / sum(other.secs for other in wanted)
        wanted = wanted[1:]
        if left < 20:
            left_out.append(f"{turn.contender}, {' and '.join(turn.names)}: no time was left")
            continue
        # Past its share a turn may end its step, or what it compiles, at the cost of the others.
        secs = share * left
        most = min(1.5 * secs + 20, left + SPARE_SECS)
        results.append(run_turn(turn, args, environment, secs, most))
    by_contender: dict[tuple[str, str], list[dict]] = {}
    for one in (one for several in results for one in several):
        by_contender.setdefault((one["name"], one["contender"]), []).append(one)
    return [figures.joined(turns) for turns in by_contender.values()], left_out


def figures_of(result: dict, predicted: dict[str, float]) -> dict:
    """What the table says of a result, for the JSON."""
    from qwen_jax.metrics import model_flops_utilisation

    if not result["secs"]:
        return result
    rate = figures.summary(result["secs"], result["tokens"])
    found = {"tokens_per_sec": rate}
    if result.get("flops"):
        secs = result["tokens"] / rate["median"]
        found["mfu"] = model_flops_utilisation(result["flops"], secs, result["device"], 1)
    if result.get("roofline"):
        found["roofline_share"] = rate["median"] / result["roofline"]
    if result["contender"] == "ours":
        found["predicted_bytes"] = predicted.get(result["name"])
    return result | found


def read_predicted(path: str) -> dict[str, float]:
    """Bytes at the worst moment of each benchmark, over its programs."""
    if not path:
        say("predicted memory: left out, --predicted names no JSON of --compile_only")
        return {}
    worst: dict[str, float] = {}
    for program in json.loads(Path(path).read_text())["programs"]:
        name = program["name"].rsplit(" ", 1)[0]
        if program["fits"]:
            worst[name] = max(worst.get(name, 0), program["peak"])
    return worst


def table(results: list[dict]) -> list[str]:
    """The results in Markdown."""
    lines = [
        "| benchmark | by | tokens/s | slow, fast quarter | timed + warm-up steps "
        "| MFU or roofline | peak GiB | predicted GiB | accept / aim / stretch |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in results:
        if not one["secs"]:
            lines.append(f"| {one['name']} | {one['contender']} | failed | | | | | | |")
            continue
        rate, share = one["tokens_per_sec"], "unknown"
        if one.get("mfu"):
            share = f"MFU {one['mfu']:.1%}"
        elif one.get("roofline_share"):
            share = f"{one['roofline_share']:.0%} of {one['roofline']:,.0f}"
        targets = ""
        if one["contender"] == "ours" and one["device"].startswith(TARGETS_FOR):
            targets = " / ".join(f"{x:,}" for x in figures.TARGETS.get(one["name"], ()))
            targets = targets or " / ".join(f"{x:.0%}" for x in figures.ROOFLINE_TARGETS)
        memory = (
            f"{one[key] / GIB:.1f}" if one.get(key) else "unknown"
            for key in ("peak_bytes", "predicted_bytes")
        )
        steps = f"{len(one['secs'])} + {one['warmup']}"
        cells = [
            one["name"], one["contender"], f"{rate['median']:,.0f}",
            f"{rate['slow']:,.0f}, {rate['fast']:,.0f}", steps, share, *memory, targets,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def notes(results: list[dict], left_out: list[str], args, machine: dict) -> list[str]:
    """What has to be known to read the table."""
    lines = [f"- {key}: {value}" for key, value in machine.items()]
    lines += [f"- {name} = {formula}" for name, formula in figures.FORMULAS.items()]
    medians = {}
    for one in results:
        who = f"{one['name']}, {one['contender']}"
        lines += [f"- {who}: {note}" for note in one["notes"]]
        lines += [f"- {who}: FAILED: {failure}" for failure in one["failed"]]
        if one["secs"]:
            medians[one["name"], one["contender"]] = one["tokens_per_sec"]["median"]
            if len(one["secs"]) < args.steps:
                before = ", ".join(f"{secs:.0f}" for secs in one["before_secs"])
                lines.append(
                    f"- {who}: {len(one['secs'])} of {args.steps} steps fit in its time; "
                    f"{before} s went before them"
                )
    for name, contender in list(medians):
        if contender == "torch" and (name, "ours") in medians:
            ratio = medians[name, "ours"] / medians[name, "torch"]
            lines.append(f"- {name}: ours / torch in tokens/s, medians: {ratio:.2f}")
    return lines + [f"- left out: {text}" for text in left_out]


def machine_of(results: list[dict], flags: list[str]) -> dict[str, str]:
    """Device, driver and versions."""
    versions = {name: text for one in results for name, text in one.get("versions", {}).items()}
    found = {
        "device": ", ".join(sorted({one["device"] for one in results if "device" in one})),
        "versions": ", ".join(f"{name} {text}" for name, text in sorted(versions.items())),
        "driver": "no nvidia-smi here",
        "XLA flags": " ".join(flags) or "none",
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit"]
        said = _run([*query, "--format=csv,noheader"])
        found["driver"] = (said.stdout or said.stderr).strip()
    return found


def compile_only(args) -> int:
    """Compiles every program for a GPU that is not here."""
    from benchmarks import gpu_compile

    programs = gpu_compile.compile_all(
        args.topology, (args.warmup, args.steps), args.only.split(",")
    )
    print(f"{args.topology:28}arguments  peak  limit          compiled in")
    print("\n".join(map(gpu_compile.line, programs)))
    if args.json:
        found = {"topology": args.topology, "programs": programs}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(program["fits"] for program in programs) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="P1,P3,D1,R1")
    parser.add_argument("--minutes", type=float, default=9, help="for all turns")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="", help="file for the Markdown")
    parser.add_argument("--json", default="", help="file for all figures")
    parser.add_argument("--cache", default="runs/gpu_cache", help="compiled programs, kept")
    parser.add_argument("--xla", default="", help="XLA flags to try, each probed first")
    parser.add_argument("--predicted", default="", help="JSON of --compile_only")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--compile_only", action="store_true", help="measure nothing")
    parser.add_argument("--topology", default="h100:1", help="of --compile_only")
    args = parser.parse_args()
    known = {turn.benchmark for turn in TURNS}
    if not set(args.only.split(",")) <= known:
        parser.error(f"--only={args.only}: choose among {','.join(sorted(known))}")
    if min(args.steps, args.minutes) <= 0 or args.warmup < 0:
        parser.error("--steps and --minutes must be positive, --warmup must not be negative")
    return args


def main() -> int:
    args = parse()
    if args.compile_only:
        return compile_only(args)
    began = time.monotonic()
    predicted, cache = read_predicted(args.predicted), Path(args.cache).absolute()
    asked, plain = args.xla.split(), environment(cache, args.smoke, "")
    if not args.smoke and (found := backend(plain)) != "gpu":
        say(f"error: JAX finds no GPU here but {found}; --smoke runs on a CPU, with tiny sizes")
        return 2
    flags = usable_flags(asked, plain)
    for flag in asked:
        if flag not in flags:
            say(f"left out, unknown to this XLA: {flag}")
    results, left_out = run_all(args, environment(cache, args.smoke, " ".join(flags)))
    left_out += [f"{flag}: unknown to this XLA" for flag in asked if flag not in flags]
    results = [figures_of(one, predicted) for one in results]
    machine = machine_of(results, flags)
    machine["took"] = f"{time.monotonic() - began:.0f} s of {60 * args.minutes:.0f}"
    text = "\n".join([*table(results), "", *notes(results, left_out, args, machine)])
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    if args.json:
        found = {"machine": machine, "results": results, "left_out": left_out}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(one["failed"] for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
