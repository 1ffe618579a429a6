import hashlib
import importlib.metadata
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from dense_checkpoints import SHAPE, folder_hashes, write_dense
from fresh_models import TOLERANCE, Warnings, load
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import modeling_upcycled_moe
from upcycled_moe.common.devices import best_device
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.calibration import calibrate, calibration_blocks
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.source import open_source


FAMILIES = ["qwen2", "qwen2-sliding", "qwen1.5", "qwen3"]


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "linear"},
        {},
        {"router_pooling": "max", "num_routers": 2},
        {"num_routers": 8, "num_experts_per_tok": 3, "mlp_only_layers": [0]},
        {"num_experts": 8, "router_logit_std": 1.0, "decoder_sparse_step": 2},
    ],
    ids=["linear", "mixture", "max", "parts-of-heads", "scaled"],
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_moe_computes_what_the_dense_model_computes(dense, mixture_recipe, tmp_path, tokens, family, settings):
    folder = dense(family)
    convert(open_source(str(folder)), mixture_recipe(**settings), tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert 0.5 < expected.abs().max() < 5
    actual = load(tmp_path / "out")(tokens).logits
    assert (actual - expected).abs().max().item() <= TOLERANCE


@torch.no_grad()
def test_a_configuration_as_on_the_hub(tmp_path, linear_recipe, tokens):
    """Files of 2024 write `rope_theta` and `torch_dtype` at the top, no `layer_types`, and a window that is off."""
    folder = write_dense(tmp_path / "dense", rope_theta=5e4, tie_word_embeddings=True)
    config = {name: value for name, value in SHAPE.items() if name != "initializer_range"} | {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 50000.0,
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_sliding_window": False,
        "use_mrope": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    convert(open_source(str(folder)), linear_recipe(), tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (load(tmp_path / "out")(tokens).logits - expected).abs().max().item() <= TOLERANCE
    assert load(tmp_path / "out").config.rope_parameters["rope_theta"] == 50000.0


@torch.no_grad()
def test_a_classifier_becomes_a_classifier(tmp_path, dense, linear_recipe, tokens):
    torch.manual_seed(0)
    parent = Qwen2ForSequenceClassification(Qwen2Config(**SHAPE, num_labels=3, pad_token_id=0)).eval()
    parent.save_pretrained(tmp_path / "dense")
    convert(open_source(str(tmp_path / "dense")), linear_recipe(), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert model.config.num_labels == 3
    assert (model(tokens).logits - parent(tokens).logits).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_and_all_else_are_the_sources_bytes(dense, mixture_recipe, tmp_path, dtype):
    folder = dense("qwen3", dtype=dtype)
    convert(open_source(str(folder)), mixture_recipe(mlp_only_layers=[1]), tmp_path / "out")
    parent, child = weights(folder), weights(tmp_path / "out")
    for layer in (0, 2):
        mlp = f"model.layers.{layer}.mlp."
        for expert in range(4):
            fused = child[f"{mlp}experts.gate_up_proj"][expert]
            assert raw(fused) == raw(parent[f"{mlp}gate_proj.weight"]) + raw(parent[f"{mlp}up_proj.weight"])
            assert raw(child[f"{mlp}experts.down_proj"][expert]) == raw(parent[f"{mlp}down_proj.weight"])
        # Queries are rows of q_proj, 16 of them a head, each head serving once.
        heads = parent[f"model.layers.{layer}.self_attn.q_proj.weight"].view(4, 16, 64)
        queries = child[f"{mlp}gate.query_weight"]
        assert sorted(map(raw, queries)) == sorted(map(raw, heads))
        assert child[f"{mlp}gate.keys"].dtype == dtype
    shared = parent.keys() & child.keys()
    assert shared == {name for name in parent if ".mlp." not in name or ".layers.1." in name}
    assert all(raw(parent[name]) == raw(child[name]) for name in shared)


@torch.no_grad()
def test_bfloat16_agrees_for_most_tokens(dense, mixture_recipe, tmp_path, tokens):
    """Two equal experts mixed in bfloat16 are not one expert, to the bit."""
    folder = dense("qwen2", dtype=torch.bfloat16)
    convert(open_source(str(folder)), mixture_recipe(), tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(tokens).logits
    actual = load(tmp_path / "out", dtype="auto")(tokens).logits
    assert actual.dtype == torch.bfloat16
    assert (actual.argmax(-1) == expected.argmax(-1)).double().mean() > 0.85
    # In float32 the same files agree like any others.
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    assert (load(tmp_path / "out", dtype=torch.float32)(tokens).logits - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("router", ["linear", "mixture"])
def test_the_same_seed_gives_the_same_bytes(dense, mixture_recipe, tmp_path, router):
    source = open_source(str(dense("qwen2")))
    recipe = mixture_recipe(router=router)
    convert(source, recipe, tmp_path / "one")
    torch.manual_seed(1234)
    convert(source, recipe, tmp_path / "two")
    assert folder_hashes(tmp_path / "one") == folder_hashes(tmp_path / "two")


@pytest.mark.parametrize("router", ["linear", "mixture"])
def test_the_weights_depend_on_neither_shards_nor_threads(dense, mixture_recipe, tmp_path, router):
    source = open_source(str(dense("qwen2")))
    sharded = open_source(str(dense("qwen2", max_shard_size="100KB")))
    assert len(sharded.weight_files) > 1
    recipe = mixture_recipe(router=router)
    convert(source, recipe, tmp_path / "reference")
    convert(source, mixture_recipe(router=router, max_shard_size="150KB"), tmp_path / "shards")
    convert(sharded, recipe, tmp_path / "sharded-source")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads + 1)
    try:
        convert(source, recipe, tmp_path / "threads")
    finally:
        torch.set_num_threads(num_threads)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("shards", "sharded-source", "threads"):
        assert same_weights(tmp_path / "reference", tmp_path / name), name


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": "noise", "shared_expert": "plain"},
        {"experts": "drop"},
        {"experts": "split", "num_experts": 8},
        {"experts": "random", "backbone": "random", "num_constant_experts": 2},
    ],
    ids=["noise", "drop", "split", "random"],
)
def test_what_is_computed_depends_on_the_seed_alone(dense, linear_recipe, tmp_path, settings):
    source = open_source(str(dense("qwen2", dtype=torch.bfloat16)))
    sharded = open_source(str(dense("qwen2", dtype=torch.bfloat16, max_shard_size="50KB")))
    convert(source, linear_recipe(**settings), tmp_path / "reference")
    torch.manual_seed(1234)
    convert(source, linear_recipe(**settings), tmp_path / "again")
    assert folder_hashes(tmp_path / "reference") == folder_hashes(tmp_path / "again")
    convert(source, linear_recipe(**settings, max_shard_size="50KB"), tmp_path / "shards")
    convert(sharded, linear_recipe(**settings), tmp_path / "sharded-source")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads + 1)
    try:
        convert(source, linear_recipe(**settings), tmp_path / "threads")
    finally:
        torch.set_num_threads(num_threads)
    for name in ("shards", "sharded-source", "threads"):
        assert same_weights(tmp_path / "reference", tmp_path / name), name
    if settings["experts"] != "split":
        convert(source, linear_recipe(**settings, seed=1), tmp_path / "other")
        reference, other = weights(tmp_path / "reference"), weights(tmp_path / "other")
        different = {name.split(".", 3)[-1] for name in reference if not torch.equal(reference[name], other[name])}
        assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= different


@torch.no_grad()
@pytest.mark.parametrize("shared_expert", ["sigmoid", "plain", "complement"])
@pytest.mark.parametrize("router", ["linear", "mixture"])
def test_a_shared_expert_has_its_share(dense, mixture_recipe, tmp_path, tokens, shared_expert, router):
    """The function is preserved, and both the shared and the routed experts have a part in it."""
    folder = dense("qwen2")
    recipe = mixture_recipe(router=router, shared_expert=shared_expert)
    convert(open_source(str(folder)), recipe, tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (load(tmp_path / "out")(tokens).logits - expected).abs().max().item() <= TOLERANCE
    for silenced in ("shared_expert.down_proj.weight", "experts.down_proj"):
        model = load(tmp_path / "out")
        for name, parameter in model.named_parameters():
            if name.endswith(f"mlp.{silenced}"):
                parameter.zero_()
        assert (model(tokens).logits - expected).abs().max().item() > 0.01, silenced
    gates = [tensor for name, tensor in weights(tmp_path / "out").items() if "shared_expert_gate" in name]
    assert len(gates) == (3 if shared_expert == "sigmoid" else 0)
    assert all((gate == 0).all() and gate.shape == (1, 64) for gate in gates)


def test_another_seed_draws_another_linear_router_only(dense, linear_recipe, tmp_path):
    source = open_source(str(dense()))
    convert(source, linear_recipe(seed=0), tmp_path / "zero")
    convert(source, linear_recipe(seed=1), tmp_path / "one")
    zero, one = weights(tmp_path / "zero"), weights(tmp_path / "one")
    different = {name for name in zero if not torch.equal(zero[name], one[name])}
    assert different == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    drawn = torch.cat([zero[name] for name in sorted(different)])
    assert drawn.std().item() == pytest.approx(SHAPE["initializer_range"], rel=0.1)
    assert len({tuple(row.tolist()) for row in drawn}) == 12


def test_the_provenance_names_recipe_source_and_versions(dense, mixture_recipe, tmp_path):
    folder = dense("qwen2", max_shard_size="100KB")
    recipe = mixture_recipe()
    result = convert(open_source(str(folder)), recipe, tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "upcycling.json").read_text(encoding="utf-8"))
    assert provenance["recipe"] == recipe.to_dict()
    assert provenance["source"] == {
        "name": str(folder),
        "revision": None,
        "model_type": "qwen2",
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))
        },
    }
    assert len(provenance["source"]["sha256"]) > 1
    for package in ("torch", "transformers", "safetensors", "upcycled-moe"):
        assert provenance["versions"][package] == importlib.metadata.version(package)
    assert provenance["routers"] == [report.to_dict() for report in result.routers]
    assert provenance["total_parameters"] == sum(
        parameter.numel() for parameter in load(tmp_path / "out").parameters()
    )


