"""The Qwen transformer: embedding, pre-norm blocks, final norm. Qwen report sec. 2.3.

The output is the hidden state; the head is a parameter beside the blocks and is applied by the
caller (`head_matrix`, then `losses.cross_entropy_sum` or `logits`), because no caller needs the
logits of all positions at once. Parameter paths are listed in `tests/golden/parameters_*.txt`.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.config import ModelConfig
from qwen_jax.model import cache as kv
from qwen_jax.model.attention import Visibility, attend, attend_cached, training_visibility
from qwen_jax.model.context import NEUTRAL, ContextConfig, logn_factor, ntk_scale, row_alpha
from qwen_jax.model.kernels import RESIDUALS
from qwen_jax.model.layers import (
    Linear,
    RMSNorm,
    dropout,
    join_linears,
    linear,
    linears,
    param,
    swiglu,
)
from qwen_jax.model.rope import apply_rope, rope_tables
from qwen_jax.sharding import constrain, exchange_width

# What the backward pass finds of a layer, and whether on the device or in the host's memory.
_SAVED_NAMES = {
    "save_matmuls": (("qkv", "attention_out", "mlp_in"), ()),
    "save_attention": (("qkv",), ()),
    "offload_attention": ((), ("qkv",)),
    "offload_matmuls": ((), ("qkv", "attention_out", "mlp_in")),
}
# Products of the same input, by the module that holds them.
_JOINABLE = {"attention": ("query", "key", "value"), "feed_forward": ("up", "gate")}


class Rotation(NamedTuple):
    """What depends on the positions: cosines and sines [B, L, H/2], and the query's LogN factor."""

    tables: tuple[jax.Array, jax.Array]
    query_scale_BL: jax.Array | None


class PerLayer(NamedTuple):
    """What each layer gets of its own besides its weights, None for nothing.

    dropout_key: its random key, for training with dropout. adapters: low-rank products beside its
    matrices by module and name; see `adapters.py`.
    """

    dropout_key: jax.Array | None = None
    adapters: Any = None

    def adapter(self, module: str, name: str):
        """The adapter of one matrix, None where it has none."""
        if self.adapters is None or module not in self.adapters:
            return None
        return self.adapters[module].get(name)

    def key(self, number: int) -> jax.Array | None:
        """A key for each of the layer's own uses."""
        return None if self.dropout_key is None else jax.random.fold_in(self.dropout_key, number)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; biases on query, key and value only."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BLD, rope: Rotation, seen: Visibility, layer_cache, own: PerLayer):
        """Returns the sum over heads and this layer's updated cache (None without one)."""
        cfg = self.cfg
        batch, length, _ = x_BLD.shape

        def heads(merged):
            split = checkpoint_name(merged, "qkv").reshape(batch, length, -1, cfg.head_dim)
            return constrain(split, "batch", "length", "act_heads", None)

        counts = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        names = _JOINABLE["attention"]
        widths = {name: n * cfg.head_dim for name, n in zip(names, counts, strict=True)}
        adapters = {name: own.adapter("attention", name) for name in names}
        axes = ("heads", "kv_heads", "kv_heads")
        q, k, v = linears(self, x_BLD, widths, axes, cfg.qkv_bias, adapters)
        q_BLNH, k_BLKH = apply_rope(heads(q), rope.tables), apply_rope(heads(k), rope.tables)
        v_BLKH = heads(v)
        if rope.query_scale_BL is not None:
            q_BLNH = q_BLNH * rope.query_scale_BL.astype(q_BLNH.dtype)[:, :, None, None]
        written = None
        if layer_cache is not None:
            written = kv.append_layer(layer_cache, k_BLKH, v_BLKH)
        if layer_cache is None or layer_cache.empty:
            out_BLNH = attend(q_BLNH, k_BLKH, v_BLKH, seen, cfg.attention)
        else:
            reached = kv.reached(layer_cache, written, k_BLKH, v_BLKH, seen)
            out_BLNH = attend_cached(q_BLNH, *reached)
        out_BLNH = checkpoint_name(out_BLNH, "attention")
        merged = out_BLNH.reshape(batch, length, cfg.num_heads * cfg.head_dim)
        std = cfg.init_std / math.sqrt(2 * cfg.num_layers)
        out = Linear(cfg, cfg.d_model, ("heads", "embed"), std, name="out")
        out_BLD = out(merged, own.adapter("attention", "out"))
        return checkpoint_name(out_BLD, "attention_out"), written


