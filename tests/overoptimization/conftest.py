"""A policy and reward models that chat, for samples and their scores; nobody may write into them."""

import copy
from pathlib import Path

import pytest
import torch
from dense_checkpoints import SHAPE, byte_level_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Qwen's kind of tokenizer, with its chat template."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def write_model(tmp_path_factory, chat_tokenizer):
    """`write_model(model_class, seed=0, **config_fields)`: folder of a small model with that tokenizer."""

    def write(model_class, seed: int = 0, **config_fields) -> Path:
        config = Qwen2Config(
            **{**SHAPE, "vocab_size": len(chat_tokenizer), "num_hidden_layers": 2, **config_fields},
            pad_token_id=chat_tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(model_class.__name__)
        model_class(config).save_pretrained(folder)
        chat_tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def policy(write_model) -> Path:
    """A policy that draws all tokens nearly alike, whatever it is asked; its own settings would take the likeliest."""
    folder = write_model(Qwen2ForCausalLM)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    # Not quite: of tokens that tie, no setting leaves one out.
    model.lm_head.weight.data.mul_(1e-3)
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model(write_model):
    """`reward_model(seed)`: folder of a reward model."""
    written: dict[int, Path] = {}

    def folder(seed: int) -> Path:
        if seed not in written:
            written[seed] = write_model(Qwen2ForSequenceClassification, seed, num_labels=1)
        return written[seed]

    return folder