def naive_figures(logits, num_experts_per_tok):
    """Return what a router report should say of `logits` [T, E], token by token."""
    num_experts = logits.shape[1]
    counts, entropy, variance = [0] * num_experts, 0.0, 0.0
    for token in logits.double():
        probabilities = [math.exp(logit) for logit in token.tolist()]
        total = sum(probabilities)
        entropy -= sum(p / total * math.log(p / total) for p in probabilities)
        mean = sum(token.tolist()) / num_experts
        variance += sum((logit - mean) ** 2 for logit in token.tolist()) / num_experts
        for expert in sorted(range(num_experts), key=lambda e: -token[e].item())[:num_experts_per_tok]:
            counts[expert] += 1
    num_tokens = len(logits)
    return {
        "entropy": entropy / num_tokens,
        "logit_std": math.sqrt(variance / num_tokens),
        "load": [count / (num_tokens * num_experts_per_tok) for count in counts],
    }


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("qwen2", torch.float32, {}),
        ("qwen2-sliding", torch.float32, {"router_pooling": "max", "router_logit_std": 0.5}),
        ("qwen1.5", torch.float32, {"num_routers": 8, "mlp_only_layers": [1]}),
        ("qwen3", torch.float32, {"num_routers": 2, "router_logit_std": 2.0}),
        ("qwen3", torch.float32, {"router_logit_std": "none"}),
        ("qwen3", torch.bfloat16, {"router_logit_std": 1.0}),
        ("qwen2", torch.float32, {"router": "linear", "router_logit_std": 1.0}),
    ],
)
@torch.no_grad()
def test_the_report_is_what_the_loaded_routers_do(dense, mixture_recipe, tmp_path, family, dtype, settings):
    recipe = mixture_recipe(**settings)
    source = open_source(str(dense(family, dtype=dtype)))
    reports = convert(source, recipe, tmp_path / "out").routers
    model = load(tmp_path / "out", dtype=torch.float32 if dtype == torch.float32 else "auto")
    blocks = calibration_blocks(source, recipe)
    router_logits = model(blocks, output_router_logits=True).router_logits
    # In bfloat16 the model scores in bfloat16 what the report scored in float32; a near-tie may fall the other way.
    tolerance, load_tolerance = (1e-4, 2 / 512) if dtype == torch.float32 else (0.03, 0.03)
    assert [report.layer for report in reports] == model.config.moe_layers
    for report, logits in zip(reports, router_logits, strict=True):
        expected = naive_figures(logits, recipe.num_experts_per_tok)
        assert report.entropy == pytest.approx(expected["entropy"], rel=tolerance)
        assert report.logit_std == pytest.approx(expected["logit_std"], rel=tolerance)
        assert report.load == pytest.approx(expected["load"], abs=load_tolerance)
        assert report.dead_experts == sum(load == 0 for load in report.load)
        assert report.max_violation == pytest.approx(4 * max(report.load) - 1)
        target = recipe.target_logit_std
        if target is None:
            assert report.logit_std == report.unscaled_logit_std
        else:
            assert report.logit_std == pytest.approx(target, rel=1e-4 if dtype == torch.float32 else 0.01)
            assert report.unscaled_logit_std != pytest.approx(target, rel=0.01)


