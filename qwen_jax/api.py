"""The Python API: a model from disk, its logits, its continuations. `import qwen_jax` offers it.

Texts in, texts out; the compiled work is done by `generate/decode.py`. The chat and evaluation
commands use the same functions.
"""

import codecs
import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import loading
from qwen_jax.config import ModelConfig
from qwen_jax.generate.decode import DecodeConfig, begin, decode, extend, pad_prompts, unrolled
from qwen_jax.generate.sampling import GREEDY, SamplingConfig
from qwen_jax.hf.tokenizer import AnyTokenizer
from qwen_jax.model.context import ContextConfig
from qwen_jax.model.transformer import Transformer, head_matrix
from qwen_jax.model.transformer import logits as head_logits
from qwen_jax.sharding import use_mesh

# Lengths are rounded up to a multiple, or here to a power of two from this on, so that few shapes
# are compiled.
_LOGITS_MULTIPLE, _SHORTEST_BUCKET = 16, 64
# Tokens per call of the compiled loop while streaming: more are faster, fewer come more smoothly.
STREAM_TOKENS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    params: as decoding reads them (`decode.unrolled`), and `cfg` agrees. tokenizer: text to ids.
    trained_len: longest sequence of its training in tokens. max_positions: longest prompt and
    answer together. context: what is done beyond the trained length. chat: whether the checkpoint
    says that it speaks ChatML.
    """

    params: Any
    cfg: ModelConfig
    tokenizer: AnyTokenizer
    trained_len: int
    max_positions: int
    context: ContextConfig
    chat: bool

    @property
    def num_real(self) -> int:
        """Ids from here on are padding rows of the embedding."""
        return min(self.tokenizer.vocab_size, self.cfg.vocab_size)


class Completion(NamedTuple):
    """One continuation.

    text: control tokens left out. tokens: new ids, the one that stopped it included. log_probs: of
    each under the distribution it was drawn from, in nats. stopped: by a stop, not by the limit.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    stopped: bool


class Piece(NamedTuple):
    """What has come since the last piece: whole characters, and the ids behind them."""

    text: str
    tokens: list[int]


def load(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "as_is",
    tokenizer: str = "",
    subtree: str = "",
    context: ContextConfig | None = None,
    max_positions: int = 0,
) -> Model:
    """Loads one of our workdirs or checkpoints, a Hugging Face directory or a `.gguf` file.

    mesh, dtype, tokenizer, subtree: as in `loading.load`. context: what is done beyond the trained
    length; None: what the release switches on by itself, for a model trained here nothing.
    max_positions: 0 for what the checkpoint promises, for a model trained here its trained length.

    Raises:
      ValueError: no model there, or one that does not fit this code; the text says what and why.
    """
    found = loading.load(path, mesh=mesh, dtype=dtype, tokenizer=tokenizer, subtree=subtree)
    if context is None:
        trained = found.context
        context = ContextConfig(trained.seq_len, trained.dynamic_ntk, logn=trained.logn)
    cfg = dataclasses.replace(found.cfg, scan_layers=False, remat="none")
    context.check_layers(cfg.num_layers, cfg.scan_layers)
    with contextlib.nullcontext() if mesh is None else use_mesh(mesh):
        params = unrolled(found.params, cfg=found.cfg)
    longest = max_positions or found.context.max_positions
    return Model(params, cfg, found.tokenizer, found.context.seq_len, longest, context, found.chat)


def logits(model: Model, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Scores of the next token at every position, float32, over the ids that exist.

    token_ids: one sequence [L] gives [L, V]; rows of equal length [B, L] give [B, L, V].

    Raises:
      ValueError: no tokens, an id that does not exist, or another shape.
    """
    tokens = np.asarray(token_ids)
    if tokens.ndim not in (1, 2) or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"token_ids of shape {tokens.shape} and type {tokens.dtype}: give integer ids, [L] or "
            "[B, L], at least one"
        )
    tokens_BL = tokens.reshape(-1, tokens.shape[-1])
    _check_ids(model, tokens_BL.ravel().tolist(), "token_ids")
    length = tokens_BL.shape[1]
    padding = ((0, 0), (0, -length % _LOGITS_MULTIPLE))
    padded_BL = np.pad(tokens_BL.astype(np.int32), padding)
    segments_BL = np.pad(np.ones_like(tokens_BL, np.int32), padding)
    scores = _logits(model.params, padded_BL, segments_BL, cfg=model.cfg, context=model.context)
    scores_BLV = np.asarray(scores)[:, :length, : model.num_real]
    return scores_BLV.reshape(*tokens.shape, -1)


@functools.partial(jax.jit, static_argnames=("cfg", "context"))
def _logits(params, tokens_BL, segments_BL, *, cfg, context):
    length = tokens_BL.shape[1]
    positions_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], tokens_BL.shape)
    model = Transformer(cfg, context)
    hidden_BLD, _ = model.apply({"params": params}, tokens_BL, positions_BL, segments_BL)
    return head_logits(hidden_BLD, head_matrix(params, cfg))


def complete(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """Continues each prompt, all in one batch; greedy unless a temperature is given.

    prompts: texts, encoded as ordinary text, or token ids. stop_ids: what ends an answer; None: the
    end of a document. Row n draws with a key made from `seed` and n alone.

    Raises:
      ValueError: a setting out of range, or a prompt that is empty, unknown or too long.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts = {prompts!r}: give a list, [{prompts!r}]")
    if not prompts:
        return []
    sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty)
    made_for = _decode_config(model, sampling, max_new_tokens, stop_ids, log_probs=True)
    rows = [prompt_ids(model, prompt, number) for number, prompt in enumerate(prompts)]
    for number, row in enumerate(rows):
        _check_room(model, len(row), max_new_tokens, f"prompt {number}")
    tokens_BP, lengths_B = pad_prompts(rows, made_for.pad, _bucket(max(map(len, rows))))
    out = decode(
        model.params,
        tokens_BP,
        lengths_B,
        jax.random.key(seed),
        cfg=made_for.model,
        sampling=sampling,
        stop_ids=made_for.stop_ids,
        pad=made_for.pad,
        max_new_tokens=max_new_tokens,
        num_real=made_for.num_real,
        context=made_for.context,
    )
    out = jax.device_get(out)
    return [_completion(model, out, row) for row in range(len(rows))]


