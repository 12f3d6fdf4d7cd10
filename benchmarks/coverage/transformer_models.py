"""Small transformers without weights: every kind the coverage table names, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.coverage.zoo import Built

TOKENS = 24


def _tokens(vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def _picture(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _text(kind: str, config: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        settings = getattr(transformers, config)(**options)
        ids = _tokens()
        return (
            getattr(transformers, kind)(settings).eval(),
            (),
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            },
        )

    return build


def _decoder(kind: str, config: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        settings = getattr(transformers, config)(use_cache=False, **options)
        return getattr(transformers, kind)(settings).eval(), (), {"input_ids": _tokens()}

    return build


def _vision(kind: str, config: str, size: int = 32, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        settings = getattr(transformers, config)(image_size=size, **options)
        return getattr(transformers, kind)(settings).eval(), (), {"pixel_values": _picture(size)}

    return build


def _clip() -> Built:
    import transformers

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 96, "max_position_embeddings": TOKENS, "eos_token_id": 95},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    ids = _tokens()
    inputs = {"input_ids": ids, "pixel_values": _picture(), "attention_mask": torch.ones_like(ids)}
    return transformers.CLIPModel(settings).eval(), (), inputs


def _t5() -> Built:
    import transformers

    settings = transformers.T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False
    )
    ids = _tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :12]}
    return transformers.T5ForConditionalGeneration(settings).eval(), (), inputs


def _whisper() -> Built:
    import transformers

    settings = transformers.WhisperConfig(
        vocab_size=96, num_mel_bins=20, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=32,
        max_target_positions=32, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    sound = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": sound, "decoder_input_ids": _tokens()[:, :12]}
    return transformers.WhisperForConditionalGeneration(settings).eval(), (), inputs


BERT = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = {**BERT, "num_key_value_heads": 2}
TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "patch_size": 8}
DISTIL = {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}

BUILDERS: dict[str, Callable[[], Built]] = {
    "bert": _text("BertForSequenceClassification", "BertConfig", **BERT),
    "bert-masked-lm": _text("BertForMaskedLM", "BertConfig", **BERT),
    "distilbert": _text("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL),
    "roberta": _text("RobertaForSequenceClassification", "RobertaConfig", **BERT),
    "vit": _vision("ViTForImageClassification", "ViTConfig", **TOWER),
    "swin": _vision(
        "SwinForImageClassification", "SwinConfig", 64,
        patch_size=4, window_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4],
    ),
    "clip": _clip,
    "gpt2": _decoder("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "qwen2": _decoder("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=16, **LLAMA),
    "t5": _t5,
    "whisper": _whisper,
}  # fmt: skip
