"""Trains Qwen language models in JAX: from raw text to an aligned chat model.

For notebooks:

    import qwen_jax

    model = qwen_jax.load("runs/quickstart")
    scores = qwen_jax.logits(model, model.tokenizer.encode("def f("))
    answers = qwen_jax.complete(model, ["def f(", "import "], max_new_tokens=32)

    judge = qwen_jax.load_reward("runs/reward")
    judge("What is 2 + 2?", "4")

These names are imported when first asked for: data workers import this package too, and must start
without JAX. What they do is in `api.py` and `rewards.py`.
"""

import importlib
from typing import Any

# `qwen_jax.generate` is the subpackage, so the function for it has another name.
_HOMES = dict.fromkeys(("Completion", "Model", "complete", "load", "logits", "stream"), "api")
_HOMES |= dict.fromkeys(("RewardModel", "load_reward"), "rewards")
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qwen_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
