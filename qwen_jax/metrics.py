"""What a run reports: metrics files, throughput, utilisation, the plot at the end."""

import json
import math
import os
from pathlib import Path
from typing import Any

# Dense bf16 peak in FLOP/s by the device kind that JAX reports, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in FLOP/s, None when the kind is unknown: no utilisation is made up."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def model_flops_utilisation(flops: float, secs: float, device_kind: str, num_devices: int):
    """Share of the peak that the model's own FLOPs reach; None without a known peak."""
    peak = peak_flops(device_kind)
    return None if peak is None or secs <= 0 else flops / (secs * peak * num_devices)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total negative log-likelihood as bits for each byte of text."""
    return nats / math.log(2) / num_bytes


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard files; on other processes than 0 it is mute.

    After a resume, lines of steps that are done again are dropped first, so that every step is in
    the file once.
    """

    def __init__(self, workdir: Path, start_step: int, *, active: bool):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
            write_atomically(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records the values of one step; numbers go to TensorBoard as well."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Shows a text under TensorBoard's text tab."""
        if self._active:
            self._tensorboard.add_text(name, text, step)

    def close(self) -> None:
        """Flushes both files."""
        if self._active:
            self._file.close()
            self._tensorboard.close()


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut short by a crash counts as after everything."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < math.inf]


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one rename, so that a crash leaves the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and held-out loss over the steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for name, label, style in (("loss", "training", "-"), ("heldout_loss", "held-out", "o--")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1.2, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_charts(rows: list[dict[str, Any]], names: tuple[str, ...], path: Path, title: str) -> None:
    """Draws each metric over the steps in a chart of its own, all in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    lines = -(-len(names) // columns)
    size = (3.6 * columns, 2.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, dpi=110, squeeze=False)
    for axis, name in zip(axes.flat, names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