class FeedForward(nn.Module):
    """SwiGLU: `down(up(x) * silu(gate(x)))`. In Qwen's names: c_proj, w1, w2."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BLD, own: PerLayer):
        """Maps each position on its own."""
        cfg = self.cfg
        names = _JOINABLE["feed_forward"]
        widths = dict.fromkeys(names, cfg.d_ff)
        adapters = {name: own.adapter("feed_forward", name) for name in names}
        up, gate = (
            constrain(checkpoint_name(y, "mlp_in"), "batch", "length", "act_mlp")
            for y in linears(self, x_BLD, widths, ("mlp", "mlp"), False, adapters)
        )
        std = cfg.init_std / math.sqrt(2 * cfg.num_layers)
        down = Linear(cfg, cfg.d_model, ("mlp", "embed"), std, name="down")
        return down(swiglu(up, gate), own.adapter("feed_forward", "down"))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual."""

    cfg: ModelConfig
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BLD, rope, seen: Visibility, layer_cache, own: PerLayer):
        """Returns the residual and this layer's updated cache (None without one)."""
        cfg = self.cfg
        with jax.named_scope("attention"):
            normed = RMSNorm(cfg, name="attention_norm")(x_BLD)
            attention = Attention(cfg, name="attention")
            mixed, layer_cache = attention(normed, rope, seen, layer_cache, own)
            mixed = dropout(mixed, self.dropout, own.key(0))
            x_BLD = constrain(x_BLD + mixed, "batch", "length", "act_embed")
        with jax.named_scope("feed_forward"):
            normed = RMSNorm(cfg, name="feed_forward_norm")(x_BLD)
            mapped = FeedForward(cfg, name="feed_forward")(normed, own)
            x_BLD = x_BLD + dropout(mapped, self.dropout, own.key(1))
        return constrain(x_BLD, "batch", "length", "act_embed"), layer_cache


class Transformer(nn.Module):
    """Tokens to hidden states.

    context: what is done beyond the trained length, nothing as such. lm_head: whether the head over
    the vocabulary is among the parameters. dropout: rate on the embedding and on what each sublayer
    adds, where a key is given.
    """

    cfg: ModelConfig
    context: ContextConfig = NEUTRAL
    lm_head: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        tokens_BL,
        positions_BL,
        segments_BL=None,
        cache: kv.KVCache | None = None,
        alpha_B=None,
        adapters=None,
        dropout_key=None,
    ):
        """Returns (hidden_BLD, cache).

        segments_BL: 0 marks padding; None when every row is one document. With a cache, the L
        tokens are appended to it and attend to all it holds; this needs `scan_layers` off. alpha_B:
        what dynamic NTK chose for each row's prompt, fixed for all calls with one cache; complete
        rows may leave it out. adapters: laid out as the layers are, see `adapters.py`.
        """
        cfg = self.cfg
        self.context.check_layers(cfg.num_layers, cfg.scan_layers)
        normal = nn.initializers.normal(cfg.init_std)
        table_VD = param(
            self, "embedding", (cfg.vocab_size, cfg.d_model), ("vocab", "embed"), normal
        )
        if self.lm_head and not cfg.tie_embeddings:
            param(self, "head", (cfg.vocab_size, cfg.d_model), ("vocab", "embed"), normal)
        x_BLD = embed(table_VD, tokens_BL, cfg.compute_dtype)
        if dropout_key is not None:
            x_BLD = dropout(x_BLD, self.dropout, jax.random.fold_in(dropout_key, cfg.num_layers))
        x_BLD = constrain(x_BLD, "batch", "length", "act_embed")
        if cache is not None and segments_BL is None:
            segments_BL = jnp.ones_like(tokens_BL)
        if alpha_B is None:
            if self.context.dynamic_ntk and cache is not None:
                raise ValueError("dynamic NTK with a cache: pass alpha_B, fixed at the prompt")
            alpha_B = row_alpha(self.context, positions_BL, segments_BL)
        rope = _rotation(cfg, self.context, positions_BL, alpha_B)
        if cache is not None:
            cache = kv.append_positions(cache, positions_BL, segments_BL)
        if cache is None or cache.empty:
            seen = training_visibility(positions_BL, segments_BL)
        else:
            seen = Visibility(positions_BL, cache.positions_BS, segments_BL, cache.segments_BS)
        block = Block if cache is not None else _rematerialised(Block, cfg)
        keys_X = None
        if dropout_key is not None:
            fold = functools.partial(jax.random.fold_in, dropout_key)
            keys_X = jax.vmap(fold)(jnp.arange(cfg.num_layers))
        own = PerLayer(keys_X, adapters)
        if cfg.scan_layers:
            x_BLD = _scan_blocks(block, self)(x_BLD, rope, seen, cache, own)
        else:
            x_BLD, cache = _unrolled_blocks(block, self, x_BLD, rope, seen, cache, own)
        return RMSNorm(cfg, name="final_norm")(x_BLD), cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD: jax.Array, tokens_BL: jax.Array, dtype: str) -> jax.Array:
    """The rows of the tokens in `dtype`; their gradients are added up in float32.

    A batch holds its commonest token thousands of times; a bfloat16 sum of so many gradients stops
    growing after a few hundred.
    """
    return exchange_width(table_VD.astype(dtype)[tokens_BL])


def _embed_forward(table_VD, tokens_BL, dtype):
    return embed(table_VD, tokens_BL, dtype), (table_VD, tokens_BL)


