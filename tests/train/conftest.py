"""Real text, a tokenizer trained on it, and tiny checkpoints that share it."""

import pytest
import torch
from training_runs import SHAPE, TEXT
from transformers import Qwen2Config, Qwen2ForCausalLM

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from upcycled_moe.common.text import open_text
from upcycled_moe.common.tokenizers import train_tokenizer


@pytest.fixture(scope="session")
def text_folder():
    return TEXT


@pytest.fixture(scope="session")
def train_files(text_folder):
    """Two small files, so that runs start soon."""
    files = [str(file) for domain in ("detective", "travel") for file in text_folder.glob(f"{domain}_validation.*")]
    assert len(files) == 2
    return files


@pytest.fixture(scope="session")
def tokenizer(train_files):
    """Byte-level BPE as Qwen's, whose end-of-text token pads too."""
    texts = (document["text"] for _, document in zip(range(20), open_text(train_files), strict=False))
    return train_tokenizer(texts, SHAPE["vocab_size"])


@pytest.fixture(scope="session")
def make_moe_checkpoint(tmp_path_factory, tokenizer):
    """`make_moe_checkpoint(**config_fields)`: a folder with a model whose first layer is dense."""

    def make(**config_fields):
        torch.manual_seed(0)
        coefficients = {"router_aux_loss_coef": 0.05, "router_z_loss_coef": 0.01}
        config = UpcycledQwenMoeConfig(
            **{**SHAPE, "num_experts": 4, **coefficients, "mlp_only_layers": [0], **config_fields}
        )
        return _save(UpcycledQwenMoeForCausalLM(config), tokenizer, tmp_path_factory.mktemp("moe"))

    return make


@pytest.fixture(scope="session")
def moe_checkpoint(make_moe_checkpoint):
    return make_moe_checkpoint(use_router_bias=True)


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    return _save(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), tokenizer, tmp_path_factory.mktemp("dense"))


def _save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(train_files):
    """A short run on a CPU; tests add the model and the output folder."""
    return {
        "train_data": train_files,
        "max_steps": 6,
        "block_size": 64,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        # Pictures take longer than the rest of the run.
        "router_probe_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
