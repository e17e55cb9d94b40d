"""Qwen (2023) forward pass in float64 loops, from the report and the released model's description.

Written without looking at `qwen_jax`: weights come under the names of the release (`wte`, `c_attn`,
`w1`, ...) in its (out, in) layout. Slow on purpose: every formula stands as it is printed.
Multi-head attention only; one document per row; positions count from 0.
"""

import numpy as np


def rms_norm(x, weight, eps):
    """x: [..., D]. x / sqrt(mean(x^2) + eps) * weight."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        mean_square = sum(value * value for value in x[index]) / len(x[index])
        out[index] = x[index] / np.sqrt(mean_square + eps) * weight
    return out


def rope(x, positions, base):
    """x: [L, heads, H]. Turns the pair (i, i + H/2) by position * base^(-2i/H)."""
    out = np.empty_like(x)
    head_dim = x.shape[-1]
    half = head_dim // 2
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * base ** (-2 * i / head_dim)
            a, b = x[row, :, i], x[row, :, i + half]
            out[row, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[row, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def softmax(scores):
    """scores: [S], a distribution over them."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def causal_attention(q, k, v):
    """q, k, v: [L, heads, H]. Each position looks at itself and what came before."""
    out = np.zeros_like(q)
    length, num_heads, head_dim = q.shape
    for head in range(num_heads):
        for t in range(length):
            scores = np.array([q[t, head] @ k[s, head] for s in range(t + 1)])
            weights = softmax(scores / np.sqrt(head_dim))
            out[t, head] = sum(weights[s] * v[s, head] for s in range(t + 1))
    return out


def attention(a, weights, name, num_heads, base):
    """a: [L, D], already normalised. c_attn gives [all Q | all K | all V]; c_proj has no bias."""
    qkv = a @ weights[f"{name}.c_attn.weight"].T + weights[f"{name}.c_attn.bias"]
    q, k, v = (part.reshape(len(a), num_heads, -1) for part in np.split(qkv, 3, axis=-1))
    positions = range(len(a))
    out = causal_attention(rope(q, positions, base), rope(k, positions, base), v)
    return out.reshape(len(a), -1) @ weights[f"{name}.c_proj.weight"].T


def silu(x):
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def feed_forward(m, weights, name):
    """m: [L, D]. silu is applied to w2's output; w1 is the linear factor."""
    linear, gate = m @ weights[f"{name}.w1.weight"].T, m @ weights[f"{name}.w2.weight"].T
    return (linear * silu(gate)) @ weights[f"{name}.c_proj.weight"].T


def block(h, weights, name, num_heads, base, eps):
    """h: [L, D]. Two pre-norm residual branches."""
    normed = rms_norm(h, weights[f"{name}.ln_1.weight"], eps)
    h = h + attention(normed, weights, f"{name}.attn", num_heads, base)
    normed = rms_norm(h, weights[f"{name}.ln_2.weight"], eps)
    return h + feed_forward(normed, weights, f"{name}.mlp")


def forward(ids, weights, num_layers, num_heads, base, eps):
    """ids: [L] of one row. Returns the logits [L, V]."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    h = weights["transformer.wte.weight"][ids]
    for layer in range(num_layers):
        h = block(h, weights, f"transformer.h.{layer}", num_heads, base, eps)
    h = rms_norm(h, weights["transformer.ln_f.weight"], eps)
    return h @ weights["lm_head.weight"].T


def mean_cross_entropy(logits, targets):
    """logits: [L, V], targets: [L]. Mean negative log-likelihood in nats."""
    nll = [-np.log(softmax(logits[t])[target]) for t, target in enumerate(targets)]
    return sum(nll) / len(nll)
