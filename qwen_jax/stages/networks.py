"""The four models of PPO in one tree of parameters. Qwen report sec. 3.2.2.

With all weights trained the tree holds each model whole:

    policy, reference: language models    value, reward: scalar models

With adapters it holds two models whole and serves four: the reference policy is the base under the
policy's adapters, and the value model is the reward model's transformer under adapters of its own:

    policy: base, adapters    reward: scalar model    value: adapters, score

Only the policy and the value model have gradients and moments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from qwen_jax.config import LoraConfig, ModelConfig
from qwen_jax.model import scalar
from qwen_jax.model.adapters import ADAPTERS, BASE, init_adapters, merge, scaled
from qwen_jax.stages import pretrain
from qwen_jax.trainer.state import subkey

POLICY, REFERENCE, VALUE, REWARD = "policy", "reference", "value", "reward"


class Networks(NamedTuple):
    """Where the four models lie.

    init: key -> the tree. trained: see `Stage`. policy, reference, value: the tree -> (parameters,
    adapters or None). writer: the tree -> the policy as an ordinary model, for decoding.
    """

    init: Callable
    trained: tuple[str, ...]
    policy: Callable[[Any], tuple[Any, Any]]
    reference: Callable[[Any], tuple[Any, Any]]
    value: Callable[[Any], tuple[Any, Any]]
    writer: Callable[[Any], Any]


def networks(cfg: ModelConfig, lora: LoraConfig | None) -> Networks:
    """The layout of a run."""
    return _whole(cfg) if lora is None else _adapted(cfg, lora)


def value_from_reward(reward: Any) -> dict[str, Any]:
    """The value model's start: the reward model, its calibration folded into the scalar head."""
    gain, bias = (reward[scalar.CALIBRATION][name] for name in ("gain", "bias"))
    score = reward[scalar.SCORE]
    return {
        scalar.MODEL: reward[scalar.MODEL],
        scalar.SCORE: {"kernel": score["kernel"] * gain, "bias": score["bias"] * gain + bias},
    }


def _whole(cfg: ModelConfig) -> Networks:
    language_model, scalar_model = pretrain.init_fn(cfg), scalar.init_fn(cfg)

    def init(key):
        value = scalar_model(subkey(key, VALUE))
        return {
            POLICY: language_model(subkey(key, POLICY)),
            REFERENCE: language_model(subkey(key, REFERENCE)),
            VALUE: {name: value[name] for name in scalar.TRAINED},
            REWARD: scalar_model(subkey(key, REWARD)),
        }

    return Networks(
        init=init,
        trained=(POLICY, VALUE),
        policy=lambda params: (params[POLICY], None),
        reference=lambda params: (params[REFERENCE], None),
        value=lambda params: (params[VALUE], None),
        writer=lambda params: params[POLICY],
    )


def _adapted(cfg: ModelConfig, lora: LoraConfig) -> Networks:
    language_model, scalar_model = pretrain.init_fn(cfg), scalar.init_fn(cfg)

    def init(key):
        base, reward = language_model(subkey(key, POLICY)), scalar_model(subkey(key, REWARD))
        body = reward[scalar.MODEL]
        return {
            POLICY: {
                BASE: base,
                ADAPTERS: init_adapters(base, lora, subkey(key, "policy_adapters")),
            },
            REWARD: reward,
            VALUE: {
                ADAPTERS: init_adapters(body, lora, subkey(key, "value_adapters")),
                scalar.SCORE: reward[scalar.SCORE],
            },
        }

    def value(params):
        whole = {
            scalar.MODEL: params[REWARD][scalar.MODEL],
            scalar.SCORE: params[VALUE][scalar.SCORE],
        }
        return whole, scaled(params[VALUE][ADAPTERS], lora)

    return Networks(
        init=init,
        trained=(f"{POLICY}.{ADAPTERS}", VALUE),
        policy=lambda params: (params[POLICY][BASE], scaled(params[POLICY][ADAPTERS], lora)),
        reference=lambda params: (params[POLICY][BASE], None),
        value=value,
        writer=lambda params: merge(params[POLICY][BASE], params[POLICY][ADAPTERS], lora),
    )
