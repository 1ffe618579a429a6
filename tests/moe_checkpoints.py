"""Small Mixture-of-Experts checkpoints of every kind that can be analyzed, and labelled text for them."""

import json
from pathlib import Path

import torch
from dense_checkpoints import WORDS, byte_level_tokenizer, sample_text
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from modeling_upcycled_moe import (
    UpcycledQwenMoeConfig,
    UpcycledQwenMoeForCausalLM,
    UpcycledQwenMoeForSequenceClassification,
)


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROUTED = {"num_experts": 4, "moe_intermediate_size": 24}
OURS = (UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM)
KINDS = {
    "linear": (*OURS, {**ROUTED, "router_type": "linear"}),
    # The first layer is dense.
    "mixture": (
        *OURS,
        {**ROUTED, "router_type": "mixture", "num_routers": 4, "router_head_dim": 8, "mlp_only_layers": [0]},
    ),
    "zero experts": (*OURS, {**ROUTED, "num_zero_experts": 2}),
    "top-p": (*OURS, {**ROUTED, "router_selection": "top_p", "router_top_p": 0.6, "num_experts_per_tok": 3}),
    "shared": (*OURS, {**ROUTED, "shared_expert_intermediate_size": 16, "norm_topk_prob": False}),
    "classifier": (UpcycledQwenMoeConfig, UpcycledQwenMoeForSequenceClassification, {**ROUTED, "num_labels": 2}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {**ROUTED, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**ROUTED, "norm_topk_prob": True, "head_dim": 8}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 4}),
}
DOMAINS = ("letters", "numbers", "words")


def make_model(kind: str, seed: int = 0, **config_fields) -> PreTrainedModel:
    """Return a model of `kind` in evaluation mode, the same for the same arguments."""
    config_class, model_class, kind_fields = KINDS[kind]
    torch.manual_seed(seed)
    return model_class(config_class(**{**SHAPE, **kind_fields, **config_fields})).eval()


def write_checkpoint(folder: Path, kind: str, seed: int = 0, **config_fields) -> Path:
    """Write such a model with a tokenizer into `folder` and return it."""
    make_model(kind, seed, **config_fields).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def write_text(folder: Path, num_documents: int = 12) -> Path:
    """Write validation text of three domains, a sub-folder each, into `folder` and return it."""
    texts = {
        "letters": lambda number: " ".join("abcdefghij"[(number + place) % 10] for place in range(40)),
        "numbers": lambda number: " ".join(str(number * 37 + place) for place in range(40)),
        "words": lambda number: sample_text(40, seed=number) + WORDS[number % len(WORDS)],
    }
    for domain in DOMAINS:
        (folder / domain).mkdir(parents=True)
        rows = [{"text": texts[domain](number)} for number in range(num_documents)]
        path = folder / domain / "validation.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@torch.no_grad()
def zero_attention_biases(model: PreTrainedModel) -> None:
    """Set the biases of the attention projections of `model` to zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.zero_()
