"""Perplexity by context length, each technique for longer context in turn: the report's Table 3.

Every cell of the table scores the same tokens. A window over the text ends every S/2 tokens (S: the
trained length), and only its last S/2 tokens are scored; column n gives the model the n tokens up
to the end of the window. So each token is predicted from between n - S/2 and n - 1 tokens before
it, and columns differ in nothing but how much context there is. The report averages in a way it
does not describe, over a text it does not name: its numbers are not comparable with these, the
shape of its rows is.

Windows lie inside single documents where enough documents are long enough; otherwise all documents
are joined, separated by the end-of-text token, and the result says so.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.losses import cross_entropy_sum
from qwen_jax.model.context import NEUTRAL, ContextConfig
from qwen_jax.model.transformer import Transformer, head_matrix

# Positions of one call of the compiled program.
POSITIONS_PER_CALL = 16_384


class Rows(NamedTuple):
    """Windows of text.

    tokens_RL: each row one window and, at its end, the last target. joined: whether documents were
    joined. num_documents: documents looked at.
    """

    tokens_RL: np.ndarray
    joined: bool
    num_documents: int


class Row(NamedTuple):
    """One line of the table: perplexities by column."""

    name: str
    context: ContextConfig
    perplexities: list[float]


def lengths_of(trained_len: int) -> tuple[int, ...]:
    """The columns: half the trained length, doubling to eight times of it."""
    return tuple(trained_len * factor // 2 for factor in (1, 2, 4, 8, 16))


def default_windows(num_layers: int, trained_len: int) -> tuple[int, ...]:
    """Attention windows by layer: S, 2S and 4S in the lower three quarters, none (0) above.

    The report gives no sizes ("shorter windows for lower layers and longer ones for higher
    layers"), and the released code has no windows. One author named 2048, 4096, 8192 "and so on" as
    an example for a model trained at 2048; the quarters are ours, so that shallow models get all
    sizes too.
    """
    sizes = (trained_len, 2 * trained_len, 4 * trained_len, 0)
    return tuple(sizes[4 * layer // num_layers] for layer in range(num_layers))


def techniques(trained_len: int, windows: Sequence[int]) -> dict[str, ContextConfig]:
    """The lines of the table, each one technique more than the one before."""
    ntk = ContextConfig(trained_len, dynamic_ntk=True)
    logn = dataclasses.replace(ntk, logn=True)
    return {
        "plain": NEUTRAL,
        "+ dynamic NTK": ntk,
        "+ dynamic NTK + LogN": logn,
        "+ dynamic NTK + LogN + windows": dataclasses.replace(logn, windows=tuple(windows)),
    }


def make_rows(
    documents: Iterable[np.ndarray], length: int, stride: int, num_rows: int, end_of_text: int
) -> Rows:
    """Windows of `length` tokens and one target more, each ending `stride` after the one before.

    documents: ids, read until there are enough windows inside single documents. If there never are,
    the windows lie on all documents joined.

    Raises:
      ValueError: too little text for a single window.
    """
    whole: list[np.ndarray] = []
    everything: list[np.ndarray] = []
    for tokens in documents:
        everything += [tokens, np.array([end_of_text], np.int32)]
        whole += _windows(tokens, length + 1, stride)
        if len(whole) >= num_rows:
            break
    num_documents = len(everything) // 2
    joined = len(whole) < num_rows
    if joined:
        stream = np.concatenate(everything) if everything else np.zeros(0, np.int32)
        whole = _windows(stream, length + 1, stride)
        if not whole:
            raise ValueError(
                f"the data has {len(stream)} tokens, one window takes {length + 1}: give more data "
                "or a shorter --trained_len"
            )
    return Rows(np.stack(whole[:num_rows]).astype(np.int32), joined, num_documents)


def _windows(tokens: np.ndarray, size: int, stride: int) -> list[np.ndarray]:
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, stride)]


def perplexity(
    params: Any, cfg: ModelConfig, context: ContextConfig, rows: Rows, length: int, scored: int
) -> float:
    """Perplexity of the last `scored` tokens of each row, given the last `length` as context.

    params, cfg: with unrolled layers. Computed in the compute dtype, summed in float32 and float64.
    """
    num_rows = len(rows.tokens_RL)
    per_call = min(num_rows, max(1, POSITIONS_PER_CALL // length))
    total = 0.0
    for start in range(0, num_rows, per_call):
        tokens = rows.tokens_RL[start : start + per_call, -length - 1 :]
        # Rows of zeros fill up the last call: one shape, and their weight is 0.
        weights_R = np.pad(np.ones(len(tokens), np.float32), (0, per_call - len(tokens)))
        tokens = np.pad(tokens, ((0, per_call - len(tokens)), (0, 0)))
        total += float(_nats(params, tokens, weights_R, cfg=cfg, context=context, scored=scored))
    return math.exp(min(total / (num_rows * scored), 700.0))


@functools.partial(jax.jit, static_argnames=("cfg", "context", "scored"))
def _nats(params, tokens_RL, weights_R, *, cfg, context, scored) -> jax.Array:
    """Negative log-likelihood of the last targets of all rows, in nats."""
    inputs_BL = tokens_RL[:, :-1]
    positions_BL = jnp.broadcast_to(jnp.arange(inputs_BL.shape[1])[None, :], inputs_BL.shape)
    hidden_BLD, _ = Transformer(cfg, context).apply({"params": params}, inputs_BL, positions_BL)
    targets_BT = tokens_RL[:, -scored:]
    weights_BT = jnp.broadcast_to(weights_R[:, None], targets_BT.shape)
    chunk = math.gcd(scored, cfg.loss_chunk)
    head_VD = head_matrix(params, cfg)
    return cross_entropy_sum(hidden_BLD[:, -scored:], head_VD, targets_BT, weights_BT, chunk)


def table(
    params: Any,
    cfg: ModelConfig,
    rows: Rows,
    contexts: dict[str, ContextConfig],
    lengths: Sequence[int],
    scored: int,
    log: Callable[[str], None],
) -> list[Row]:
    """All cells; `log` is told of each line when it is complete."""
    lines = []
    for name, context in contexts.items():
        values = [perplexity(params, cfg, context, rows, length, scored) for length in lengths]
        lines.append(Row(name, context, values))
        log(f"{name}: " + ", ".join(f"{n}: {v:.4g}" for n, v in zip(lengths, values)))
    return lines


def format_table(lines: Sequence[Row], lengths: Sequence[int]) -> str:
    """The table in Markdown."""
    head = ["", *(str(length) for length in lengths)]
    body = [[line.name, *(f"{value:.2f}" for value in line.perplexities)] for line in lines]
    cells = [head, ["---", *("---:" for _ in lengths)], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def plot(lines: Sequence[Row], lengths: Sequence[int], trained_len: int, path: str, title: str):
    """Draws perplexity over length, both logarithmic, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for line, style in zip(lines, ("o-", "s--", "^-.", "d:"), strict=True):
        axes.plot(lengths, line.perplexities, style, label=line.name, linewidth=1.4, markersize=5)
    axes.axvline(trained_len, color="grey", linewidth=0.8)
    axes.annotate(
        "trained length ", (trained_len, 0.5), xycoords=("data", "axes fraction"), ha="right"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left")  # no line is up there: only beyond the trained length
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
