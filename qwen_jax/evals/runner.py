"""Batches of prompts through the model: log-likelihoods and greedy answers, host side.

Rows come in the batches that `plan` made: about equal lengths, and the beginning that they share
read once. A row's result does not depend on the other rows of its batch. With a mesh the rows and
the parameters are spread over it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.evals import likelihood
from qwen_jax.generate.decode import DecodeConfig, begin, decoding_config, extend
from qwen_jax.generate.prefix import common_length, may_share, prefix_size, read_prefix
from qwen_jax.generate.sampling import GREEDY
from qwen_jax.model.cache import KVCache, grow
from qwen_jax.model.context import ContextConfig
from qwen_jax.sharding import sharding_of, use_mesh

# A shared beginning below this many tokens is not worth a cache of its own.
MIN_SHARED = 48
# Tokens between two looks at the texts for stop sequences.
LOOK_EVERY = 32
# The cache of answers grows in so many steps, each compiled once.
_CACHE_SIZES = 3


class Subject(Protocol):
    """The model under evaluation; `api.Model` is one."""

    params: Any
    cfg: ModelConfig
    tokenizer: Any
    max_positions: int
    context: ContextConfig
    chat: bool

    @property
    def num_real(self) -> int:
        """Ids from here on are padding rows of the head."""


class Batch(NamedTuple):
    """Rows to run together: their numbers, and how many tokens at their beginning are shared."""

    rows: tuple[int, ...]
    shared: int


class Written(NamedTuple):
    """An answer. tokens: new ones, what comes after a stop included. finish: `stop` or `length`."""

    text: str
    tokens: list[int]
    finish: str


def plan(
    prompts: Sequence[Sequence[int]], groups: Sequence[str], batch_size: int, share: bool
) -> list[Batch]:
    """The batches of all prompts; the same prompts always give the same ones.

    Rows of a group are kept together when they share a beginning, the others are pooled. Within a
    batch lengths are about equal; the longest come first, so that what does not fit fails at once.
    """
    by_group: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        by_group.setdefault(group, []).append(number)
    pools, rest = [], []
    for rows in by_group.values():
        shared = common_length([prompts[row] for row in rows]) if share and len(rows) > 1 else 0
        if shared < MIN_SHARED:
            rest += rows
        else:
            pools.append((rows, shared))
    batches = []
    for rows, shared in [*pools, (rest, 0)]:
        order = sorted(rows, key=lambda row: (-len(prompts[row]), row))
        for start in range(0, len(order), batch_size):
            batches.append(Batch(tuple(order[start : start + batch_size]), shared))
    return batches


def bucket(length: int) -> int:
    """Padded width of rows up to `length`: few different ones, and little padding."""
    for limit, multiple in ((128, 32), (512, 64), (2048, 128)):
        if length <= limit:
            return -(-length // multiple) * multiple
    return -(-length // 256) * 256


class Runner:
    """Runs batches of one model. mesh: None for one device."""

    def __init__(self, model: Subject, batch_size: int, mesh: jax.sharding.Mesh | None = None):
        self.model, self.batch_size, self.mesh = model, batch_size, mesh
        self._decoding = decoding_config(model.cfg)
        self._prefix: tuple[tuple[int, ...], KVCache | None] = ((), None)

    @property
    def tokenizer(self):
        """Of the model."""
        return self.model.tokenizer

    def plan(self, prompts, groups, new_tokens: int = 0) -> list[Batch]:
        """`plan` for this model and batch size."""
        longest = max(map(len, prompts), default=0) + new_tokens
        share = may_share(self.model.context, longest)
        return plan(prompts, groups, self.batch_size, share)

    def next_log_probs(self, prompts: Sequence[Sequence[int]], ids, shared: int) -> np.ndarray:
        """Log-probabilities [n, C] of each of `ids` as the next token of each prompt."""
        with self._on_mesh():
            prefix, tokens, lengths = self._rows(prompts, shared)
            options = self._options() | {"cfg": self._decoding if shared else self.model.cfg}
            out = likelihood.next_token(
                self.model.params, tokens, lengths, np.asarray(ids, np.int32), prefix, **options
            )
            return np.asarray(jax.device_get(out))[: len(prompts)]

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], shared: int
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation after its context, and whether greedy."""
        rows = [[*context, *continuation][:-1] for context, continuation in pairs]
        most = max(len(continuation) for _, continuation in pairs)
        targets = np.zeros((self.batch_size, 1 << (most - 1).bit_length()), np.int32)
        counts = np.ones(self.batch_size, np.int32)
        for row, (_, continuation) in enumerate(pairs):
            targets[row, targets.shape[1] - len(continuation) :] = continuation
            counts[row] = len(continuation)
        with self._on_mesh():
            prefix, tokens, lengths = self._rows(rows, shared)
            targets, counts = self._spread((targets, counts))
            options = self._options() | {"cfg": self._decoding if shared else self.model.cfg}
            out = likelihood.last_targets(
                self.model.params, tokens, lengths, targets, counts, prefix, **options
            )
            log_probs, greedy = jax.device_get(out)
        return [(float(log_probs[row]), bool(greedy[row])) for row in range(len(pairs))]

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        stops: Sequence[str],
        max_new_tokens: int,
        shared: int,
    ) -> list[Written]:
        """Greedy answers, each cut before the first of the texts `stops`.

        The texts are looked for in the decoded answer, so it does not matter how they are split
        into tokens.
        """
        made_for = DecodeConfig(
            model=self.model.cfg,
            sampling=GREEDY,
            stop_ids=tuple(stop_ids),
            pad=self.tokenizer.end_of_text,
            max_new_tokens=max_new_tokens,
            num_real=self.model.num_real,
            context=self.model.context,
            log_probs=False,
        )
        with self._on_mesh():
            tokens, lengths, stopped = self._decode(prompts, made_for, stops, shared)
        answers = []
        for row in range(len(prompts)):
            new = tokens[row, : lengths[row]].tolist()
            text = self.tokenizer.decode(new, skip_special=True)
            cut = first_stop(text, stops)
            finish = "length" if cut is None and not stopped[row] else "stop"
            answers.append(Written(text if cut is None else text[:cut], new, finish))
        return answers

    def _decode(self, prompts, made_for: DecodeConfig, stops, shared: int):
        prefix, tokens, lengths = self._rows(prompts, shared)
        before, new = prefix_size(prefix) + tokens.shape[1], made_for.max_new_tokens
        grain = max(LOOK_EVERY, -(-new // _CACHE_SIZES // LOOK_EVERY) * LOOK_EVERY)
        key, rows = jax.random.key(0), np.arange(self.batch_size, dtype=np.int32)
        size = before + min(grain, new)
        state = begin(
            self.model.params, tokens, lengths, key, rows, made_for=made_for, prefix=prefix,
            size=size,
        )  # fmt: skip
        texts = _Watch(self.tokenizer, stops, len(prompts), self.batch_size)
        for done in range(0, new, LOOK_EVERY):
            until = min(new, done + LOOK_EVERY)
            if before + until > size:
                size = min(before + new, size + grain)
                state = state.replace(cache=grow(state.cache, size))
            many = until - done >= LOOK_EVERY
            state = extend(
                self.model.params, state, np.int32(until), made_for=made_for, many=many
            )  # fmt: skip
            out = jax.device_get(state.out)
            stopped = texts.look(out.tokens_BR, out.lengths_B, out.stopped_B)
            if stopped.all():
                break
            placed = self._spread(stopped)
            state = state.replace(out=state.out._replace(stopped_B=placed))
        return out.tokens_BR, out.lengths_B, out.stopped_B

    def _rows(self, rows: Sequence[Sequence[int]], shared: int):
        """The cache of the shared beginning, and the rest of each row as one padded array."""
        prefix = self._read_prefix(tuple(rows[0][:shared])) if shared else None
        rest = [row[shared:] for row in rows]
        rest += rest[:1] * (self.batch_size - len(rest))
        tokens = np.zeros((len(rest), bucket(max(map(len, rest)))), np.int32)
        for number, row in enumerate(rest):
            tokens[number, : len(row)] = row
        lengths = np.asarray(list(map(len, rest)), np.int32)
        return prefix, *self._spread((tokens, lengths))

    def _read_prefix(self, tokens: tuple[int, ...]) -> KVCache | None:
        if self._prefix[0] != tokens:
            ways = 1 if self.mesh is None else math.prod(self.mesh.shape.values())
            self._prefix = ((), None)  # its memory goes before the next one's comes
            cache = read_prefix(
                self.model.params, tokens, cfg=self._decoding, context=self.model.context,
                copies=ways,
            )  # fmt: skip
            self._prefix = (tokens, cache)
        return self._prefix[1]

    def _options(self) -> dict[str, Any]:
        return {"context": self.model.context, "num_real": self.model.num_real}

    def _spread(self, arrays):
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, sharding_of(self.mesh, ("batch",)))

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)


class _Watch:
    """Looks for the stop texts in rows that grow; rows of padding have always stopped."""

    def __init__(self, tokenizer, stops: Sequence[str], num_rows: int, batch_size: int):
        self._tokenizer, self._stops = tokenizer, stops
        self._seen = np.arange(batch_size) >= num_rows

    def look(self, tokens_BR, lengths_B, stopped_B) -> np.ndarray:
        """Which rows need no more tokens."""
        self._seen |= np.asarray(stopped_B)
        for row in np.flatnonzero(~self._seen):
            text = self._tokenizer.decode(tokens_BR[row, : lengths_B[row]].tolist())
            self._seen[row] = first_stop(text, self._stops) is not None
        return self._seen


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins; None without one."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return min(places, default=None)


def rolling_windows(
    tokens: Sequence[int], first: int, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs (context, targets) that predict every token of a text once.

    first: what stands before the text. Each window holds up to `length` inputs; those after the
    first begin right after the tokens scored before, and the last reaches back as far as it can.
    Example with length 2 and tokens 1..5, first 0: ([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5]).
    """
    everything = [first, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        reach = start if start == 0 else max(0, end - length)
        yield everything[reach : start + 1], everything[start + 1 : end + 1]
