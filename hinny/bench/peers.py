"""The same model in another library: a Hugging Face transformers twin, with our weights, to check and to race against.

`transformers` is the extra `oracle`; it is imported here alone, and only when a twin is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from hinny import ops, pattern
from hinny.bench.kernel_peers import find_peer
from hinny.config import ModelConfig
from hinny.errors import BackendError, ConfigError
from hinny.model import Model


def transformers_twin(model: Model) -> nn.Module:
    """A transformers model that computes what `model` computes, its weights copied.

    Raises BackendError if transformers is not installed, ConfigError if none of its classes can express the model.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise BackendError("transformers is not installed; it is the extra 'oracle': "
                           "in the checkout, .venv/bin/pip install -e '.[oracle]'.") from None
    config = model.config
    kinds = set(pattern.parse(config.pattern))
    if config.attention and (config.attention.rope_scaling or config.attention.score_scale):
        raise ConfigError("model.attention has rope_scaling or score_scale, which the twin of --against transformers "
                          "is built without; remove it: speed does not depend on it.")
    if kinds == {"M"}:
        kind, weights = "Mamba2", _mamba(model)
        options = _mamba2_options(config)
    elif kinds == {"1"}:
        kind, weights = "Mamba", _mamba(model)
        options = _mamba1_options(config)
    elif config.norm == "layernorm1p" and config.pattern == "*-" * (config.depth // 2):
        kind, weights = "Nemotron", _nemotron(model)
        options = _nemotron_options(config)
    elif config.norm == "rmsnorm" and "1" not in kinds and not (config.attention and config.attention.rope_dim):
        kind, weights = "NemotronH", _nemotron_h(model)
        options = _nemotron_h_options(config)
    else:
        raise ConfigError(f"no transformers class has a model with pattern {config.pattern}, norm {config.norm} and "
                          "these positions; --against transformers cannot be used with this recipe.")
    twin = getattr(library, f"{kind}ForCausalLM")(getattr(library, f"{kind}Config")(
        vocab_size=config.vocab_size, hidden_size=config.d_model, tie_word_embeddings=config.tie_embeddings,
        use_cache=False, **options))
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (config.tie_embeddings and name == "lm_head.weight")]
    assert not missing, missing
    assert not unexpected, unexpected
    if config.tie_embeddings:
        # not every class ties them by its configuration
        twin.get_output_embeddings().weight = twin.get_input_embeddings().weight
    return twin


def on_kernels(twin: nn.Module, device: torch.device) -> tuple[nn.Module, str]:
    """`twin` on a GPU, in training mode, with the fastest kernels that it takes, and what they are.

    For layers of Mamba-2 these are mamba_ssm's Triton kernels for the scan and the gated norm, if they are there, and
    our convolution in place of causal_conv1d, which must be compiled where it runs. transformers itself looks for both
    packages when it is imported, and takes neither if their compiled parts are missing.
    """
    twin = twin.to(device).train()
    mixers = [module for module in twin.modules() if type(module).__name__.endswith("Mamba2Mixer")]
    if not mixers:
        return twin, ""
    peer = find_peer("mamba_ssm")
    module = importlib.import_module(type(mixers[0]).__module__)

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **_: Any) -> Tensor:
        return ops.causal_conv(x.transpose(1, 2), weight, bias, activation=activation)[0].transpose(1, 2)

    def gated(self: Any, x: Tensor, gate: Tensor) -> Tensor:
        return peer.gated_rms_norm(x, gate, self.weight, self.variance_epsilon, self.group_size)

    module.causal_conv1d_fn = convolution  # type: ignore[attr-defined]
    module.mamba2_chunk_scan = peer.chunk_scan  # type: ignore[attr-defined]
    for mixer in mixers:
        norm: Any = mixer.norm
        norm.forward = gated.__get__(norm)
    return twin, f" with {peer.name}'s scan and norm, hinny's convolution"


def _refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise ConfigError(f"transformers' class for this pattern has no {what}; --against transformers cannot be "
                          "used with this recipe.")


def _mamba2_options(config: ModelConfig) -> dict[str, Any]:
    c = config.mamba2
    assert c is not None
    d_inner = c.d_inner(config.d_model)
    _refuse(c.n_groups > 1, "grouped gated norm (n_groups > 1)")
    _refuse(d_inner % config.d_model > 0, f"inner width of {d_inner}, no multiple of d_model ({config.d_model})")
    _refuse(config.norm != "rmsnorm", f"norm {config.norm!r}")
    return dict(num_hidden_layers=config.depth, state_size=c.d_state, head_dim=c.head_dim, n_groups=c.n_groups,
                num_heads=d_inner // c.head_dim, expand=d_inner // config.d_model, conv_kernel=c.d_conv,
                chunk_size=c.chunk_len, layer_norm_epsilon=config.norm_eps)


def _mamba1_options(config: ModelConfig) -> dict[str, Any]:
    c = config.mamba1
    assert c is not None
    _refuse(config.norm != "rmsnorm", f"norm {config.norm!r}")
    return dict(num_hidden_layers=config.depth, state_size=c.d_state, expand=c.expand, conv_kernel=c.d_conv,
                time_step_rank=c.dt_rank, layer_norm_epsilon=config.norm_eps)


