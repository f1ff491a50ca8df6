"""Roles and layouts: against a table kept by hand, and layouts against what gradients do."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

pytest.importorskip("transformers")

import transformers
from torch.distributed.fsdp import fully_shard
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from benchmarks.distributed.scale import pretended
from benchmarks.workloads.roles.architectures import ARCHITECTURES
from benchmarks.workloads.roles.expected_roles import Architecture, collapsed, findings, stale_rows
from benchmarks.workloads.roles.written_modules import MODULES, meta_llama
from slimadam.layers.roles import (
    BIAS,
    NORM,
    UNKNOWN,
    ParameterRole,
    canonical_name,
    recommended_dims,
    role_from_name,
    roles_of,
)

OLDER_NAMES = tuple(int(part) for part in metadata.version("transformers").split(".")[:2]) < (5, 23)
current_names = pytest.mark.skipif(OLDER_NAMES, reason="the table has the parameter names of transformers 5.23")


# -- every parameter of known architectures ---------------------------------------------------------------


def check(architecture: Architecture) -> None:
    found = findings(architecture)
    assert [finding for finding in found if not finding.correct] == []
    assert stale_rows(architecture, found) == set()
    assert all(row.why for row in architecture.roles.values() if row.role == UNKNOWN)


@current_names
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures(name: str) -> None:
    check(ARCHITECTURES[name])


@pytest.mark.parametrize("name", MODULES)
def test_modules_as_people_write_them(name: str) -> None:
    check(MODULES[name])


# Where the module has to be seen: what a name alone says of so many dimensions, which is less.
TOLD_BY_THE_MODULE_ALONE = {
    ("transformer.h.*.crossattention.c_attn.weight", 2): "fused_qkv",
    ("backbone.layers.*.mixer.conv1d.weight", 3): "convolution",
    ("convnext.encoder.stages.*.downsampling_layer.*.weight", 1): UNKNOWN,
}


@current_names
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_alone_say_nearly_as_much(name: str) -> None:
    for finding in findings(ARCHITECTURES[name]):
        ndim = len(finding.shape)
        expected = TOLD_BY_THE_MODULE_ALONE.get((collapsed(finding.name), ndim), finding.found.role)
        assert role_from_name(finding.name, ndim) == expected, finding


# -- names ------------------------------------------------------------------------------------------------

NAMES = {
    # What a table of substrings gets wrong.
    ("layers.0.feed_forward.w1.weight", 2): "mlp_gate",
    ("layers.0.feed_forward.w2.weight", 2): "mlp_down",
    ("layers.0.feed_forward.w3.weight", 2): "mlp_up",
    ("patch_embed.proj.weight", 4): "patch_embedding",
    ("vit.embeddings.patch_embeddings.projection.weight", 4): "patch_embedding",
    ("model.decoder.embed_positions.weight", 2): "position_embedding",
    ("transformer.wpe.weight", 2): "position_embedding",
    ("model.layers.0.mlp.gate.weight", 2): "router",
    ("model.layers.0.block_sparse_moe.gate.weight", 2): "router",
    ("model.layers.0.mlp.gate_proj.weight", 2): "mlp_gate",
    ("model.layers.0.mlp.shared_expert_gate.weight", 2): "router",
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2): "relative_position_bias",
    ("bert.encoder.layer.0.attention.output.dense.weight", 2): "attention_output",
    ("bert.encoder.layer.0.intermediate.dense.weight", 2): "mlp_up",
    ("bert.encoder.layer.0.output.dense.weight", 2): "mlp_down",
    ("cls.predictions.transform.dense.weight", 2): "head_transform",
    ("cls.predictions.decoder.weight", 2): "lm_head",
    ("classifier.out_proj.weight", 2): "classifier",
    ("backbone.layers.0.mixer.in_proj.weight", 2): UNKNOWN,
    ("blocks.0.se.fc1.weight", 4): "squeeze_excite",
    ("compose.weight", 2): UNKNOWN,
    ("value.weight", 2): UNKNOWN,
    ("normal_head.weight", 2): "classifier",
    # Transformers 4 and others.
    ("vit.encoder.layer.0.attention.attention.query.weight", 2): "query",
    ("blocks.0.attn.proj.weight", 2): "attention_output",
    ("encoder.layers.0.self_attention.in_proj_weight", 2): "fused_qkv",
    ("layers.0.attention.wo.weight", 2): "attention_output",
    ("encoder.block.0.layer.1.DenseReluDense.wo.weight", 2): "mlp_down",
    ("_orig_mod.module.transformer.h.0.attn.c_attn.weight", 2): "fused_qkv",
    ("base_model.model.layers.0.self_attn.q_proj.base_layer.weight", 2): "query",
    ("base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight", 2): "lora_a",
    ("base_model.model.layers.0.self_attn.q_proj.lora_B.default.weight", 2): "lora_b",
    ("base_model.model.embed_tokens.lora_embedding_A.default", 2): "lora_embedding_a",
    ("conv.parametrizations.weight.original0", 3): NORM,
    ("model.layers.0.mlp.experts.down_proj", 3): "mlp_down",
    ("stages.0.0.conv_dw.weight", 4): "depthwise_convolution",
    ("anything.weight", 4): "convolution",
    ("rnn.weight_ih_l0_reverse", 2): "recurrent_input",
    # Vectors.
    ("h.0.ln_1.weight", 1): NORM,
    ("layer1.0.bn2.weight", 1): NORM,
    ("bert.embeddings.LayerNorm.gamma", 1): NORM,
    ("blocks.0.ls1.gamma", 1): "layer_scale",
    ("h.0.attn.c_attn.bias", 1): BIAS,
    ("model.layers.0.mlp.experts.gate_up_proj_bias", 2): BIAS,
    ("wte.weight", 1): UNKNOWN,
}


@pytest.mark.parametrize(("name", "ndim"), NAMES)
def test_role_from_name(name: str, ndim: int) -> None:
    assert role_from_name(name, ndim) == NAMES[name, ndim]


# -- layouts, by what gradients do ------------------------------------------------------------------------


def conv1d() -> nn.Module:
    return transformers.pytorch_utils.Conv1D(6, 4)


def experts(module: str, name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(hidden_size=4, intermediate_size=6, num_local_experts=2)
    built = getattr(getattr(transformers.models, module), f"modeling_{module}").__dict__[f"{name}Experts"](config)
    return initialised(built)


def initialised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def llama4_experts() -> nn.Module:
    config = transformers.Llama4TextConfig(hidden_size=4, intermediate_size=6, num_local_experts=2)
    return initialised(transformers.models.llama4.modeling_llama4.Llama4TextMoe(config))


def routed(module: nn.Module, x: Tensor) -> Tensor:
    tokens = x.shape[0]
    chosen = torch.arange(tokens).remainder(2).unsqueeze(1)
    return module(x, chosen, torch.ones(tokens, 1))


def called(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def first_output(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.unsqueeze(0))[0].reshape(x.shape[0], -1)


Forward = Callable[[nn.Module, Tensor], Tensor]
ROWS, IMAGE = (8, 4), (2, 4, 5, 5)

# Build, forward, shape of the input, matrices that see the input, matrices that make the output.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Forward, tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 6), called, ROWS, ("weight",), ("weight",)),
    "Conv1D of transformers": (conv1d, called, ROWS, ("weight",), ("weight",)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), called, IMAGE, ("weight",), ("weight",)),
    "depthwise Conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=4), called, IMAGE, (), ("weight",)),
    "grouped Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), called, IMAGE, (), ("weight",)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), called, IMAGE, ("weight",), ("weight",)),
    "depthwise ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), called, IMAGE, (), ("weight",)),
    "Mixtral's experts": (
        lambda: experts("mixtral", "Mixtral"), routed, ROWS, ("gate_up_proj",), ("down_proj",)
    ),
    "gpt-oss's experts": (
        lambda: experts("gpt_oss", "GptOss"), routed, ROWS, ("gate_up_proj",), ("down_proj",)
    ),
    "Llama 4's experts": (
        llama4_experts, first_output, ROWS, ("experts.gate_up_proj",), ("experts.down_proj",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_fan_in_is_what_inputs_are_multiplied_with(layer: str) -> None:
    build, forward, shape, see_input, _ = LAYERS[layer]
    module = build()
    x = torch.randn(shape)
    x[:, 1] = 0
    forward(module, x).square().sum().backward()
    for name in see_input:
        role, grad = roles_of(module)[name], module.get_parameter(name).grad
        assert grad is not None
        assert not grad.select(role.fan_in[0], 1).any()
        assert grad.select(role.fan_in[0], 0).any()


@pytest.mark.parametrize("layer", LAYERS)
def test_fan_out_is_what_outputs_are_indexed_with(layer: str) -> None:
    build, forward, shape, _, make_output = LAYERS[layer]
    module = build()
    y = forward(module, torch.randn(shape))
    (y[:, :1].square().sum() + y[:, 2:].square().sum()).backward()
    for name in make_output:
        role, grad = roles_of(module)[name], module.get_parameter(name).grad
        assert grad is not None
        assert not grad.select(role.fan_out[0], 1).any()
        assert grad.select(role.fan_out[0], 0).any()


# -- wrappers and what must be left alone -----------------------------------------------------------------


def test_wrapped_models_have_the_roles_of_the_bare_one() -> None:
    bare = roles_of(meta_llama())
    wrapped = meta_llama()
    wrapped.layers[0] = checkpoint_wrapper(wrapped.layers[0])  # type: ignore[operator, index]
    compiled = torch.compile(nn.DataParallel(wrapped), backend="eager")
    found = roles_of(compiled)
    assert all("_checkpoint_wrapped_module" in name for name in found if "layers" in name)
    assert {canonical_name(name): role for name, role in found.items()} == bare


def test_fully_sharded_layers_have_the_roles_of_the_bare_ones() -> None:
    block = GPT2Block(transformers.GPT2Config(n_embd=8, n_head=2))
    bare = roles_of(block)
    with pretended(2):
        for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.ln_1, block.attn, block):
            fully_shard(module)
        assert roles_of(block) == bare
    assert bare["attn.c_attn.weight"].fan_in == (0,)


def test_a_model_that_is_one_layer() -> None:
    assert roles_of(nn.Linear(2, 3)) == {
        "weight": ParameterRole(UNKNOWN, (1,), (0,)),
        "bias": ParameterRole(BIAS),
    }


def test_asking_computes_nothing() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Embedding(5, 4))
    parametrizations.weight_norm(model[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = roles_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert found["1.parametrizations.weight.original1"] == ParameterRole("token_embedding", (1,), (0,))


# -- the paper's rules, as weights are stored -------------------------------------------------------------

LINEAR, TRANSPOSED = ((1,), (0,)), ((0,), (1,))
STACK, TRANSPOSED_STACK, FILTERS = ((2,), (1,)), ((1,), (2,)), ((1, 2, 3), (0,))

RECOMMENDED = [
    *[(role, LINEAR, (1,)) for role in ("token_embedding", "position_embedding", "lm_head", "query", "key")],
    *[(role, LINEAR, (0,)) for role in ("value", "attention_output", "mlp_up", "mlp_gate", "mlp_down")],
    ("query", TRANSPOSED, (0,)),
    ("mlp_down", TRANSPOSED, (1,)),
    ("mlp_down", STACK, (1,)),
    ("mlp_down", TRANSPOSED_STACK, (2,)),
    ("patch_embedding", FILTERS, (1, 2, 3)),
    ("convolution", FILTERS, ()),
    ("router", LINEAR, ()),
    ("lora_a", LINEAR, ()),
    (UNKNOWN, LINEAR, ()),
]


@pytest.mark.parametrize(("role", "fans", "dims"), RECOMMENDED)
def test_recommended_dims(role: str, fans: tuple[tuple[int, ...], tuple[int, ...]], dims: tuple[int, ...]) -> None:
    assert recommended_dims(ParameterRole(role, *fans)) == dims