def _embed_backward(dtype, saved, g_BLD):
    del dtype
    table_VD, tokens_BL = saved
    g_BLD = exchange_width(g_BLD, back=True).astype(jnp.float32)
    grad_VD = jnp.zeros(table_VD.shape, jnp.float32).at[tokens_BL].add(g_BLD)
    grad_VD = constrain(grad_VD, "vocab", "embed").astype(table_VD.dtype)
    return grad_VD, np.zeros(tokens_BL.shape, jax.dtypes.float0)


embed.defvjp(_embed_forward, _embed_backward)


def head_matrix(params, cfg: ModelConfig) -> jax.Array:
    """The output head [V, D]; the embedding itself when the two are tied."""
    return params["embedding"] if cfg.tie_embeddings else params["head"]


def logits(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Scores of the next token over the padded vocabulary, in float32."""
    return linear(hidden, head_VD.T).astype(jnp.float32)


def stack_layers(params, cfg: ModelConfig):
    """Parameters of unrolled layers (`block_0` ...) as one stacked `blocks` tree."""
    blocks = [params[f"block_{layer}"] for layer in range(cfg.num_layers)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_layers(params, cfg: ModelConfig):
    """The inverse of `stack_layers`."""
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    layers = {
        f"block_{layer}": jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        for layer in range(cfg.num_layers)
    }
    return rest | layers


def join_projections(params, cfg: ModelConfig):
    """Unrolled layers with query, key and value in one matrix, and up and gate in another.

    For decoding on one device: few large products take less time than many small ones. Joined, a
    mesh could not split them by heads.
    """
    blocks = {}
    for name in (f"block_{layer}" for layer in range(cfg.num_layers)):
        joined = {part: join_linears(params[name][part], _JOINABLE[part]) for part in _JOINABLE}
        blocks[name] = params[name] | joined
    return params | blocks


def _rematerialised(block, cfg: ModelConfig):
    """The block with the named part of its activations recomputed in the backward pass."""
    if cfg.remat == "none":
        return block
    policies = jax.checkpoint_policies
    if cfg.remat == "full":
        keep = policies.nothing_saveable
    else:
        here, on_host = _SAVED_NAMES[cfg.remat]
        # The output of a kernel is one of its residuals, which are kept so that it runs once.
        here += ("attention",) if cfg.attention == "reference" else (RESIDUALS,)
        names = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(here),
            names_which_can_be_offloaded=list(on_host),
            offload_src="device",
            offload_dst="pinned_host",
        )

        def keep(primitive, *args, **params):
            # The residuals of cuDNN's kernel have no name.
            kernel = primitive.name == "dot_product_attention_fwd_wrapper"
            return kernel or names(primitive, *args, **params)

    # Under scan there is nothing that common-subexpression elimination could undo.
    return nn.remat(block, policy=keep, prevent_cse=not cfg.scan_layers)


def _scan_blocks(block, model: Transformer):
    def run(x_BLD, rope, seen, cache, own: PerLayer):
        if cache is not None:
            raise ValueError("a cache needs model.scan_layers = False and unstacked parameters")
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=model.cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        own = own._replace(adapters=own.adapters and own.adapters["blocks"])
        blocks = scanned(model.cfg, model.dropout, name="blocks")
        return blocks(x_BLD, rope, seen, None, own)[0]

    return run


def _unrolled_blocks(
    block, model: Transformer, x_BLD, rope, seen: Visibility, cache, own: PerLayer
):
    cfg, context = model.cfg, model.context
    keys, values = [], []
    for layer in range(cfg.num_layers):
        layer_cache = None
        if cache is not None:
            layer_cache = kv.LayerCache(
                cache.keys[layer], cache.values[layer], cache.length, cache.empty
            )
        within = seen.replace(window=context.window(layer))
        name = f"block_{layer}"
        key = None if own.dropout_key is None else own.dropout_key[layer]
        mine = PerLayer(key, own.adapters and own.adapters[name])
        run = block(cfg, model.dropout, name=name)
        x_BLD, updated = run(x_BLD, rope, within, layer_cache, mine)
        if cache is not None:
            keys.append(updated[0])
            values.append(updated[1])
    if cache is not None:
        filled = cache.length + x_BLD.shape[1]
        cache = cache.replace(keys=tuple(keys), values=tuple(values), length=filled, empty=False)
    return x_BLD, cache


def _rotation(cfg: ModelConfig, context: ContextConfig, positions_BL, alpha_B) -> Rotation:
    scale_BP, query_scale_BL, turned_BL = None, None, positions_BL
    if context.dynamic_ntk:
        scale_BP = ntk_scale(alpha_B, cfg.head_dim)
    if context.interpolation != 1:
        turned_BL = positions_BL.astype(jnp.float32) / context.interpolation
    if context.logn:
        query_scale_BL = logn_factor(positions_BL, context.trained_len)
    tables = rope_tables(turned_BL, cfg.head_dim, cfg.rope_base, scale_BP)
    return Rotation(tables, query_scale_BL)
