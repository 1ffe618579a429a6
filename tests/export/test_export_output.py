"""The folder that an export writes: all or nothing, without code, the same bytes each time, read by others too."""

import json
from contextlib import contextmanager

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer, folder_hashes, sample_text
from partial_outputs import leave_partial
from safetensors.torch import load_file
from transformers import AutoTokenizer

from modeling_upcycled_moe import UpcycledQwenMoeForSequenceClassification
from upcycled_moe.common.checkpoints import load_config, load_model, load_tokenizer
from upcycled_moe.common.output_folder import OutputError
from upcycled_moe.common.progress import Progress
from upcycled_moe.export.export import export, plan_export


ONE_FILE = 10**9


def _export(source, out, to="auto", max_shard_bytes=ONE_FILE, **arguments):
    plan = plan_export(source, to, max_shard_bytes)
    export(plan, out, **arguments)
    return plan


def _tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("arguments", "block", "names"),
    [
        ({"base_model_type": "qwen3"}, "mlp", ("gate_proj", "up_proj", "down_proj")),
        ({"zero_biases": True}, "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_every_expert_has_tensors_of_its_own(arguments, block, names, write_moe, out):
    source = write_moe(router_type="linear", **arguments)
    _export(source, out, to="mixtral" if block == "block_sparse_moe" else "auto")
    tensors, fused = _tensors(out), _tensors(source.folder)
    gate_up = fused["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(4):
        prefix = f"model.layers.1.{block}.experts.{expert}."
        gate, up, down = (tensors[f"{prefix}{name}.weight"] for name in names)
        assert torch.equal(torch.cat([gate, up]), gate_up[expert])
        assert torch.equal(down, fused["model.layers.1.mlp.experts.down_proj"][expert])
    assert torch.equal(tensors[f"model.layers.1.{block}.gate.weight"], fused["model.layers.1.mlp.gate.weight"])
    assert not [name for name in tensors if ".experts." in name and "_up_" in name]


def test_shards_change_no_tensor(write_moe, out, tmp_path):
    source = write_moe()
    plan = _export(source, out, max_shard_bytes=100_000)
    _export(source, tmp_path / "whole")
    tensors, whole = _tensors(out), _tensors(tmp_path / "whole")
    assert len(list(out.glob("*.safetensors"))) == len(plan.derived.shards) > 1
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    load_model(str(out), load_config(str(out)), dtype="auto", device="cpu")


def test_the_same_checkpoint_gives_the_same_bytes(write_moe, out, tmp_path):
    source = write_moe(tokenizer=True)
    _export(source, out)
    _export(source, tmp_path / "again")
    first, again = folder_hashes(out), folder_hashes(tmp_path / "again")
    # The card's heading may be the name of the folder.
    first.pop("README.md"), again.pop("README.md")
    assert first == again


class _Interrupted(Progress):
    """Interrupts when half of it is written."""

    @contextmanager
    def task(self, description, total, unit):
        written = 0

        def advance(num_bytes):
            nonlocal written
            written += num_bytes
            if written > total // 2:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_export_leaves_nothing(write_moe, out):
    source = write_moe()
    with pytest.raises(KeyboardInterrupt):
        _export(source, out, progress=_Interrupted())
    assert [path.name for path in out.parent.iterdir()] == [source.folder.name]


def test_what_a_killed_export_left_is_written_anew(write_moe, out):
    partial = leave_partial(out.parent)
    _export(write_moe(), out)
    assert not partial.exists()
    load_model(str(out), load_config(str(out)), dtype="auto", device="cpu")


def test_it_replaces_nothing_without_leave(write_moe, out):
    source = write_moe()
    _export(source, out)
    before = folder_hashes(out)
    with pytest.raises(OutputError, match="overwrite"):
        _export(source, out)
    assert folder_hashes(out) == before
    _export(source, out, overwrite=True)


def test_it_brings_no_code_and_says_where_it_comes_from(write_moe, out):
    source = write_moe(router_z_loss_coef=0.01)
    plan = _export(source, out)
    assert not list(out.rglob("*.py"))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config
    assert not [name for name in config if name.startswith(("router_type", "num_router", "router_z"))]
    (step,) = json.loads((out / "upcycling.json").read_text(encoding="utf-8"))["steps"]
    assert (step["command"], step["target"]) == ("export", "qwen2_moe")
    assert step["source"] == {"name": source.name, "revision": None}
    assert step["notes"] == list(plan.notes)
    assert any("router_z_loss_coef=0.01" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("arguments", "to", "expected"),
    [
        ({"base_model_type": "qwen3"}, "qwen3_moe", {"num_experts": 6, "num_local_experts": 6, "head_dim": 16}),
        ({"base_model_type": "qwen2"}, "qwen2_moe", {"num_experts": 6, "head_dim": 16, "qkv_bias": True}),
        (
            {"zero_biases": True},
            "mixtral",
            {"num_local_experts": 6, "intermediate_size": 32, "router_jitter_noise": 0.0},
        ),
    ],
)
def test_the_configuration_is_written_as_readers_look_it_up(arguments, to, expected, write_moe, out):
    source = write_moe(
        num_experts=6,
        num_experts_per_tok=3,
        router_jitter_noise=0.1,
        router_aux_loss_coef=0,
        eos_token_id=[2, 5],
        **arguments,
    )
    _export(source, out, to)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    expected = expected | {
        "num_experts_per_tok": 3,
        "router_aux_loss_coef": 0.0,
        "eos_token_id": [2, 5],
        "dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    assert load_config(str(out)).num_experts == 6


QWEN3 = {"base_model_type": "qwen3"}
SHARED = {"shared_expert_intermediate_size": 24}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({**QWEN3, "router_type": "linear"}, []),
        ({**QWEN3, "router_type": "linear", "norm_topk_prob": False}, ["llama.cpp does not read norm_topk_prob"]),
        (
            {**QWEN3, "router_type": "linear", "attention_bias": True},
            [
                "leaves out the bias of o_proj; serve it there with --model-impl transformers.",
                "llama.cpp cannot load this: its qwen3_moe has no attention bias on o_proj.",
            ],
        ),
        (
            {**QWEN3, "router_type": "linear", "hidden_act": "gelu"},
            ["vLLM's fused experts have silu whatever hidden_act says, here gelu", "llama.cpp has silu in qwen3_moe"],
        ),
        (
            {**QWEN3, **WINDOW, "max_window_layers": 0, "router_type": "linear"},
            ["llama.cpp has no sliding window in qwen3_moe, here it is 4 tokens: a GGUF of this computes something"],
        ),
        (
            {**QWEN3, "router_type": "linear", "mlp_only_layers": [1], "head_dim": 32, "norm_topk_prob": False},
            ["llama.cpp cannot load this: all layers of its qwen3_moe have experts, and here 1 of 3 are dense."],
        ),
        (
            {**QWEN3, "router_type": "linear", "model_class": UpcycledQwenMoeForSequenceClassification},
            ["llama.cpp cannot load this: it has no classifiers of this kind."],
        ),
        ({"zero_biases": True, "router_type": "linear", "to": "mixtral"}, ["the attention biases are all zero"]),
        (
            {**SHARED, "router_type": "linear", "tie_word_embeddings": True},
            ["llama.cpp cannot load this: its qwen2_moe needs an output head, and here it is tied to the embeddings."],
        ),
        (
            {**SHARED, "router_type": "linear", "head_dim": 32},
            [
                "vLLM's own qwen2_moe does not read head_dim, here 32, and cuts the heads short; serve it there with",
                "llama.cpp cannot load this: its qwen2_moe does not read head_dim, here 32.",
            ],
        ),
        (
            {**QWEN3, "router_dtype": "float32", "router_selection": "expert_choice"},
            ["'mixture' is folded", "router_dtype='float32' has no field", "selects in training only"],
        ),
        (QWEN3, ["'mixture' is folded", "in bfloat16 it rounds otherwise"]),
        (
            {**WINDOW, "max_window_layers": 1, "norm_topk_prob": False, "router_type": "linear"},
            [
                "there is no shared expert",
                "not with flash attention",
                "gives every layer the sliding window, here some have none; with --model-impl transformers it stops",
                "llama.cpp cannot load this: its qwen2_moe needs a shared expert, and here is none.",
            ],
        ),
        (
            {**SHARED, "shared_expert_gating": "plain", "router_type": "linear"},
            ["a doubled down_proj", "llama.cpp does not read norm_topk_prob"],
        ),
    ],
)
def test_the_notes_say_what_changes_and_who_reads_it_otherwise(arguments, expected, write_moe):
    to = arguments.get("to", "auto")
    source = write_moe(**{name: value for name, value in arguments.items() if name != "to"})
    notes = plan_export(source, to, ONE_FILE).notes
    assert len(notes) == len(expected)
    for note, text in zip(notes, expected, strict=True):
        assert text in note


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "vllm"),
        ({**WINDOW, "max_window_layers": 0}, "vllm"),
        ({**QWEN3, "head_dim": 32}, "vllm"),
        ({**QWEN3, "attention_bias": True}, "transformers"),
        ({**SHARED, **WINDOW, "max_window_layers": 1}, "transformers"),
        ({**WINDOW, "max_window_layers": 1}, None),
        ({**QWEN3, "hidden_act": "gelu"}, None),
    ],
)
def test_programs_are_told_how_vllm_computes_the_same(arguments, expected, write_moe):
    plan = plan_export(write_moe(**arguments), "auto", ONE_FILE)
    assert plan.to_dict()["vllm_model_impl"] == expected
    assert plan.provenance()["steps"][-1]["vllm_model_impl"] == expected


