"""The only training loop: steps, logging, evaluation, saving, preemption.

It launches step t and then reads the metrics of step t-1, so the device never waits for the host.
It does not know what a token is; it sees a `Stage`.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from qwen_jax import metrics as metrics_lib
from qwen_jax import sharding
from qwen_jax.config import CheckpointConfig, TrainConfig
from qwen_jax.distributed import Preemption, Watchdog
from qwen_jax.trainer.checkpoint import Checkpoints
from qwen_jax.trainer.stage import Stage
from qwen_jax.trainer.state import TrainState
from qwen_jax.trainer.step import jit_train_step

SHOWN_SAMPLES = 4


class NonFiniteError(RuntimeError):
    """Too many updates in a row were skipped because loss or gradient was not finite."""


@dataclasses.dataclass
class Outcome:
    """How a run ended: its last state and whether it was preempted (saved, to be run again)."""

    state: TrainState
    preempted: bool
    summary: dict[str, Any]


@dataclasses.dataclass
class Run:
    """What the loop needs besides the stage and the state."""

    train: TrainConfig
    checkpoint: CheckpointConfig
    mesh: jax.sharding.Mesh
    workdir: Path
    checkpoints: Checkpoints
    preemption: Preemption
    meta: dict[str, Any]
    log: Callable[[str], None]


def run(stage: Stage, state: TrainState, context: Run) -> Outcome:
    """Trains from `state.step` to the last step, or until preempted.

    Raises:
      NonFiniteError: `train.max_skipped_steps` updates in a row were not finite. The parameters
        are those before the first of them, and no checkpoint holds a bad one.
      StageError: the stage's own check of its figures failed.
    """
    cfg = context.train
    start = int(state.step)
    with sharding.use_mesh(context.mesh):
        step_fn = jit_train_step(stage, cfg.num_microbatches)
    reporter = _Reporter(stage, context, start)
    watchdog = Watchdog(cfg.hang_timeout_secs)
    profiler = _Profiler(cfg, context.workdir)
    pending, preempted, unsaved, step = None, False, False, start
    try:
        for step in range(start + 1, cfg.steps + 1):
            profiler.before_step(step - start)
            batch = stage.batches.next(state)
            about_batch = stage.batches.metrics()  # now: when the step is read, another is drawn
            with sharding.use_mesh(context.mesh):
                state, metrics = step_fn(state, batch)
            if pending is not None:
                reporter.read(*pending)
            pending = (step, metrics, about_batch)
            if step == start + 1:
                watchdog.start()  # not before the first step has been compiled
            watchdog.beat()
            scores = None
            if _due(step, cfg.eval_every, cfg.steps) and stage.evaluate is not None:
                reporter.read(*pending)
                pending = None
                scores = reporter.evaluate(step, state)
            if _due(step, cfg.sample_every, cfg.steps) and stage.samples is not None:
                reporter.sample(step, state)
            preempted |= context.preemption.reached(step)
            unsaved |= preempted or _due(step, context.checkpoint.every_steps, cfg.steps)
            if unsaved and stage.batches.resumable():
                # The bad step must raise before it can be saved as good.
                if pending is not None:
                    reporter.read(*pending)
                    pending = None
                reporter.save(step, state, scores, force=preempted or step == cfg.steps)
                unsaved = False
                if preempted:
                    break
            watchdog.beat()
        if pending is not None:
            reporter.read(*pending)
    finally:
        watchdog.stop()
        profiler.stop()
        reporter.close()
        stage.batches.close()
    context.checkpoints.wait()
    return Outcome(state, preempted, reporter.summary(step))


def _due(step: int, every: int, last: int) -> bool:
    """True at multiples of `every` and at the last step; never when `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


class _Profiler:
    """Traces the window of steps that the config asks for into the workdir."""

    def __init__(self, cfg: TrainConfig, workdir: Path):
        self._first, self._num_steps, self._workdir = cfg.profile_start, cfg.profile_steps, workdir
        self._tracing = False

    def before_step(self, nth_step: int) -> None:
        """Starts or stops the trace; steps are counted from the start of this process."""
        if self._num_steps and nth_step == self._first:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._tracing = True
        if self._tracing and nth_step == self._first + self._num_steps:
            self.stop()

    def stop(self) -> None:
        """Ends the trace if one is running: a run may end within the window."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


class _Reporter:
    """Reads metrics one step late and shows, writes and saves what the loop asks for."""

    def __init__(self, stage: Stage, context: Run, start: int):
        self._stage, self._context, self._start = stage, context, start
        main = jax.process_index() == 0
        self._writer = metrics_lib.MetricsWriter(context.workdir, start, active=main)
        # A terminal gets a bar; a log file gets a line at each logging step.
        self._bar = tqdm(
            total=context.train.steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not (main and sys.stderr.isatty()),
        )
        self._began = self._mark = time.perf_counter()
        self._paused = 0.0
        self._window_steps = self._total_steps = 0
        self._train_secs = 0.0
        self._skipped = self._skipped_in_row = 0
        self._last: dict[str, Any] = {}

    def read(self, step: int, metrics: dict[str, jax.Array], about_batch: dict[str, float]) -> None:
        """Takes in the metrics of one finished step; logs when its turn has come.

        Raises:
          NonFiniteError, StageError: see `run`.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values.pop("skipped"))
        if self._stage.check is not None and not skipped:
            self._stage.check(step, values)
        self._window_steps += 1
        self._total_steps += 1
        self._skipped += skipped
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        if skipped:
            self._say(
                f"step {step}: update skipped, loss {values['loss']}, "
                f"gradient norm {values['grad_norm']}"
            )
        limit = self._context.train.max_skipped_steps
        if self._skipped_in_row >= limit:
            raise NonFiniteError(
                f"{limit} updates in a row up to step {step} were not finite (loss "
                f"{values['loss']}, gradient norm {values['grad_norm']}); lower optimizer.peak_lr "
                f"or look at the data of these steps"
            )
        self._bar.update(1)
        if _due(step, self._context.train.log_every, self._context.train.steps):
            self._log(step, values | about_batch)

    def _log(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        secs = now - self._mark - self._paused
        per_step = secs / self._window_steps
        self._train_secs += secs
        device = jax.devices()[0]
        mfu = metrics_lib.model_flops_utilisation(
            self._stage.flops_per_batch, per_step, device.device_kind, jax.device_count()
        )
        self._last = values | {
            "learning_rate": float(self._stage.schedule(step - 1)),
            "tokens_per_sec": self._stage.tokens_per_batch / per_step,
            "step_secs": per_step,
            "mfu": "unknown" if mfu is None else mfu,
            "tokens": step * self._stage.tokens_per_batch,
            "skipped_steps": self._skipped,
        }
        self._writer.write(step, self._last)
        shown = {
            "loss": f"{values['loss']:.4f}",
            "tok/s": f"{self._last['tokens_per_sec']:,.0f}",
            "MFU": "unknown" if mfu is None else f"{mfu:.1%}",
        }
        self._bar.set_postfix(shown)
        if self._bar.disable:
            left = (self._context.train.steps - step) * per_step
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            self._say(f"step {step}/{self._context.train.steps}  {text}  ETA {_clock(left)}")
        self._mark, self._paused, self._window_steps = time.perf_counter(), 0.0, 0

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Runs the stage's evaluation, outside the throughput's clock."""
        began = time.perf_counter()
        with sharding.use_mesh(self._context.mesh):
            scores = self._stage.evaluate(state)
        self._writer.write(step, scores)
        text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self._say(f"step {step}: {text}")
        self._last |= scores
        self._paused += time.perf_counter() - began
        return scores

    def sample(self, step: int, state: TrainState) -> None:
        """Shows the first continuations of the prompts and records them all."""
        began = time.perf_counter()
        for number, (prompt, continuation) in enumerate(self._stage.samples(state)):
            if number < SHOWN_SAMPLES:
                self._say(f"step {step} sample: {prompt!r} -> {continuation!r}")
            self._writer.write_text(step, "sample", f"{prompt}**{continuation}**")
            self._writer.write(step, {"sample_prompt": prompt, "sample": continuation})
        self._paused += time.perf_counter() - began

    def save(self, step: int, state: TrainState, scores: dict | None, *, force: bool) -> None:
        """Hands the state and the data position to the checkpoint writer."""
        began = time.perf_counter()
        meta = self._context.meta | {"tokens": step * self._stage.tokens_per_batch}
        if self._stage.probe is not None:
            with sharding.use_mesh(self._context.mesh):
                meta["probe"] = self._stage.probe(state.params)
        self._context.checkpoints.save(
            step, state, self._stage.batches.get_state(), meta, scores, force=force
        )
        self._paused += time.perf_counter() - began

    def summary(self, step: int) -> dict[str, Any]:
        """The closing figures of the run."""
        steps_timed = max(self._total_steps - self._window_steps, 1)
        rate = self._stage.tokens_per_batch * steps_timed / max(self._train_secs, 1e-9)
        return self._last | {
            "step": step,
            "steps_this_run": step - self._start,
            "mean_tokens_per_sec": rate,
            "wall_secs": time.perf_counter() - self._began,
        }

    def close(self) -> None:
        """Closes bar and files."""
        self._bar.close()
        self._writer.close()

    def _say(self, text: str) -> None:
        if self._bar.disable:
            self._context.log(text)
        else:
            self._bar.write(text, file=sys.stderr)


def _clock(secs: float) -> str:
    hours, rest = divmod(int(math.ceil(secs)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def write_results(
    stage: Stage, outcome: Outcome, workdir: Path, extra: dict[str, Any], name: str
) -> None:
    """Writes `summary.json`, `loss.png` and the charts of the stage at the end of a run."""
    summary = json.dumps(outcome.summary | extra, indent=2, sort_keys=True)
    metrics_lib.write_atomically(workdir / "summary.json", summary + "\n")
    rows = metrics_lib.read_metrics(workdir / "metrics.jsonl")
    metrics_lib.plot_losses(rows, workdir / "loss.png", f"{name}: loss")
    if stage.charts:
        metrics_lib.plot_charts(rows, stage.charts, workdir / "diagnostics.png", name)