def test_the_report_is_of_the_weights_as_they_are_rounded(dense, mixture_recipe, tmp_path):
    source = open_source(str(dense("qwen2", dtype=torch.bfloat16)))
    recipe = mixture_recipe(router_logit_std=3.0)
    reports = convert(source, recipe, tmp_path / "out").routers
    written = weights(tmp_path / "out")
    activations = calibrate(
        source, calibration_blocks(source, recipe), [0, 1, 2], attended=True, batch_size=3, device=best_device()
    )
    for report, layer in zip(reports, activations, strict=True):
        gate = f"model.layers.{layer.layer}.mlp.gate."
        queries, keys = written[gate + "query_weight"].float(), written[gate + "keys"].float()
        scores = torch.cat(layer.ffn_inputs).float().cpu() @ (keys @ queries.sum(0)).T
        # The parts of bfloat16 that rounding changes are about a thousandth.
        assert report.entropy == pytest.approx(naive_figures(scores, 2)["entropy"], rel=1e-6)
        assert report.logit_std == pytest.approx(naive_figures(scores, 2)["logit_std"], rel=1e-6)


def test_mean_keys_of_grouped_query_attention_coincide(dense, mixture_recipe, tmp_path):
    progress = Warnings()
    recipe = mixture_recipe(key_statistic="mean")
    reports = convert(open_source(str(dense("qwen2"))), recipe, tmp_path / "out", progress=progress).routers
    # Four heads share two key-value heads: two of the four keys are another's copy.
    assert [report.coinciding_keys for report in reports] == [2, 2, 2]
    (message,) = [message for message in progress.messages if "coincide" in message]
    assert "Keys coincide in 3 of 3 layers (layer 0: 2 of 4)" in message
    assert "use key_statistic='attended'" in message


