"""Transformers' own tests of a model, run on these models.

The tests are those of the installed Transformers version; `fetch.py` gets them from its source distribution.
"""

import importlib
import sys
import types
import unittest

import pytest
import torch
from fetch import fetched_tests
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from modeling_upcycled_moe import (
    UpcycledQwenMoeConfig,
    UpcycledQwenMoeForCausalLM,
    UpcycledQwenMoeForSequenceClassification,
    UpcycledQwenMoeModel,
)


if not fetched_tests().is_dir():
    pytest.skip(
        f"Transformers' tests are not in {fetched_tests()}; run `python tests/conformance/fetch.py`",
        allow_module_level=True,
    )


def _import_upstream() -> tuple[types.ModuleType, types.ModuleType]:
    """Import the fetched tests as a package, with a stub for each sibling that the distribution leaves out."""
    package = "transformers_tests"
    modules = {
        package: {"__path__": [str(fetched_tests())]},
        f"{package}.exporters": {"__path__": []},
        f"{package}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        f"{package}.generation": {"__path__": []},
        f"{package}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        f"{package}.utils": {"__path__": []},
        f"{package}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
    return (
        importlib.import_module(f"{package}.test_modeling_common"),
        importlib.import_module(f"{package}.test_configuration_common"),
    )


modeling_common, configuration_common = _import_upstream()
GenerationTesterMixin = modeling_common.GenerationTesterMixin


@pytest.fixture(scope="module", autouse=True)
def _listed_for_the_upstream_tests():
    """Put the classes where the upstream tests look up what a class is for, such as which labels it takes."""
    listed = [
        (modeling_auto.MODEL_MAPPING_NAMES, UpcycledQwenMoeModel),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, UpcycledQwenMoeForCausalLM),
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, UpcycledQwenMoeForSequenceClassification),
    ]
    for names, model_class in listed:
        names[UpcycledQwenMoeConfig.model_type] = model_class.__name__
    yield
    for names, _ in listed:
        del names[UpcycledQwenMoeConfig.model_type]


class ModelTester:
    """A tiny model and its inputs, as the upstream tests ask for them."""

    is_training = True
    batch_size = 3
    seq_length = 7

    def __init__(self, **config_fields):
        self.config_fields = {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            **config_fields,
        }
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, self.config_fields[name])

    def get_config(self) -> UpcycledQwenMoeConfig:
        return UpcycledQwenMoeConfig(**self.config_fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        input_ids = modeling_common.ids_tensor(shape, self.config_fields["vocab_size"] - 1) + 1  # no padding
        return self.get_config(), {
            "input_ids": input_ids.to(torch_device),
            "attention_mask": torch.ones(shape, dtype=torch.long, device=torch_device),
        }


class ConformanceTests(modeling_common.ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (
        UpcycledQwenMoeModel,
        UpcycledQwenMoeForCausalLM,
        UpcycledQwenMoeForSequenceClassification,
    )
    config_fields = {}

    def setUp(self):
        self.model_tester = ModelTester(**self.config_fields)
        self.config_tester = configuration_common.ConfigTester(
            self, config_class=UpcycledQwenMoeConfig, **self.model_tester.config_fields
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        # It cuts the router losses off from the routers, which the models refuse; without those losses it works.
        self.model_tester.config_fields["router_aux_loss_coef"] = 0.0
        super().test_training_gradient_checkpointing_use_reentrant_true()


class Qwen2MixtureTest(ConformanceTests, unittest.TestCase):
    """Attention biases, one key an expert, tied embeddings."""

    config_fields = {"base_model_type": "qwen2", "tie_word_embeddings": True}


class Qwen3BestKeyTest(ConformanceTests, unittest.TestCase):
    """Normalised queries and keys, pooling by maximum, several keys an expert, a shared expert, a dense layer."""

    config_fields = {
        "base_model_type": "qwen3",
        "mlp_only_layers": [0],
        "num_routers": 8,
        "router_pooling": "max",
        "shared_expert_intermediate_size": 16,
    }


class SlidingLinearTest(ConformanceTests, unittest.TestCase):
    """A linear router, sliding windows in the upper layer."""

    config_fields = {"router_type": "linear", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


class BiasedSigmoidTest(ConformanceTests, unittest.TestCase):
    """Sigmoid scores with a selection bias, groups, a plain shared expert."""

    config_fields = {
        "router_type": "mlp",
        "router_score_function": "sigmoid",
        "use_router_bias": True,
        "router_selection": "grouped_top_k",
        "num_expert_groups": 2,
        "shared_expert_intermediate_size": 16,
        "shared_expert_gating": "plain",
    }


class EmptySlotsTest(ConformanceTests, unittest.TestCase):
    """A changing number of experts, some of them without computation."""

    config_fields = {
        "num_copy_experts": 1,
        "num_constant_experts": 1,
        "router_selection": "top_p",
        "router_top_p": 0.5,
        "num_experts_per_tok": 3,
    }
