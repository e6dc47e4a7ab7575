"""Tiny models of every kind of architecture.

Every weight is a whole number from -7 to 7 over a power of two, which 8-bit integers and FP8 hold exactly: what comes
back from them must be the model itself, whatever names and shapes lay between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 64
STEP = 1 / 32
TOKENS = torch.tensor([[5, 9, 33, 2, 17, 60]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A class of transformers and the keys that make it tiny; `dense` are the modules that no tool quantizes."""

    model: str
    config: str
    keys: Mapping[str, Any]
    dense: str = r"embed|lm_head|wte|wpe|norm|router|\.gate$|shared$|conv|score|classifier"
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: {"input_ids": TOKENS})

    def build(self, seed: int = 0) -> Any:
        """The model in float32 with weights on the grid."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = getattr(transformers, self.config)(**self.keys)
            model = getattr(transformers, self.model)(config).eval()
            for parameter in model.parameters():
                around = 1 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0
                parameter.data = around + torch.randint(-7, 8, parameter.shape) * STEP
        return model


SIDES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIDES, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
LLAMA = {**GROUPED, "model_type": "llama"}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
BERT = {**SIDES, "type_vocab_size": 2}

ARCHITECTURES: dict[str, Architecture] = {
    "llama, tied": Architecture(
        model="LlamaForCausalLM", config="LlamaConfig", keys={**GROUPED, "tie_word_embeddings": True}
    ),
    "llama, its head quantized too": Architecture(
        model="LlamaForCausalLM", config="LlamaConfig", keys={**GROUPED, "tie_word_embeddings": False},
        dense="embed|norm",
    ),
    "biases on q, k and v": Architecture(model="Qwen2ForCausalLM", config="Qwen2Config", keys=GROUPED),
    "norms on q and k": Architecture(
        model="Qwen3ForCausalLM", config="Qwen3Config", keys={**GROUPED, "head_dim": 8}
    ),
    "phi-3": Architecture(model="Phi3ForCausalLM", config="Phi3Config", keys=GROUPED),
    "gpt-neox": Architecture(model="GPTNeoXForCausalLM", config="GPTNeoXConfig", keys=SIDES, dense="embed|norm"),
    "falcon": Architecture(
        model="FalconForCausalLM", config="FalconConfig",
        keys={**GROUPED, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
    ),
    "bloom": Architecture(
        model="BloomForCausalLM", config="BloomConfig",
        keys={"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "gpt-2": Architecture(
        model="GPT2LMHeadModel", config="GPT2Config",
        keys={"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
              "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-j": Architecture(
        model="GPTJForCausalLM", config="GPTJConfig",
        keys={"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 8,
              "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-bigcode": Architecture(
        model="GPTBigCodeForCausalLM", config="GPTBigCodeConfig",
        keys={"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
              "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": Architecture(
        model="OPTForCausalLM", config="OPTConfig",
        keys={"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 32, "word_embed_proj_dim": 16},
        dense="embed|norm|lm_head|project",
    ),
    "gemma-2": Architecture(model="Gemma2ForCausalLM", config="Gemma2Config", keys={**GROUPED, "head_dim": 8}),
    "gemma-3": Architecture(model="Gemma3ForCausalLM", config="Gemma3TextConfig", keys={**GROUPED, "head_dim": 8}),
    "mixtral": Architecture(
        model="MixtralForCausalLM", config="MixtralConfig", keys={**EXPERTS, "num_local_experts": 4}
    ),
    "qwen3-moe": Architecture(
        model="Qwen3MoeForCausalLM", config="Qwen3MoeConfig",
        keys={**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "deepseek-v3": Architecture(
        model="DeepseekV3ForCausalLM", config="DeepseekV3Config",
        keys={**EXPERTS, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2,
              "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
              "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
    "gpt-oss": Architecture(
        model="GptOssForCausalLM", config="GptOssConfig",
        keys={**EXPERTS, "num_local_experts": 4, "head_dim": 8},
    ),
    "llama-4": Architecture(
        model="Llama4ForCausalLM", config="Llama4TextConfig",
        keys={**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 8,
              "interleave_moe_layer_step": 2},
    ),
    "mamba": Architecture(
        model="MambaForCausalLM", config="MambaConfig",
        keys={"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
              "time_step_rank": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "mamba-2": Architecture(
        model="Mamba2ForCausalLM", config="Mamba2Config",
        keys={"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2,
              "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": 0},
    ),
    "bert": Architecture(model="BertForMaskedLM", config="BertConfig", keys=BERT, dense="embed|Norm|cls"),
    "roberta": Architecture(
        model="RobertaForMaskedLM", config="RobertaConfig", keys={**BERT, "max_position_embeddings": 40},
        dense="embed|orm|lm_head",
    ),
    "deberta": Architecture(
        model="DebertaForMaskedLM", config="DebertaConfig",
        keys={**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, dense="embed|Norm|cls|lm_pred",
    ),
    "deberta-v2": Architecture(
        model="DebertaV2ForMaskedLM", config="DebertaV2Config",
        keys={**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        dense="embed|Norm|cls|lm_pred",
    ),
    "modernbert": Architecture(
        model="ModernBertForMaskedLM", config="ModernBertConfig", keys={**SIDES, "cls_token_id": 1, "sep_token_id": 2},
        dense="embed|norm|head|decoder",
    ),
    "t5": Architecture(
        model="T5ForConditionalGeneration", config="T5Config",
        keys={"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
              "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
        dense="shared|norm|lm_head|relative|embed",
        inputs={"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]},
    ),
    "bart": Architecture(
        model="BartForConditionalGeneration", config="BartConfig",
        keys={"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
              "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
              "max_position_embeddings": 32},
        dense="shared|norm|lm_head|embed",
        inputs={"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]},
    ),
    "whisper": Architecture(
        model="WhisperForConditionalGeneration", config="WhisperConfig",
        keys={"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
              "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
              "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
              "begin_suppress_tokens": None},
        dense="embed|norm|conv|proj_out",
        inputs={"input_features": torch.linspace(-1, 1, 8 * 16).view(1, 8, 16), "decoder_input_ids": TOKENS[:, :4]},
    ),
    "a sequence classifier": Architecture(
        model="LlamaForSequenceClassification", config="LlamaConfig", keys={**GROUPED, "num_labels": 3}
    ),
    "a token classifier": Architecture(
        model="BertForTokenClassification", config="BertConfig", keys={**BERT, "num_labels": 5},
        dense="embed|Norm|classifier",
    ),
    "a vision transformer": Architecture(
        model="ViTForImageClassification", config="ViTConfig", keys={**VISION, "num_labels": 3},
        dense="embed|norm|classifier",
        inputs={"pixel_values": torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)},
    ),
    "llava": Architecture(
        model="LlavaForConditionalGeneration", config="LlavaConfig",
        keys={"text_config": LLAMA, "vision_config": {**VISION, "model_type": "clip_vision_model"},
              "image_token_index": 63, "vision_feature_layer": -1},
        dense="embed|norm|lm_head|vision|projector",
    ),
    "qwen2-vl": Architecture(
        model="Qwen2VLForConditionalGeneration", config="Qwen2VLConfig",
        keys={"text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                                             "rope_theta": 10000.0}},
              "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
                                "patch_size": 4},
              "image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60},
        dense="embed|norm|lm_head|visual",
        inputs={"input_ids": TOKENS[:, :5]},
    ),
    "gemma-3 with vision": Architecture(
        model="Gemma3ForConditionalGeneration", config="Gemma3Config",
        keys={"text_config": {**GROUPED, "head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4,
              "image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62},
        dense="embed|norm|lm_head|vision|projector",
    ),
}  # fmt: skip
