"""Published architectures at toy size, from their transformers configurations, and the roles of their parameters.

Names are those of transformers 5.23; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from benchmarks.workloads.roles.expected_roles import Architecture, Expected, rows

_SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
_ENCODER = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 20}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4}
_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def _build(model: str, config: str, **options: Any) -> nn.Module:
    built: nn.Module = getattr(hf, model)(getattr(hf, config)(**options))
    return built


def _architecture(model: str, config: str, options: dict[str, Any], *tables: dict[str, Expected]) -> Architecture:
    roles = {name: expected for table in tables for name, expected in table.items()}
    return Architecture(lambda: _build(model, config, **options), roles)


def _attention(template: str, output: str) -> dict[str, Expected]:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", output: "attention_output"}
    return rows(template, **names)


def _gated(template: str) -> dict[str, Expected]:
    return rows(template, gate_proj="mlp_gate", up_proj="mlp_up", down_proj="mlp_down")


def _stacked(template: str, layout: str) -> dict[str, Expected]:
    return rows(template, layout, gate_up_proj="fused_gate_up", down_proj="mlp_down")


_TOKENS = {"model.embed_tokens.weight": Expected("token_embedding")}
_HEAD = {"lm_head.weight": Expected("lm_head")}
_LLAMA_ATTENTION = _attention("model.layers.*.self_attn.{}.weight", "o_proj")
_LLAMA_MLP = _gated("model.layers.*.mlp.{}.weight")
_LLAMA = {**_TOKENS, **_LLAMA_ATTENTION, **_LLAMA_MLP, **_HEAD}
_MIXTURE = {**_TOKENS, **_LLAMA_ATTENTION, **_HEAD, "model.layers.*.mlp.gate.weight": Expected("router")}
_STACKED_EXPERTS = _stacked("model.layers.*.mlp.experts.{}", "eoi")

_GPT2_EMBEDDINGS = rows("transformer.{}.weight", wte="token_embedding", wpe="position_embedding")
_GPT2_BLOCK = {
    **rows("transformer.h.*.attn.{}.weight", "io", c_attn="fused_qkv", c_proj="attention_output"),
    **rows("transformer.h.*.mlp.{}.weight", "io", c_fc="mlp_up", c_proj="mlp_down"),
}
_MEGATRON_MLP = {"dense_h_to_4h": "mlp_up", "dense_4h_to_h": "mlp_down"}


def _bert_layers(prefix: str) -> dict[str, Expected]:
    embeddings = f"{prefix}.embeddings.{{}}.weight"
    layer = f"{prefix}.encoder.layer.*.{{}}.weight"
    return {
        **rows(embeddings, word_embeddings="token_embedding", position_embeddings="position_embedding"),
        **rows(embeddings, token_type_embeddings="segment_embedding"),
        **rows(f"{prefix}.encoder.layer.*.attention.self.{{}}.weight", query="query", key="key", value="value"),
        layer.format("attention.output.dense"): Expected("attention_output"),
        layer.format("intermediate.dense"): Expected("mlp_up"),
        layer.format("output.dense"): Expected("mlp_down"),
    }


def _t5(**feed_forward: str) -> dict[str, Expected]:
    attention = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
    bias = Expected("relative_position_bias")
    table = {"shared.weight": Expected("token_embedding")}
    for stack in ("encoder", "decoder"):
        layer = f"{stack}.block.*.layer.*"
        table |= rows(f"{layer}.SelfAttention.{{}}.weight", **attention)
        table |= rows(f"{layer}.DenseReluDense.{{}}.weight", **feed_forward)
        table[f"{layer}.SelfAttention.relative_attention_bias.weight"] = bias
    return table | rows("decoder.block.*.layer.*.EncDecAttention.{}.weight", **attention)


def _vision_layers(prefix: str) -> dict[str, Expected]:
    return {
        f"{prefix}.embeddings.cls_token": Expected("learned_token", "ooi"),
        f"{prefix}.embeddings.position_embeddings": Expected("position_embedding", "ooi"),
        f"{prefix}.embeddings.patch_embeddings.projection.weight": Expected("patch_embedding", "oiii"),
        **_attention(f"{prefix}.layers.*.attention.{{}}.weight", "o_proj"),
        **rows(f"{prefix}.layers.*.mlp.{{}}.weight", fc1="mlp_up", fc2="mlp_down"),
    }


def _clip_layers(prefix: str) -> dict[str, Expected]:
    return {
        **_attention(f"{prefix}.encoder.layers.*.self_attn.{{}}.weight", "out_proj"),
        **rows(f"{prefix}.encoder.layers.*.mlp.{{}}.weight", fc1="mlp_up", fc2="mlp_down"),
        f"{prefix}.embeddings.position_embedding.weight": Expected("position_embedding"),
    }


def _bart_layers(stack: str) -> dict[str, Expected]:
    layer = f"model.{stack}.layers.*"
    return {
        f"model.{stack}.embed_positions.weight": Expected("position_embedding"),
        **_attention(f"{layer}.self_attn.{{}}.weight", "out_proj"),
        **rows(f"{layer}.{{}}.weight", fc1="mlp_up", fc2="mlp_down"),
    }


_STATE_SPACE = "a state-space layer: neither attention nor MLP, and the paper measured none"

_LANGUAGE = {
    "GPT-2": _architecture(
        "GPT2LMHeadModel", "GPT2Config", {**_GPT2, "n_positions": 20}, _GPT2_EMBEDDINGS, _GPT2_BLOCK
    ),
    "GPT-2 classifier": _architecture(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {**_GPT2, "n_positions": 20, "num_labels": 3},
        _GPT2_EMBEDDINGS,
        _GPT2_BLOCK,
        {"score.weight": Expected("classifier")},
    ),
    "GPT-2 with cross-attention": _architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_GPT2, "n_positions": 20, "add_cross_attention": True},
        _GPT2_EMBEDDINGS,
        _GPT2_BLOCK,
        rows("transformer.h.*.crossattention.{}.weight", "io",
             q_attn="query", c_attn="fused_kv", c_proj="attention_output"),
    ),
    "Llama": _architecture("LlamaForCausalLM", "LlamaConfig", _DECODER, _LLAMA),
    "Llama with biases, tied": _architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {name: expected for name, expected in _LLAMA.items() if name not in _HEAD},
    ),
    "Mistral": _architecture("MistralForCausalLM", "MistralConfig", _DECODER, _LLAMA),
    "Qwen2": _architecture("Qwen2ForCausalLM", "Qwen2Config", _DECODER, _LLAMA),
    "Qwen3": _architecture("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 4}, _LLAMA),
    "Gemma": _architecture(
        "GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 4}, _TOKENS, _LLAMA_ATTENTION, _LLAMA_MLP
    ),
    "Phi-3": _architecture(
        "Phi3ForCausalLM",
        "Phi3Config",
        {**_DECODER, "pad_token_id": 0},
        _TOKENS,
        _HEAD,
        rows("model.layers.*.self_attn.{}.weight", qkv_proj="fused_qkv", o_proj="attention_output"),
        rows("model.layers.*.mlp.{}.weight", gate_up_proj="fused_gate_up", down_proj="mlp_down"),
    ),
    "GPT-NeoX": _architecture(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _ENCODER,
        {"gpt_neox.embed_in.weight": Expected("token_embedding")},
        _HEAD,
        rows("gpt_neox.layers.*.attention.{}.weight", query_key_value="fused_qkv", dense="attention_output"),
        rows("gpt_neox.layers.*.mlp.{}.weight", **_MEGATRON_MLP),
    ),
    "GPT-J": _architecture(
        "GPTJForCausalLM",
        "GPTJConfig",
        {**_GPT2, "n_positions": 20, "rotary_dim": 4},
        {"transformer.wte.weight": Expected("token_embedding")},
        _HEAD,
        _attention("transformer.h.*.attn.{}.weight", "out_proj"),
        rows("transformer.h.*.mlp.{}.weight", fc_in="mlp_up", fc_out="mlp_down"),
    ),
    "OPT": _architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {**_SIZES, "ffn_dim": 24, "max_position_embeddings": 20, "word_embed_proj_dim": 8},
        rows("model.decoder.{}.weight", embed_tokens="token_embedding", embed_positions="position_embedding"),
        rows("model.decoder.{}.weight", project_in="projection", project_out="projection"),
        _attention("model.decoder.layers.*.self_attn.{}.weight", "out_proj"),
        rows("model.decoder.layers.*.{}.weight", fc1="mlp_up", fc2="mlp_down"),
    ),
    **{
        name: _architecture(
            f"{name.title()}ForCausalLM",
            f"{name.title()}Config",
            _SIZES,
            {"transformer.word_embeddings.weight": Expected("token_embedding")},
            rows("transformer.h.*.self_attention.{}.weight", query_key_value="fused_qkv", dense="attention_output"),
            rows("transformer.h.*.mlp.{}.weight", **_MEGATRON_MLP),
        )
        for name in ("Falcon", "Bloom")
    },
    "BERT": _architecture(
        "BertForPreTraining",
        "BertConfig",
        _ENCODER,
        _bert_layers("bert"),
        {
            "bert.pooler.dense.weight": Expected("pooler"),
            "cls.predictions.transform.dense.weight": Expected("head_transform"),
            "cls.seq_relationship.weight": Expected("classifier"),
        },
    ),
    "BERT, untied": _architecture(
        "BertForMaskedLM",
        "BertConfig",
        {**_ENCODER, "tie_word_embeddings": False},
        _bert_layers("bert"),
        {
            "cls.predictions.transform.dense.weight": Expected("head_transform"),
            "cls.predictions.decoder.weight": Expected("lm_head"),
        },
    ),
    "RoBERTa classifier": _architecture(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_ENCODER, "num_labels": 3},
        _bert_layers("roberta"),
        rows("classifier.{}.weight", dense="head_transform", out_proj="classifier"),
    ),
    "DistilBERT": _architecture(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 20},
        rows("distilbert.embeddings.{}.weight",
             word_embeddings="token_embedding", position_embeddings="position_embedding"),
        rows("distilbert.transformer.layer.*.attention.{}.weight",
             q_lin="query", k_lin="key", v_lin="value", out_lin="attention_output"),
        rows("distilbert.transformer.layer.*.ffn.{}.weight", lin1="mlp_up", lin2="mlp_down"),
        {"vocab_transform.weight": Expected("head_transform")},
    ),
    "T5": _architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
        _t5(wi="mlp_up", wo="mlp_down"),
    ),
    "T5, gated": _architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        _t5(wi_0="mlp_gate", wi_1="mlp_up", wo="mlp_down"),
    ),
    "BART classifier": _architecture(
        "BartForSequenceClassification",
        "BartConfig",
        {
            "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_labels": 3,
        },
        {"model.shared.weight": Expected("token_embedding")},
        _bart_layers("encoder"),
        _bart_layers("decoder"),
        _attention("model.decoder.layers.*.encoder_attn.{}.weight", "out_proj"),
        rows("classification_head.{}.weight", dense="head_transform", out_proj="classifier"),
    ),
    "Mamba": _architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        {
            "backbone.embeddings.weight": Expected("token_embedding"),
            "backbone.layers.*.mixer.conv1d.weight": Expected("depthwise_convolution", "oii"),
            "backbone.layers.*.mixer.A_log": Expected("unknown", "", "decay rates, multiplied elementwise"),
            "backbone.layers.*.mixer.D": Expected("unknown", "", "a gain per channel of the state space"),
            **{
                f"backbone.layers.*.mixer.{name}.weight": Expected("unknown", "oi", _STATE_SPACE)
                for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
            },
        },
    ),
}  # fmt: skip

_MIXTURES = {
    "Mixtral": _architecture(
        "MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}, _MIXTURE, _STACKED_EXPERTS
    ),
    "Qwen2-MoE": _architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_DECODER, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 20},
        _MIXTURE,
        _STACKED_EXPERTS,
        _gated("model.layers.*.mlp.shared_expert.{}.weight"),
        {"model.layers.*.mlp.shared_expert_gate.weight": Expected("router")},
    ),
    "Qwen3-MoE, one layer dense": _architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_DECODER, **_EXPERTS, "num_experts": 4, "head_dim": 4, "mlp_only_layers": [1]},
        _MIXTURE,
        _STACKED_EXPERTS,
        _LLAMA_MLP,
    ),
    "DeepSeek-V3": _architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_ENCODER,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
        _TOKENS,
        _HEAD,
        rows(
            "model.layers.*.self_attn.{}.weight", q_a_proj="latent_query", q_b_proj="query", o_proj="attention_output"
        ),
        rows("model.layers.*.self_attn.{}.weight", kv_a_proj_with_mqa="latent_kv", kv_b_proj="fused_kv"),
        _LLAMA_MLP,
        {"model.layers.*.mlp.gate.weight": Expected("router")},
        _STACKED_EXPERTS,
        _gated("model.layers.*.mlp.shared_experts.{}.weight"),
    ),
    "gpt-oss": _architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_DECODER, "head_dim": 4, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
        _TOKENS,
        _HEAD,
        _LLAMA_ATTENTION,
        _stacked("model.layers.*.mlp.experts.{}", "eio"),
        rows("model.layers.*.mlp.experts.{}", "", gate_up_proj_bias="bias", down_proj_bias="bias"),
        {
            "model.layers.*.mlp.router.weight": Expected("router"),
            "model.layers.*.self_attn.sinks": Expected("unknown", "", "one logit per head"),
        },
    ),
    "Llama 4": _architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_DECODER, "head_dim": 4, "num_local_experts": 4, "interleave_moe_layer_step": 1},
        _TOKENS,
        _HEAD,
        _LLAMA_ATTENTION,
        {"model.layers.*.feed_forward.router.weight": Expected("router")},
        _stacked("model.layers.*.feed_forward.experts.{}", "eio"),
        _gated("model.layers.*.feed_forward.shared_expert.{}.weight"),
    ),
    "JetMoE": _architecture(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "kv_channels": 4,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        _TOKENS,
        rows("model.layers.*.mlp.{}.weight", "eoi", input_linear="fused_gate_up", output_linear="mlp_down"),
        rows("model.layers.*.{}.router.layer.weight", **{"mlp": "router", "self_attention.experts": "router"}),
        {"model.layers.*.self_attention.kv_proj.weight": Expected("fused_kv")},
        {
            f"model.layers.*.self_attention.experts.{name}_linear.weight": Expected(
                "unknown", "eoi", "experts inside attention: no name says query or output"
            )
            for name in ("input", "output")
        },
    ),
}

_VISION = {
    "ViT": _architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {**_IMAGE, "num_labels": 5},
        _vision_layers("vit"),
        {"classifier.weight": Expected("classifier")},
    ),
    "DeiT": _architecture(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {**_IMAGE, "num_labels": 5},
        _vision_layers("deit"),
        {"deit.embeddings.distillation_token": Expected("learned_token", "ooi")},
        rows("{}.weight", cls_classifier="classifier", distillation_classifier="classifier"),
    ),
    "CLIP": _architecture(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _ENCODER, "vision_config": _IMAGE, "projection_dim": 8},
        _clip_layers("text_model"),
        _clip_layers("vision_model"),
        {
            "text_model.embeddings.token_embedding.weight": Expected("token_embedding"),
            "vision_model.embeddings.class_embedding": Expected("learned_token", "i"),
            "vision_model.embeddings.patch_embedding.weight": Expected("patch_embedding", "oiii"),
            "logit_scale": Expected("unknown", "", "a scalar"),
        },
        rows("{}.weight", text_projection="projection", visual_projection="projection"),
    ),
    "Swin": _architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
            "window_size": 4, "num_labels": 5,
        },
        {
            "swin.embeddings.patch_embeddings.projection.weight": Expected("patch_embedding", "oiii"),
            "swin.encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table": Expected(
                "relative_position_bias"
            ),
            "swin.encoder.layers.*.downsample.reduction.weight": Expected("projection"),
            "classifier.weight": Expected("classifier"),
        },
        _attention("swin.encoder.layers.*.blocks.*.attention.{}.weight", "o_proj"),
        rows("swin.encoder.layers.*.blocks.*.mlp.{}.weight", fc1="mlp_up", fc2="mlp_down"),
    ),
    "ResNet": _architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5},
        {
            "resnet.embedder.embedder.convolution.weight": Expected("convolution", "oiii"),
            "resnet.encoder.stages.*.layers.*.layer.*.convolution.weight": Expected("convolution", "oiii"),
            "resnet.encoder.stages.*.layers.*.shortcut.convolution.weight": Expected("convolution", "oiii"),
            "classifier.*.weight": Expected("classifier"),
        },
    ),
    "ConvNeXt": _architecture(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5},
        {
            "convnext.embeddings.patch_embeddings.weight": Expected("patch_embedding", "oiii"),
            "convnext.encoder.stages.*.layers.*.dwconv.weight": Expected("depthwise_convolution", "oiii"),
            "convnext.encoder.stages.*.layers.*.layer_scale_parameter": Expected("layer_scale", ""),
            "convnext.encoder.stages.*.downsampling_layer.*.weight": Expected("convolution", "oiii"),
            "convnext.encoder.stages.1.downsampling_layer.0.weight": Expected("norm", ""),
            "classifier.weight": Expected("classifier"),
        },
        rows("convnext.encoder.stages.*.layers.*.{}.weight", pwconv1="mlp_up", pwconv2="mlp_down"),
    ),
    "EfficientNet": _architecture(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"num_labels": 5, "width_coefficient": 0.05, "depth_coefficient": 0.1, "hidden_dim": 32},
        {"classifier.weight": Expected("classifier")},
        rows("efficientnet.{}.weight", "oiii",
             **{"embeddings.convolution": "convolution", "encoder.top_conv": "convolution"}),
        rows("efficientnet.encoder.blocks.*.{}.weight", "oiii", **{
            "depthwise_conv.depthwise_conv": "depthwise_convolution",
            "squeeze_excite.reduce": "squeeze_excite",
            "squeeze_excite.expand": "squeeze_excite",
            "projection.project_conv": "convolution",
            "expansion.expand_conv": "convolution",
        }),
    ),
}  # fmt: skip

ARCHITECTURES = {**_LANGUAGE, **_MIXTURES, **_VISION}
"""Architectures by name."""