def _nemotron_options(config: ModelConfig) -> dict[str, Any]:
    a, m = config.attention, config.mlp
    assert a is not None
    assert m is not None
    _refuse(a.positions == "none", "attention without positions")
    _refuse(m.activation == "swiglu", "swiglu")
    return dict(num_hidden_layers=config.depth // 2, intermediate_size=m.d_ff, hidden_act=m.activation,
                num_attention_heads=a.n_heads, num_key_value_heads=a.n_kv_heads, head_dim=a.head_dim,
                norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": a.rope_base,
                                 "partial_rotary_factor": a.rope_fraction})


def _nemotron_h_options(config: ModelConfig) -> dict[str, Any]:
    names = {"M": "mamba", "*": "attention", "-": "mlp"}
    options: dict[str, Any] = dict(layers_block_type=[names[s] for s in pattern.parse(config.pattern)],
                                   layer_norm_epsilon=config.norm_eps)
    if c := config.mamba2:
        options |= dict(ssm_state_size=c.d_state, mamba_head_dim=c.head_dim, n_groups=c.n_groups,
                        # transformers clamps time steps at time_step_min (and takes its log); the paper has no clamp
                        time_step_min=1e-30, conv_kernel=c.d_conv,
                        mamba_num_heads=c.d_inner(config.d_model) // c.head_dim,
                        chunk_size=c.chunk_len)
    if a := config.attention:
        options |= dict(num_attention_heads=a.n_heads, num_key_value_heads=a.n_kv_heads, head_dim=a.head_dim)
    if m := config.mlp:
        _refuse(m.activation == "swiglu", "swiglu")
        options |= dict(intermediate_size=m.d_ff, mlp_hidden_act=m.activation)
    return options


def _mixer(state: dict[str, Tensor], symbol: str) -> dict[str, Tensor]:
    """A Mamba layer's tensors under transformers' names: packed projection and convolution."""
    def conv(name: str) -> Tensor:
        return state[f"{name}.weight"][:, None]

    if symbol == "1":
        projections = {
            "in_proj.weight": torch.cat([state["in_proj.x.weight"], state["in_proj.z.weight"]]),
            "conv1d.weight": conv("conv"), "conv1d.bias": state["conv.bias"],
            "x_proj.weight": torch.cat([state[f"x_proj.{part}.weight"] for part in ("dt", "B", "C")]),
            "dt_proj.weight": state["dt_proj.weight"], "dt_proj.bias": state["dt_bias"]}
        kept = ["A_log", "D", "out_proj.weight"]
    else:
        projections = {
            "in_proj.weight": torch.cat([state[f"in_proj.{part}.weight"] for part in ("z", "x", "B", "C", "dt")]),
            "conv1d.weight": torch.cat([conv(f"conv.{part}") for part in ("x", "B", "C")]),
            "conv1d.bias": torch.cat([state[f"conv.{part}.bias"] for part in ("x", "B", "C")])}
        kept = ["A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"]
    return projections | {name: state[name] for name in kept}


def _layers(model: Model) -> list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Symbol, norm and tensors of each layer."""
    return [(symbol, block.norm.state_dict(), block.layer.state_dict())
            for symbol, block in zip(pattern.parse(model.config.pattern), model.blocks, strict=True)]


def _mamba(model: Model) -> dict[str, Tensor]:
    weights = {"backbone.embeddings.weight": model.embedding.weight, "backbone.norm_f.weight": model.norm.weight,
               "lm_head.weight": model.output_weight}
    for i, (symbol, norm, layer) in enumerate(_layers(model)):
        weights[f"backbone.layers.{i}.norm.weight"] = norm["weight"]
        weights |= {f"backbone.layers.{i}.mixer.{name}": t for name, t in _mixer(layer, symbol).items()}
    return weights


def _nemotron_h(model: Model) -> dict[str, Tensor]:
    weights = {"model.embeddings.weight": model.embedding.weight, "model.norm_f.weight": model.norm.weight,
               "lm_head.weight": model.output_weight}
    for i, (symbol, norm, layer) in enumerate(_layers(model)):
        weights[f"model.layers.{i}.norm.weight"] = norm["weight"]
        named = {"M": lambda t: _mixer(t, "M"), "*": _attention, "-": _mlp}[symbol](layer)
        weights |= {f"model.layers.{i}.mixer.{name}": t for name, t in named.items()}
    return weights


def _nemotron(model: Model) -> dict[str, Tensor]:
    weights = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": model.output_weight}
    weights |= {f"model.norm.{name}": t for name, t in model.norm.state_dict().items()}
    for i, (symbol, norm, layer) in enumerate(_layers(model)):
        norm_name, part, named = (("input_layernorm", "self_attn", _attention(layer)) if symbol == "*"
                                  else ("post_attention_layernorm", "mlp", _mlp(layer)))
        weights |= {f"model.layers.{i // 2}.{norm_name}.{name}": t for name, t in norm.items()}
        weights |= {f"model.layers.{i // 2}.{part}.{name}": t for name, t in named.items()}
    return weights


def _attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_proj.weight": state[f"{name}.weight"] for name in "qkvo"}


def _mlp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_proj.weight": state[f"{name}.weight"] for name in ("up", "down")}
