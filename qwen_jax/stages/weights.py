"""Which weights of a model a stage trains: all of them, or adapters beside a frozen base."""

from collections.abc import Callable
from typing import Any, NamedTuple

from qwen_jax.config import LoraConfig
from qwen_jax.model.adapters import ADAPTERS, BASE, init_adapters, scaled
from qwen_jax.trainer.state import subkey


class Weights(NamedTuple):
    """How the parameters of one model lie in those of a stage.

    init: turns key -> parameters of a whole model into key -> what is in the state. split: the
    parameters in the state -> (those of the model, adapters as the model applies them, or None).
    trained: see `Stage`.
    """

    init: Callable[[Callable], Callable]
    split: Callable[[Any], tuple[Any, Any]]
    trained: tuple[str, ...] | None


ALL = Weights(init=lambda whole: whole, split=lambda params: (params, None), trained=None)


def adapted(cfg: LoraConfig) -> Weights:
    """Adapters are trained; the base has neither gradients nor moments."""

    def init(whole: Callable) -> Callable:
        def both(key):
            base = whole(key)
            return {BASE: base, ADAPTERS: init_adapters(base, cfg, subkey(key, ADAPTERS))}

        return both

    def split(params):
        return params[BASE], scaled(params[ADAPTERS], cfg)

    return Weights(init, split, (ADAPTERS,))


def weights_of(cfg: LoraConfig | None) -> Weights:
    """What the settings ask for; None: all weights."""
    return ALL if cfg is None else adapted(cfg)