def test_classes_keep_their_names(write_moe, out):
    names = {0: "bad", 1: "fair", 2: "good"}
    source = write_moe(
        model_class=UpcycledQwenMoeForSequenceClassification,
        id2label=names,
        problem_type="single_label_classification",
    )
    _export(source, out)
    config = load_config(str(out))
    assert (config.id2label, config.problem_type) == (names, "single_label_classification")
    assert config.architectures == ["Qwen2MoeForSequenceClassification"]


@pytest.mark.parametrize("to", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize("declared", ["Qwen2Tokenizer", None])
def test_text_is_cut_alike(to, declared, write_moe, out):
    """Qwen2Tokenizer puts steps of its own into a file that has others; a Mixtral's is read as it is."""
    source = write_moe(zero_biases=True, vocab_size=320)
    byte_level_tokenizer().save_pretrained(source.folder)
    path = source.folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("tokenizer_class", None)
    path.write_text(json.dumps(settings | ({"tokenizer_class": declared} if declared else {})), encoding="utf-8")
    pipeline = json.loads((source.folder / "tokenizer.json").read_text(encoding="utf-8"))
    pipeline["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (source.folder / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    _export(source, out, to)
    text = sample_text(200) + " 12345 don't  e\u0301\n\n x"
    expected = load_tokenizer(str(source.folder))
    actual = AutoTokenizer.from_pretrained(out)
    assert actual(text)["input_ids"] == expected(text)["input_ids"]
    assert actual.eos_token == expected.eos_token
