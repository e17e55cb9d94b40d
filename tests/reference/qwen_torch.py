"""Independent PyTorch models for parity: `transformers`' Qwen2 and the 2023 code in `modelscope`.

`modelscope` ships the code of the August 2023 release, but importing it drags in more than the
test environment has. Its one model file is therefore loaded by path, with stand-ins for the
packages it imports; nothing that computes is replaced except `einops.rearrange`.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from pathlib import Path

import torch


def qwen2(cfg, state):
    """`Qwen2ForCausalLM` in float32 with these weights."""
    os.environ.setdefault("USE_TF", "0")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return _load(Qwen2ForCausalLM(config).float().eval(), state)


def qwen_2023(cfg, state):
    """The released `QWenModel` with a head beside it, in float32 with these weights."""
    source = modelscope_source()
    config = types.SimpleNamespace(
        vocab_size=cfg.vocab_size,
        padded_vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        n_embd=cfg.d_model,
        n_layer=cfg.num_layers,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        kv_channels=cfg.head_dim,
        ffn_hidden_size=2 * cfg.d_ff,
        layer_norm_epsilon=cfg.norm_eps,
        initializer_range=cfg.init_std,
        rotary_emb_base=cfg.rope_base,
        rotary_pct=1.0,
        max_position_embeddings=64,
        seq_length=64,
        params_dtype=torch.float32,
        pos_emb="rotary",
        no_bias=True,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        use_flash_attn=False,
        bf16=False,
        fp16=False,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        apply_residual_connection_post_layernorm=False,
        output_attentions=False,
        output_hidden_states=False,
        use_cache=False,
        use_return_dict=True,
        name_or_path="",
    )

    class WithHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = _backbone(source).QWenModel(config)
            self.lm_head = torch.nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

        def forward(self, ids):
            hidden = self.transformer(ids).last_hidden_state
            return types.SimpleNamespace(logits=self.lm_head(hidden))

    return _load(WithHead().float().eval(), state)


def modelscope_source() -> Path | None:
    """The released model file inside an installed `modelscope`, which is not imported."""
    spec = importlib.util.find_spec("modelscope")
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0]) / "models/nlp/qwen/backbone.py"
    return path if path.exists() else None


def logits_and_gradients(model, tokens, targets):
    """Logits [B, L, V], and the gradient of the mean cross-entropy by parameter name."""
    scores = model(torch.as_tensor(tokens, dtype=torch.long)).logits
    targets = torch.as_tensor(targets, dtype=torch.long)
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return scores.detach().numpy(), gradients


def _load(model, state):
    missing = model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    return model


class _StandIn(types.ModuleType):
    """A module whose every attribute is an empty class, unless it was set."""

    def __init__(self, name, **attributes):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _PreTrainedModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def post_init(self):
        pass

    def get_head_mask(self, mask, layers):
        return [mask] * layers


class _Model:
    def __init__(self, *args, **kwargs):
        raise AssertionError("skipped by the released code")


class _TorchModel(_Model):
    def __init__(self, *args, **kwargs):
        pass


class _Registry:
    def register_module(self, *args, **kwargs):
        return lambda cls: cls


def _rearrange(x, pattern, **sizes):
    if pattern == "n d -> 1 n 1 d":
        return x[None, :, None, :]
    if pattern == "... (j d) -> ... j d":
        return x.unflatten(-1, (sizes["j"], -1))
    raise AssertionError(pattern)


def _backbone(source: Path):
    """The released model file as a module."""
    qwen = "modelscope.models.nlp.qwen"
    parents = ("modelscope.models", "modelscope.models.nlp", qwen, "modelscope.utils")
    output = type("Output", (types.SimpleNamespace,), {})
    stand_ins = [
        _StandIn("modelscope", Model=_Model, TorchModel=_TorchModel),
        *(_StandIn(name, MODELS=_Registry()) for name in parents),
        _StandIn("modelscope.metainfo", Models=_StandIn("Models")),
        _StandIn("modelscope.utils.constant", Tasks=_StandIn("Tasks")),
        _StandIn("modelscope.utils.logger", get_logger=lambda: None),
        _StandIn(f"{qwen}.configuration"),
        _StandIn(f"{qwen}.qwen_generation_utils"),
        _StandIn("transformers"),
        _StandIn("transformers.generation"),
        _StandIn("transformers.generation.logits_process"),
        _StandIn("transformers.generation.utils"),
        _StandIn("transformers.modeling_outputs", BaseModelOutputWithPast=output),
        _StandIn("transformers.modeling_utils", PreTrainedModel=_PreTrainedModel),
        _StandIn("transformers.trainer_utils"),
        _StandIn("transformers.utils"),
        _StandIn("transformers.utils.model_parallel_utils"),
    ]
    names = [module.__name__ for module in stand_ins] + [f"{qwen}.backbone"]
    # The released functions import einops when they are called, so its stand-in stays.
    if importlib.util.find_spec("einops") is None:
        sys.modules["einops"] = _StandIn("einops", rearrange=_rearrange)
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update({module.__name__: module for module in stand_ins})
    try:
        spec = importlib.util.spec_from_file_location(f"{qwen}.backbone", source)
        module = importlib.util.module_from_spec(spec)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it could not import
            spec.loader.exec_module(module)
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    return module
