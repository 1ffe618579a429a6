"""What is exported computes what the upcycled model does, by Transformers' own classes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM, UpcycledQwenMoeForSequenceClassification
from upcycled_moe.common.streaming.stored import StoredTensor
from upcycled_moe.export.export import export, plan_export
from upcycled_moe.export.targets import TARGETS


TOLERANCE = 1e-5
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
CLASSIFIER = {
    "model_class": UpcycledQwenMoeForSequenceClassification,
    "num_labels": 3,
    "problem_type": "single_label_classification",
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
ROUTERS = {
    "linear": {"router_type": "linear"},
    "mixture": {"router_type": "mixture", "num_routers": 8, "num_router_keys": 4},
    "grouped average": {"router_type": "grouped_average"},
}
# What all three have.
COMMON = {
    **ROUTERS,
    "one expert a token": {"num_experts_per_tok": 1},
    "classifier": CLASSIFIER,
    "window everywhere": {**WINDOW, "layer_types": [SLIDING] * 3},
    "a window that no layer has": {**WINDOW, "layer_types": [FULL] * 3},
    "other numbers": {**YARN, "rms_norm_eps": 1e-3, "hidden_act": "gelu", "head_dim": 32, "num_experts": 6},
}
# What both Qwen ones have.
QWEN = {
    "one expert a token, unscaled": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "dense layers": {"mlp_only_layers": [0], "decoder_sparse_step": 2},
}
SHARED = {"shared_expert_intermediate_size": 24}
KINDS = {
    "qwen2_moe": {
        **COMMON,
        **QWEN,
        "windows in some layers": {**WINDOW, "layer_types": [FULL, SLIDING, FULL]},
        "shared expert": {**SHARED, "shared_expert_gating": "sigmoid"},
        "plain shared expert": {**SHARED, "shared_expert_gating": "plain"},
        "tied": {"tie_word_embeddings": True},
        "float32 routers": {"router_dtype": "float32"},
        "expert choice": {"router_selection": "expert_choice"},
        "router biases of zero": {"use_router_bias": True},
    },
    "qwen3_moe": {**COMMON, **QWEN, "attention biases": {"attention_bias": True}},
    "mixtral": COMMON,
}
PARENTS = {
    "qwen2_moe": {"base_model_type": "qwen2"},
    "qwen3_moe": {"base_model_type": "qwen3"},
    "mixtral": {"base_model_type": "qwen2", "zero_biases": True},
}


def _load_native(folder, is_classifier=False, dtype=torch.float32):
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(folder, trust_remote_code=False, dtype=dtype, output_loading_info=True)
    state = model.state_dict()
    # The shared expert of width zero has no elements, so nothing of it is in the file.
    missing = [name for name in info["missing_keys"] if state[name].numel() > 0]
    assert not missing
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


def _load_ours(folder, is_classifier=False, dtype=torch.float32):
    model_class = UpcycledQwenMoeForSequenceClassification if is_classifier else UpcycledQwenMoeForCausalLM
    return model_class.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize(("to", "kind"), [(to, kind) for to, kinds in KINDS.items() for kind in kinds])
def test_the_logits_are_equal(to, kind, write_moe, out, make_tokens, record_property):
    arguments = {**PARENTS[to], **KINDS[to][kind]}
    is_classifier = arguments.get("model_class") is UpcycledQwenMoeForSequenceClassification
    source, tokens = write_moe(**arguments), make_tokens()
    plan = plan_export(source, to, max_shard_bytes=10**9)
    export(plan, out)

    native = _load_native(out, is_classifier)
    assert native.config.model_type == to
    assert native.config.architectures == [type(native).__name__]
    with torch.no_grad():
        expected = _load_ours(source.folder, is_classifier)(tokens).logits
        difference = (native(tokens).logits - expected).abs().max().item()
    record_property("largest_difference", difference)
    assert difference <= TOLERANCE
    assert plan.derived.total_parameters == native.num_parameters()


@pytest.mark.parametrize("to", TARGETS)
def test_the_tokens_that_it_generates_are_equal(to, write_moe, out, make_tokens):
    # Longer than the window, and with a cache.
    source = write_moe(**PARENTS[to], **WINDOW, layer_types=[SLIDING] * 3)
    export(plan_export(source, to, max_shard_bytes=10**9), out)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = _load_ours(source.folder).generate(make_tokens(), **settings)
    assert torch.equal(_load_native(out).generate(make_tokens(), **settings), expected)


def test_a_checkpoint_in_bfloat16_computes_the_same_in_float32(write_moe, out, make_tokens):
    """The folded router is not rounded to bfloat16: that alone would make differences of a thousandth."""
    source, tokens = write_moe(dtype=torch.bfloat16), make_tokens()
    export(plan_export(source, "auto", max_shard_bytes=10**9), out)
    with torch.no_grad():
        expected, logits = _load_ours(source.folder)(tokens).logits, _load_native(out)(tokens).logits
    assert (logits - expected).abs().max() <= TOLERANCE
    assert _load_native(out, dtype="auto").dtype == torch.bfloat16


def test_all_but_the_routers_keep_their_type(write_moe, out):
    source = write_moe(dtype=torch.bfloat16)
    export(plan_export(source, "qwen2_moe", max_shard_bytes=10**9), out)
    types = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        types.setdefault(tensor.dtype, set()).add(name.split(".")[-2])
    assert types.pop(torch.float32) == {"gate"}
    assert types.keys() == {torch.bfloat16}
    assert "shared_expert_gate" in types[torch.bfloat16]


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_router_that_is_not_finite_is_refused(value, write_moe, out):
    """The values of the keys are finite in the second case, and their sum is not."""
    source = write_moe(num_routers=4)
    keys = source.tensors["model.layers.1.mlp.gate.keys"]
    with keys.path.open("r+b") as file:
        file.seek(keys.offset)
        file.write(torch.full(keys.shape, value).numpy().tobytes())
    with pytest.raises(ValueError, match=r"the router of layer 1, folded into one matrix, is not finite; look for"):
        export(plan_export(source, "auto", max_shard_bytes=10**9), out)
    assert not out.exists()


def test_of_the_weights_only_what_is_computed_is_read(write_moe, out, monkeypatch):
    source = write_moe(base_model_type="qwen2", shared_expert_intermediate_size=24, shared_expert_gating="plain")
    read, load = set(), StoredTensor.load

    def spy(tensor):
        read.add(tensor.name.split(".", 3)[-1])
        return load(tensor)

    monkeypatch.setattr(StoredTensor, "load", spy)
    export(plan_export(source, "auto", max_shard_bytes=10**9), out)
    biases = {f"self_attn.{name}_proj.bias" for name in "qkv"}
    assert read == {"mlp.gate.keys", "mlp.gate.query_weight", "mlp.shared_expert.down_proj.weight", *biases}


def test_a_doubled_weight_that_does_not_fit_is_refused(write_moe, out):
    source = write_moe(shared_expert_intermediate_size=24, shared_expert_gating="plain", dtype=torch.float16)
    down = source.tensors["model.layers.1.mlp.shared_expert.down_proj.weight"]
    with down.path.open("r+b") as file:
        file.seek(down.offset)
        file.write(torch.tensor([40000.0], dtype=torch.float16).view(torch.uint8).numpy().tobytes())
    with pytest.raises(ValueError, match="beyond what F16 holds"):
        export(plan_export(source, "auto", max_shard_bytes=10**9), out)
    assert not out.exists()
