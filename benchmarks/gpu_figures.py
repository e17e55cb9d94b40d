"""What `benchmarks/gpu.py` counts and how: timing, FLOPs, the roofline of memory. No JAX at import.

Both contenders time themselves with `time_steps`, so that a step means the same on both sides.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

FORMULAS = {
    "MFU": "tokens/s x (6 N + 6 L T W) / peak, N: weights of matrix products (head yes, input "
    "embedding no), L layers, T positions, W heads x head width: causal, so half of T x T; "
    "recomputation does not count; under adapters 4 N, for the base has no gradient",
    "roofline": "batch x bandwidth / (2 bytes x N + batch x context x key/value bytes of a token)",
}
# Tokens/s on one H100 that would be acceptable, good and very good.
TARGETS = {
    "P1 concat": (40_500, 50_700, 56_000),
    "P1 concat_masked": (40_500, 50_700, 56_000),
    "P3": (12_000, 15_000, 17_000),
    "R1": (3_000, 7_000, 10_000),
}
ROOFLINE_TARGETS = (0.5, 0.65, 0.8)  # of D1
# How the first loss may differ from `first_loss`, and bfloat16 from float32.
LOSS_TOLERANCE, FLOAT32_TOLERANCE = 0.15, 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long to measure. began, deadline: of `time.monotonic`; past the latter no step begins."""

    warmup: int
    steps: int
    began: float
    deadline: float


def read_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Timing]:
    """The command line of a contender, with the flags that all of them have."""
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600, help="for all, compiling included")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    now = time.monotonic()
    return args, Timing(args.warmup, args.steps, now, now + args.seconds)


class Timed(NamedTuple):
    """warmup: steps. secs: of each timed step. returned: by all steps. before: secs up to them."""

    warmup: int
    secs: list[float]
    returned: list[float]
    before: float

    def values(self) -> dict:
        """What a result says of it."""
        return {"warmup": self.warmup, "secs": self.secs, "before_secs": self.before}


def time_steps(step: Callable[[], float], timing: Timing) -> Timed:
    """Runs warm-up and timed steps. step: returns when the device is done.

    The deadline cuts both short; one timed step there always is.
    """
    warmup, secs, returned, before, longest = 0, [], [], 0.0, 0.0
    while len(secs) < timing.steps:
        late = time.monotonic() + longest > timing.deadline
        if late and secs:
            break
        counts = bool(secs) or warmup >= timing.warmup or (late and warmup > 0)
        if counts and not secs:
            before = time.monotonic() - timing.began
        began = time.perf_counter()
        returned.append(step())
        elapsed = time.perf_counter() - began
        if counts:
            secs.append(elapsed)
        else:
            warmup += 1
        # The first step may compile: it says nothing about the next.
        longest = 0.0 if len(returned) == 1 else max(longest, elapsed)
    return Timed(warmup, secs, returned, before)


def first_loss(vocab_size: int, d_model: int, init_std: float) -> float:
    """Expected cross-entropy of a fresh model: its logits are normal, of variance D x std^2."""
    return math.log(vocab_size) + d_model * init_std**2 / 2


def decode_roofline(
    weight_bytes: float, slot_bytes: float, batch: int, context: float, bandwidth: float | None
) -> float | None:
    """Tokens/s at which decoding reads its weights and the filled cache at full bandwidth.

    slot_bytes: keys and values of one token. None for an unknown bandwidth.
    """
    if bandwidth is None:
        return None
    return batch * bandwidth / (weight_bytes + batch * context * slot_bytes)


def summary(secs: list[float], tokens: float) -> dict[str, float]:
    """Tokens/s of the median step, and of the slower and the faster quarter of the steps."""
    if len(secs) > 1:
        fast, middle, slow = statistics.quantiles(secs, n=4, method="inclusive")
    else:
        fast = middle = slow = secs[0]
    return {"median": tokens / middle, "slow": tokens / slow, "fast": tokens / fast}


def joined(turns: list[dict]) -> dict:
    """The turns of one contender as one result: all timed steps, the rest of the last good turn.

    Memory is the largest; a check that failed in one turn has failed.
    """
    good = [turn for turn in turns if turn["secs"]] or turns
    peaks = [turn["peak_bytes"] for turn in good if turn.get("peak_bytes")]
    return good[-1] | {
        "secs": [secs for turn in turns for secs in turn["secs"]],
        "warmup": sum(turn.get("warmup", 0) for turn in turns),
        "before_secs": [turn["before_secs"] for turn in good if "before_secs" in turn],
        "failed": sorted({failure for turn in turns for failure in turn["failed"]}),
        "peak_bytes": max(peaks, default=None),
    }


def check_losses(losses: list[float], expected: float) -> list[str]:
    """What is wrong with the losses of a run that began with a fresh model."""
    failed = []
    if not all(map(math.isfinite, losses)):
        failed.append("a loss is not finite")
    if not abs(losses[0] - expected) <= LOSS_TOLERANCE:
        failed.append(f"the first loss is {losses[0]:.3f}, expected {expected:.3f}")
    return failed


def say(text: str) -> None:
    """For people, while the results go to stdout."""
    print(text, file=sys.stderr, flush=True)


def hand_over(results: list[dict]) -> None:
    """The last line of a contender's process, which `benchmarks/gpu.py` reads."""
    print(json.dumps(results), flush=True)