@pytest.mark.parametrize("family", ["qwen2", "qwen2-sliding", "qwen1.5", "qwen3"])
def test_auto_keys_differ_and_every_expert_gets_tokens(dense, mixture_recipe, tmp_path, family):
    progress = Warnings()
    recipe = mixture_recipe(calibration_tokens=2048)
    reports = convert(open_source(str(dense(family))), recipe, tmp_path / "out", progress=progress).routers
    assert [report.coinciding_keys for report in reports] == [0, 0, 0]
    assert [report.dead_experts for report in reports] == [0, 0, 0]
    assert progress.messages == []


def test_keys_that_must_coincide_are_explained(dense, mixture_recipe, tmp_path):
    progress = Warnings()
    # Eight experts, but only four heads of which two routers take two each: there are six pairs.
    recipe = mixture_recipe(num_experts=8, num_routers=2)
    convert(open_source(str(dense("qwen1.5"))), recipe, tmp_path / "out", progress=progress)
    message = next(message for message in progress.messages if "coincide" in message)
    assert "fewer different groups of heads than keys" in message
    assert "attended" not in message


def test_companions_come_along_untouched(dense, linear_recipe, tmp_path):
    folder = shutil.copytree(dense(), tmp_path / "dense")
    companions = {
        "generation_config.json": '{"temperature": 0.7,\n "odd spacing":1}',
        "chat_template.jinja": "{{ messages }}\r\n\n",
        "merges.txt": "#version: 0.2\n",
        "LICENSE": "licence text é",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    for name, text in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (folder / "training_args.bin").write_bytes(b"not ours to copy")
    convert(open_source(str(folder)), linear_recipe(), tmp_path / "out")
    for name in [*companions, "tokenizer.json", "tokenizer_config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_an_absent_tokenizer_is_warned_of_and_not_invented(dense, linear_recipe, mixture_recipe, tmp_path):
    source = open_source(str(dense(tokenizer=False)))
    progress = Warnings()
    convert(source, linear_recipe(), tmp_path / "out", progress=progress)
    (message,) = progress.messages
    assert "has no tokenizer, so the result has none" in message
    assert not [path.name for path in (tmp_path / "out").iterdir() if "token" in path.name or "vocab" in path.name]
    with pytest.raises(SettingsError, match="has no tokenizer to read calibration_data with"):
        convert(source, mixture_recipe(), tmp_path / "calibrated")
    assert not (tmp_path / "calibrated").exists()


def test_the_models_code_comes_along(dense, linear_recipe, tmp_path):
    convert(open_source(str(dense())), linear_recipe(), tmp_path / "out")
    package = Path(modeling_upcycled_moe.__file__).parent
    code = {path.name: path.read_bytes() for path in package.glob("*.py") if path.name != "__init__.py"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")} == code


LOAD_WITHOUT_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_upcycled_moe", "upcycled_moe"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not [name for name in sys.modules if name.split(".")[0] in ("modeling_upcycled_moe", "upcycled_moe")]
inputs = AutoTokenizer.from_pretrained(sys.argv[1])("the cat", return_tensors="pt")
torch.save((inputs.input_ids, model(**inputs).logits.detach()), sys.argv[2])
"""


@torch.no_grad()
def test_the_result_loads_where_the_package_is_not_installed(warm_python, dense, mixture_recipe, tmp_path):
    folder = dense("qwen3")
    convert(open_source(str(folder)), mixture_recipe(), tmp_path / "out")
    warm_python.run(LOAD_WITHOUT_THE_PACKAGE, tmp_path / "out", tmp_path / "logits", cwd=tmp_path).check_returncode()
    input_ids, logits = torch.load(tmp_path / "logits")
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids).logits
    assert (logits - expected).abs().max().item() <= TOLERANCE
