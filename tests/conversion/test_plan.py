import json
import math
import struct

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen2Config

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.plan import BASE_MEMORY_BYTES, build_plan, router_plans
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import expected_shapes, open_source


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("qwen2", torch.float32, {}),
        ("qwen1.5", torch.bfloat16, {"num_experts": 8, "num_routers": 4, "router_pooling": "max"}),
        ("qwen3", torch.float32, {"num_routers": 8, "mlp_only_layers": [1]}),
        ("qwen2-sliding", torch.float16, {"router": "linear", "decoder_sparse_step": 2, "num_experts_per_tok": 1}),
    ],
)
def test_the_plan_is_what_is_written(dense, mixture_recipe, tmp_path, family, dtype, settings, max_shard_size):
    recipe = mixture_recipe(max_shard_size=max_shard_size, **settings)
    source = open_source(str(dense(family, dtype=dtype)))
    plan = build_plan(source, recipe)
    out = convert(source, recipe, tmp_path / "out").folder

    written = {}
    for shard in plan.shards:
        with safe_open(out / shard.file_name, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                written[name] = (shard.file_name, tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        (header_bytes,) = struct.unpack("<Q", (out / shard.file_name).read_bytes()[:8])
        assert (out / shard.file_name).stat().st_size == 8 + header_bytes + shard.num_bytes
    assert {path.name for path in out.glob("*.safetensors")} == {shard.file_name for shard in plan.shards}
    assert written == {
        tensor.name: (shard.file_name, tensor.shape, dtype, tensor.num_bytes)
        for shard in plan.shards
        for tensor in shard.tensors
    }
    if max_shard_size == "200KB":
        index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"] == {name: entry[0] for name, entry in written.items()}
        assert index["metadata"]["total_size"] == plan.num_bytes
        assert all(len(shard.tensors) == 1 for shard in plan.shards if shard.num_bytes > 200_000)

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    parameters = dict(model.named_parameters())
    assert plan.total_parameters == sum(parameter.numel() for parameter in parameters.values())
    idle = sum(
        parameter[recipe.num_experts_per_tok :].numel()
        for name, parameter in parameters.items()
        if ".experts." in name
    )
    assert plan.active_parameters == plan.total_parameters - idle
    assert {router.layer: router.parameters for router in router_plans(plan)} == {
        layer: sum(p.numel() for name, p in parameters.items() if name.startswith(f"model.layers.{layer}.mlp.gate."))
        for layer in plan.config.moe_layers
    }


@pytest.mark.parametrize("family", ["qwen2", "qwen2-sliding", "qwen1.5", "qwen3"])
def test_the_configuration_is_the_parents(dense, linear_recipe, family):
    source = open_source(str(dense(family, rms_norm_eps=1e-5, eos_token_id=7, rope_theta=5e4)))
    config = build_plan(source, linear_recipe()).config.to_dict()
    parent = source.config.to_dict()
    for name in parent.keys() - {"model_type", "architectures", "transformers_version", "_name_or_path"}:
        assert config[name] == parent[name], name
    assert config["base_model_type"] == parent["model_type"]
    assert config["rope_parameters"]["rope_theta"] == 5e4


def write_header_only(folder, config, dtype="BF16"):
    """Write a checkpoint whose weights are a hole: of full size, but empty on the disk."""
    header, offset = {}, 0
    for name, shape in expected_shapes(config).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    config.save_pretrained(folder)


def test_the_papers_model_has_the_papers_size(tmp_path, text_file):
    """Qwen1.5-0.5B with 8 experts, 2 active: 2.1 billion parameters, 0.8 billion active (embedding and head apart)."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )
    write_header_only(tmp_path, config)
    (tmp_path / "tokenizer.json").touch()
    plan = build_plan(open_source(str(tmp_path)), ConversionRecipe(calibration_data=[str(text_file)]))

    embedding, attention, ffn = 151936 * 1024, 4 * 1024 * 1024 + 3 * 1024, 3 * 1024 * 2816
    router = 8 * 128 * 1024 + 8 * 128
    per_layer = attention + 2 * 1024 + router
    assert plan.total_parameters == 2 * embedding + 24 * (per_layer + 8 * ffn) + 1024
    assert plan.active_parameters == 2 * embedding + 24 * (per_layer + 2 * ffn) + 1024
    assert plan.total_parameters == pytest.approx(2.1e9, rel=0.01)
    assert plan.active_parameters == pytest.approx(0.85e9, rel=0.01)
    assert plan.num_bytes == 2 * plan.total_parameters
    # Two for each weight of a matrix that a token is multiplied with: the embedding is looked up, norms and biases are
    # vectors. The eight routers are added up before a token meets them.
    as_one_router = 128 * 1024 + 8 * 128
    assert plan.flops_per_token == 2 * (embedding + 24 * (4 * 1024 * 1024 + 2 * ffn + as_one_router))
    assert (plan.config.num_routers, plan.config.router_head_dim) == (8, 128)
    (initialization,) = {router.initialization for router in router_plans(plan)}
    assert initialization == "8 routers of 2 query heads, 8 mean keys"


def test_a_tied_head_counts_once_and_is_multiplied_with(dense, linear_recipe):
    tied = build_plan(open_source(str(dense("qwen2"))), linear_recipe())
    untied = build_plan(open_source(str(dense("qwen2", tie_word_embeddings=False))), linear_recipe())
    assert untied.total_parameters - tied.total_parameters == 320 * 64
    assert tied.flops_per_token == untied.flops_per_token


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 8}, "num_experts_per_tok=8 exceeds num_experts=4; lower it or add experts."),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1."),
        ({"mlp_only_layers": [3]}, "mlp_only_layers names [3], but layers run from 0 to 2."),
        ({"mlp_only_layers": [0, 1, 2]}, "No layer has experts"),
        ({"moe_layers": [1, 3]}, "moe_layers names [3], but layers run from 0 to 2."),
        ({"moe_layers": [-1]}, "moe_layers names [-1], but layers run from 0 to 2."),
        ({"moe_layers": []}, "moe_layers=[] leaves no layer with experts; name at least one, or leave it out"),
        ({"moe_layers": [2, 1, 2]}, "moe_layers names [2] more than once; name each layer once."),
        ({"shared_expert": "complement", "norm_topk_prob": False}, "shared_expert='complement'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
        ({"decoder_sparse_step": 4}, "No layer has experts"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 is outside [0, inf)"),
        ({"router": "mixture"}, "give calibration_data, or use router='linear'"),
        (
            {"calibration_data": ["a.txt"]},
            "calibration_block_size=1024 exceeds the model's max_position_embeddings=256",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_weight_is_read(
    dense, linear_recipe, monkeypatch, settings, message
):
    source = open_source(str(dense()))
    monkeypatch.setattr(type(next(iter(source.tensors.values()))), "load", lambda tensor: pytest.fail("read a weight"))
    with pytest.raises(SettingsError) as error:
        build_plan(source, linear_recipe(**settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"shared_expert": "sigmoid"},
        {"shared_expert": "plain", "experts": "split", "num_experts": 8, "expert_granularity": 4},
        {"num_constant_experts": 2, "num_zero_experts": 3, "num_experts_per_tok": 5, "moe_layers": [2]},
        {"use_router_bias": True, "router_score_function": "sigmoid", "moe_layers": [0, 2]},
        {"router_selection": "top_p", "router_top_p": 0.5, "num_copy_experts": 1, "experts": "noise"},
        {"backbone": "random", "experts": "random", "router": "mlp"},
        {"router": "grouped_average"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_loaded_model_has_is_what_was_planned(dense, linear_recipe, tmp_path, settings, dtype):
    recipe = linear_recipe(**settings)
    source = open_source(str(dense("qwen2", dtype=dtype)))
    plan = convert(source, recipe, tmp_path / "out").plan
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    saved = model.state_dict()
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == {
        name: tuple(saved[name].shape) for name in saved.keys() - {"lm_head.weight"}
    }
    biases = [tensor for tensor in plan.tensors if not tensor.is_parameter]
    assert len(biases) == len(plan.config.moe_layers) * recipe.use_router_bias
    assert all((tensor.dtype, tensor.shape) == ("F32", (recipe.num_experts,)) for tensor in biases)
    assert all((saved[tensor.name] == 0).all() for tensor in biases)
    if recipe.moe_layers:
        assert model.config.moe_layers == recipe.moe_layers
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = sum(number for name, number in numbers.items() if ".experts." in name)
    constant = sum(number for name, number in numbers.items() if ".constant_experts." in name)
    assert plan.total_parameters == sum(numbers.values())
    active = min(recipe.num_experts_per_tok, recipe.num_experts)
    assert plan.active_parameters == sum(numbers.values()) - constant - routed * (recipe.num_experts - active) // (
        recipe.num_experts
    )


def test_a_shared_expert_costs_what_a_dense_ffn_costs(dense, linear_recipe):
    source = open_source(str(dense()))
    without, plain, sigmoid = (
        build_plan(source, linear_recipe(shared_expert=kind)) for kind in ("none", "plain", "sigmoid")
    )
    ffns, gates = 3 * 3 * 96 * 64, 3 * 64
    assert plain.active_parameters - without.active_parameters == ffns
    assert sigmoid.active_parameters - plain.active_parameters == gates
    assert sigmoid.flops_per_token - without.flops_per_token == 2 * (ffns + gates)


def test_slices_cost_what_the_copy_costs(dense, linear_recipe):
    source = open_source(str(dense()))
    copies = build_plan(source, linear_recipe(num_experts=4, num_experts_per_tok=2))
    slices = build_plan(source, linear_recipe(num_experts=8, num_experts_per_tok=4, experts="split"))
    more_rows = 3 * 4 * 64
    assert slices.total_parameters - copies.total_parameters == more_rows
    assert slices.active_parameters - copies.active_parameters == more_rows
    assert slices.config.moe_intermediate_size == 48


def test_memory_holds_the_largest_matrix_that_is_computed(dense, linear_recipe):
    source = open_source(str(dense()))

    def computed(**settings):
        return build_plan(source, linear_recipe(**settings)).peak_memory_bytes - BASE_MEMORY_BYTES

    matrix_bytes = 3 * 4 * 96 * 64
    assert computed() == 0
    assert computed(experts="noise") == computed(experts="drop") == computed(experts="random") == matrix_bytes
    assert computed(experts="split") == matrix_bytes // 2
    assert computed(shared_expert="plain") == matrix_bytes
    assert computed(backbone="random") == 3 * 4 * 320 * 64


def test_text_without_a_tokenizer_is_refused(dense, mixture_recipe):
    with pytest.raises(SettingsError, match="has no tokenizer to read calibration_data with"):
        build_plan(open_source(str(dense(tokenizer=False))), mixture_recipe())