def _completion(model: Model, out, row: int) -> Completion:
    length = int(out.lengths_B[row])
    tokens = out.tokens_BR[row, :length].tolist()
    text = model.tokenizer.decode(tokens, skip_special=True)
    return Completion(
        text, tokens, out.log_probs_BR[row, :length].tolist(), bool(out.stopped_B[row])
    )


def stream(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 512,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """Continues one prompt and yields what has come every `STREAM_TOKENS` tokens.

    Texts hold whole characters only: bytes of an unfinished one wait for the rest. Prompts share a
    compiled program with those of about their length. Settings as in `complete`; the same seed
    gives the same tokens as there. Where the context ends before `max_new_tokens` have come, so
    does the answer.

    Raises:
      ValueError: at the first piece, as `complete`.
    """
    ids = prompt_ids(model, prompt, 0)
    room = _check_room(model, len(ids), 1, "the prompt")
    made_for = _decode_config(model, sampling, max_new_tokens, stop_ids, log_probs=False)
    limit = min(max_new_tokens, room)
    tokens_BP, lengths_B = pad_prompts([ids], made_for.pad, _bucket(len(ids)))
    state = begin(
        model.params,
        tokens_BP,
        lengths_B,
        jax.random.key(seed),
        np.zeros(1, np.int32),
        made_for=made_for,
    )
    text, shown = TextStream(model.tokenizer), 0
    while True:
        tokens_BR, lengths_B, stopped_B = jax.device_get(
            (state.out.tokens_BR, state.out.lengths_B, state.out.stopped_B)
        )
        length = int(lengths_B[0])
        new = tokens_BR[0, shown:length].tolist()
        done = bool(stopped_B[0]) or length >= limit
        piece = text.feed(new)
        yield Piece(piece + text.finish() if done else piece, new)
        if done:
            return
        shown = length
        until = np.int32(min(length + STREAM_TOKENS, limit))
        state = extend(model.params, state, until, made_for=made_for)


class TextStream:
    """Ids to text piece by piece; bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_bytes = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these ids complete; control tokens are left out."""
        self._tokens += [t for t in tokens if not self._tokenizer.is_special(t)]
        # All of them again: not every foreign tokenizer can decode an id without its neighbours.
        data = self._tokenizer.decode_bytes(self._tokens)
        new, self._num_bytes = data[self._num_bytes :], len(data)
        return self._decoder.decode(new)

    def finish(self) -> str:
        """What stands for an unfinished character at the end: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


def prompt_ids(model: Model, prompt: str | Sequence[int], number: int = 0) -> list[int]:
    """The ids of a prompt; an empty text is a document that begins.

    Raises:
      ValueError: no ids, or one that does not exist.
    """
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt) or [model.tokenizer.end_of_text]
    ids = [operator.index(token) for token in prompt]
    if not ids:
        raise ValueError(f"prompt {number} is empty; start it with the end-of-text token")
    _check_ids(model, ids, f"prompt {number}")
    return ids


def _check_ids(model: Model, ids: Sequence[int], where: str) -> None:
    wrong = [token for token in ids if not 0 <= token < model.num_real]
    if wrong:
        raise ValueError(
            f"{where}: id {wrong[0]} does not exist; ids are 0 to {model.num_real - 1}"
        )


def _check_room(model: Model, length: int, needed: int, where: str) -> int:
    """Tokens that can follow a prompt; a ValueError when they are fewer than needed."""
    room = model.max_positions - length
    if room < needed:
        raise ValueError(
            f"{where} has {length} tokens and {needed} more are asked for, but the context of this "
            f"model is {model.max_positions} tokens: shorten it or ask for fewer"
        )
    return room


def _decode_config(model: Model, sampling, max_new_tokens, stop_ids, *, log_probs) -> DecodeConfig:
    end = model.tokenizer.end_of_text
    stops = (end,) if stop_ids is None else tuple(stop_ids)
    return DecodeConfig(
        model=model.cfg,
        sampling=sampling,
        stop_ids=stops,
        pad=end,
        max_new_tokens=max_new_tokens,
        num_real=model.num_real,
        context=model.context,
        log_probs=log_probs,
    )


def _bucket(length: int) -> int:
    """The smallest power of two, from `_SHORTEST_BUCKET` on, that is not below `length`."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())
