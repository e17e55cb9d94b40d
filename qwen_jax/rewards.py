"""The Python API of reward models: `load_reward(DIR)`, then scores of answers.

    judge = qwen_jax.load_reward("runs/reward")
    judge("What is 2 + 2?", "4")                             # one score
    judge.scores([("What is 2 + 2?", "4"), ("...", "...")])  # many, batched by length

Scores carry the gain and bias of the checkpoint. Only differences between answers to the same
messages were trained.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax import loading
from qwen_jax.config import ModelConfig
from qwen_jax.data.batch import to_devices
from qwen_jax.data.formats import scored_sequence
from qwen_jax.hf.tokenizer import AnyTokenizer
from qwen_jax.model import scalar
from qwen_jax.sharding import use_mesh
from qwen_jax.text.conversations import as_messages

WIDTH_MULTIPLE = 64  # sequences are padded to a multiple of it: one compilation each


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """A loaded reward model.

    system: the system turn of conversations that bring none, empty for none. end_token: the id at
    which the score is read. seq_len: the longest sequence of its training, and the longest scored.
    mesh: the devices that share the work, None for one.
    """

    params: Any
    cfg: ModelConfig
    tokenizer: AnyTokenizer
    system: str
    end_token: int
    seq_len: int
    mesh: jax.sharding.Mesh | None = None

    @property
    def gain(self) -> float:
        """By what scores were multiplied when they were calibrated."""
        return float(self.params[scalar.CALIBRATION]["gain"])

    def __call__(self, messages: Any, answer: str) -> float:
        """The score of one answer; see `scores`."""
        return float(self.scores([(messages, answer)], batch_size=1)[0])

    def scores(self, items: Sequence[tuple[Any, str]], *, batch_size: int = 16) -> np.ndarray:
        """Scores [items], float32, of answers to messages.

        items: (messages, answer); messages are a text of the user, or turns in a form that
        `text/conversations.py` reads. batch_size: sequences at once.

        Raises:
          ValueError: messages that are none, or a sequence longer than `seq_len`.
        """
        rows = [self.sequence(messages, answer) for messages, answer in items]
        for number, row in enumerate(rows):
            if len(row) > self.seq_len:
                raise ValueError(
                    f"answer {number} and its messages are {len(row)} tokens, the reward model was "
                    f"trained on at most {self.seq_len}"
                )
        return self.score_sequences(rows, batch_size=batch_size)

    def sequence(self, messages: Any, answer: str) -> np.ndarray:
        """The ids that are scored, at the last of them."""
        asked = as_messages(messages)
        return scored_sequence(self.tokenizer, asked, answer, self.system, self.end_token)

    def score_sequences(self, rows: Sequence[np.ndarray], *, batch_size: int = 16) -> np.ndarray:
        """Scores [rows] of sequences of ids, batched by length."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        out = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            # A full batch always, so that few shapes are compiled.
            filled = chosen + chosen[:1] * (batch_size - len(chosen))
            out[chosen] = self._batch([rows[row] for row in filled])[: len(chosen)]
        return out

    def _batch(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        lengths_B = np.array([len(row) for row in rows], np.int32)
        width = -(-int(lengths_B.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tokens_BL = np.full((len(rows), width), self.tokenizer.end_of_text, np.int32)
        for place, row in enumerate(rows):
            tokens_BL[place, : len(row)] = row
        if self.mesh is None:
            return np.asarray(_scores(self.params, tokens_BL, lengths_B, cfg=self.cfg))
        with use_mesh(self.mesh):
            batch = to_devices({"tokens": tokens_BL, "lengths": lengths_B}, self.mesh)
            scores_B = _scores(self.params, batch["tokens"], batch["lengths"], cfg=self.cfg)
            return np.asarray(jax.device_get(scores_B))


@functools.partial(jax.jit, static_argnames="cfg")
def _scores(params, tokens_BL, lengths_B, *, cfg: ModelConfig) -> jax.Array:
    return scalar.end_scores(params, tokens_BL, lengths_B, cfg, calibrated=True)


def load_reward(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "as_is",
    tokenizer: str = "",
) -> RewardModel:
    """Loads a reward model from a workdir or one of its steps; arguments as in `api.load`.

    Raises:
      ValueError: no reward model there, or one that does not fit this code.
    """
    found = loading.load_reward(path, mesh, dtype=dtype, tokenizer=tokenizer)
    return RewardModel(*found, mesh=mesh)
