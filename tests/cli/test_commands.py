import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from dense_checkpoints import folder_hashes
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from warm_python import RUN_THE_COMMAND_LINE


@pytest.fixture
def calibration(text_file):
    """Options that calibrate on 512 tokens of the text."""
    return [
        *("--calibration-data", text_file),
        *("--calibration-tokens", 512),
        *("--calibration-block-size", 64),
        *("--num-experts", 4),
    ]


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    """A conversion that no test writes into."""
    from upcycled_moe.conversion.convert import convert
    from upcycled_moe.conversion.recipe import ConversionRecipe
    from upcycled_moe.conversion.source import open_source

    out = tmp_path_factory.mktemp("moe") / "out"
    convert(open_source(str(dense)), ConversionRecipe(router="linear", num_experts=4), out)
    return out


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_plan_writes_nothing(upcycled_moe, dense, calibration, tmp_path, monkeypatch, command, as_json):
    source = shutil.copytree(dense, tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    options = (["--dry-run"] if command == "convert" else []) + (["--json"] if as_json else [])
    status, out, err = upcycled_moe(command, source, "new/out", *calibration, *options)
    assert (status, err) == (0, "")
    assert out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_plan_in_json_is_what_is_written(upcycled_moe, dense, calibration, tmp_path):
    out = tmp_path / "out"
    options = [*calibration, "--max-shard-size", "200KB"]
    plan = json.loads(upcycled_moe("plan", dense, out, *options, "--json")[1])
    status, text, err = upcycled_moe("convert", dense, out, *options, "--json")
    assert (status, err) == (0, "")
    provenance = json.loads(text)
    assert provenance == json.loads((out / "upcycling.json").read_text(encoding="utf-8"))
    assert plan["recipe"] == provenance["recipe"]
    for figure in ("total_parameters", "active_parameters"):
        assert plan[figure] == provenance[figure]
    written = {}
    for shard in plan["shards"]:
        tensors = load_file(out / shard["file"])
        assert sum(tensor.nbytes for tensor in tensors.values()) == shard["num_bytes"]
        written |= tensors
    assert {path.name for path in out.glob("*.safetensors")} == {shard["file"] for shard in plan["shards"]}
    assert {tensor["name"]: tensor["shape"] for tensor in plan["tensors"]} == {
        name: list(tensor.shape) for name, tensor in written.items()
    }
    assert plan["num_bytes"] == sum(tensor.nbytes for tensor in written.values())
    assert plan["free_disk_bytes"] > 0
    assert plan["peak_memory_bytes"] > 0


def test_a_plan_for_people(upcycled_moe, dense, calibration):
    status, out, _ = upcycled_moe("plan", dense, *calibration)
    assert status == 0
    for text in (
        "(qwen2, 3 layers)",
        "4 a layer, 2 active",
        "Preserves the function  exact",
        "0-2",
        "4 routers of 1 query head, 4 attended keys",
        "model.layers.N.mlp.experts.gate_up_proj",
        "4 × 192 × 64",
        "model.safetensors",
        "Free disk",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ([], ["MoE layers 3 of 3", "Experts 4 a layer, 2 active: copies of the FFN"]),
        (["--moe-layers", 0, 2], ["MoE layers 2 of 3: 0, 2"]),
        (
            ["--experts", "noise"],
            ["with noise of 0.01 standard deviations", "function approximate: experts are copies of the FFN with"],
        ),
        (["--experts", "drop", "--drop-ratio", 0.25], ["copies of the FFN with 0.25 of its neurons redrawn"]),
        (["--experts", "split"], ["4 a layer, 2 active: 2 copies of the FFN, each in 2 slices 48 wide"]),
        (
            ["--experts", "random", "--backbone", "random"],
            ["2 active: drawn at random", "Other weights drawn at random"],
        ),
        (["--shared-expert", "sigmoid"], ["a copy of the FFN, weight by a sigmoid gate, routed outputs halved"]),
        (["--shared-expert", "plain"], ["a copy of the FFN, weight 1, routed and shared outputs halved"]),
        (
            ["--shared-expert", "complement"],
            ["Shared expert a copy of the FFN, weight 1 - highest probability Selection"],
        ),
        (["--num-zero-experts", 1, "--num-constant-experts", 2], ["Free experts 1 zero, 2 constant"]),
        (["--no-norm-topk-prob"], ["Selection softmax, top 2, weights are the scores", "norm_topk_prob=false"]),
        (
            ["--router-selection", "grouped_top_k", "--num-expert-groups", 2],
            ["softmax, top 1 of each of 2 groups, weights sum to one"],
        ),
        (
            ["--router-selection", "prototype_top_k", "--num-expert-groups", 2],
            ["softmax within each of 2 groups, top 1 of each, weights sum to one"],
        ),
        (
            ["--router-selection", "top_p", "--router-top-p", 0.4],
            ["4 a layer, at most 2 active", "softmax, the best until they sum to 0.4, at most 2"],
        ),
        (["--router-selection", "expert_choice"], ["softmax, experts choose in training, else top 2"]),
        (
            ["--use-router-bias", "--router-score-function", "sigmoid", "--router-jitter-noise", 0.01],
            ["sigmoid, top 2, weights sum to one, balanced by a bias, jitter of 0.01 in training"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if value and str(value[0]).startswith("--") else "",
)
def test_a_plan_says_what_is_special(upcycled_moe, dense, options, lines):
    status, out, err = upcycled_moe("plan", dense, "--router", "linear", "--num-experts", 4, *options)
    assert (status, err) == (0, "")
    text = " ".join(out.split())
    for line in lines:
        assert line in text


def test_a_plan_of_several_models(upcycled_moe, dense, tmp_path):
    others = [shutil.copytree(dense, tmp_path / name) for name in "abc"]
    options = ["--expert-sources", *others, "--num-experts", 8, "--router", "linear"]
    status, out, err = upcycled_moe("plan", dense, *options)
    assert (status, err) == (0, "")
    assert f"More sources {', '.join(map(str, others))}" in " ".join(out.split())
    assert "copies of the FFN, from 4 sources in equal shares" in out
    assert "Other weights           the mean of all sources" in out


def test_a_plan_fits_a_narrow_terminal(upcycled_moe, dense, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = upcycled_moe("plan", dense, "--router", "linear", "--num-experts", 4, "--shared-expert", "plain")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert all(len(line) <= 80 for line in plain.splitlines())
    for name in ("post_attention_layernorm.weight", "mlp.shared_expert.gate_proj.weight"):
        assert f"model.layers.N.{name} " in plain


def test_convert_for_people(upcycled_moe, dense, calibration, tmp_path):
    status, out, err = upcycled_moe("convert", dense, tmp_path / "out", *calibration, "--verify")
    assert (status, err) == (0, "")
    assert "Fresh routers on 512 tokens" in out
    assert f"Wrote {tmp_path / 'out'}: " in out
    assert "Equal: largest |Δlogit|" in out.splitlines()[-1]
    assert "the dense model's own rounding: up to " in out.splitlines()[-1]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(upcycled_moe, dense, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("router: linear\nnum_experts: 16\nrouter_aux_loss_coef: 1e-2\nseed: 3\n", encoding="utf-8")
    _, out, _ = upcycled_moe("plan", dense, "--recipe", recipe, "--num-experts", 4, "--json")
    settings = json.loads(out)["recipe"]
    assert settings["num_experts"] == 4
    assert (settings["router"], settings["router_aux_loss_coef"], settings["seed"]) == ("linear", 0.01, 3)
    assert settings["num_experts_per_tok"] == 2


@pytest.fixture
def linear_recipe(tmp_path):
    """`linear_recipe(model=…)`: a recipe file that needs no text."""

    def write(**settings):
        path = tmp_path / "linear.yaml"
        path.write_text(yaml.safe_dump({"router": "linear", "num_experts": 4, **settings}), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    "arguments",
    [
        ("DENSE", "OUT", "--recipe", "RECIPE"),
        ("DENSE", "--recipe", "RECIPE", "OUT"),
        ("--recipe", "RECIPE", "DENSE", "OUT"),
        ("DENSE", "--seed", "0", "OUT", "--recipe", "RECIPE"),
        ("OUT", "--model", "DENSE", "--recipe", "RECIPE"),
        ("--model", "DENSE", "--recipe", "RECIPE", "OUT"),
    ],
    ids=" ".join,
)
def test_model_and_output_come_in_any_order(upcycled_moe, dense, linear_recipe, tmp_path, arguments):
    """What the command line names wins over the recipe, whose revision goes with its model."""
    given = {"DENSE": dense, "OUT": tmp_path / "out", "RECIPE": linear_recipe(model="org/other", revision="v1")}
    status, out, err = upcycled_moe("convert", *(given.get(name, name) for name in arguments), "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["source"]["name"] == str(dense)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_recipe_may_name_the_model(upcycled_moe, dense, linear_recipe, tmp_path, is_first):
    recipe, out = ["--recipe", linear_recipe(model=str(dense))], tmp_path / "out"
    assert json.loads(upcycled_moe("plan", *recipe, "--json")[1])["source"]["name"] == str(dense)
    assert upcycled_moe("convert", *([out, *recipe] if is_first else [*recipe, out]))[0] == 0
    provenance = json.loads((out / "upcycling.json").read_text(encoding="utf-8"))
    # What is recorded is enough to do it again.
    assert provenance["recipe"]["model"] == str(dense)
    (tmp_path / "recorded.json").write_text(json.dumps(provenance["recipe"]), encoding="utf-8")
    assert upcycled_moe("convert", tmp_path / "again", "--recipe", tmp_path / "recorded.json")[0] == 0
    assert folder_hashes(tmp_path / "again") == folder_hashes(out)


def test_for_a_plan_one_argument_is_the_model(upcycled_moe, dense, linear_recipe):
    status, out, _ = upcycled_moe("plan", dense, "--recipe", linear_recipe(model="org/other"), "--json")
    assert status == 0
    assert json.loads(out)["source"]["name"] == str(dense)


def test_an_output_alone_is_no_dense_checkpoint(upcycled_moe, dense, linear_recipe, tmp_path):
    """Whoever meant DENSE and forgot OUT keeps the checkpoint."""
    mistaken = shutil.copytree(dense, tmp_path / "dense")
    status, out, err = upcycled_moe("convert", mistaken, "--recipe", linear_recipe(model=str(dense)), "--overwrite")
    assert (status, out) == (2, "")
    assert "a single argument is OUT, which would be replaced; give another folder, or DENSE and OUT." in err
    assert folder_hashes(mistaken) == folder_hashes(dense)


def test_a_recipe_of_the_package_goes_by_its_name(upcycled_moe, dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", dense, "--recipe", "vanilla_upcycling_16x0.5b", "--json"]
    status, out, err = upcycled_moe(*arguments)
    assert (status, err) == (0, "")
    assert json.loads(out)["recipe"]["num_experts"] == 16
    # A folder of that name, such as its output, does not hide it; a file does.
    Path("vanilla_upcycling_16x0.5b").mkdir()
    assert json.loads(upcycled_moe(*arguments)[1])["recipe"]["num_experts"] == 16
    Path("vanilla_upcycling_16x0.5b").rmdir()
    Path("vanilla_upcycling_16x0.5b").write_text("router: linear", encoding="utf-8")
    assert json.loads(upcycled_moe(*arguments)[1])["recipe"]["num_experts"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_expert: 4", "recipe.yaml: unknown key 'num_expert'; did you mean 'num_experts'?"),
        ("num_experts: many", "num_experts='many': expected int."),
        ("- 4", "recipe.yaml: expected keys and values, got list."),
        ("a: [", "recipe.yaml: not a YAML file"),
        ("router: linear\nnum_routers: 2", "num_routers has no meaning with router='linear'"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_status_2(upcycled_moe, dense, tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    status, out, err = upcycled_moe("convert", dense, tmp_path / "out", "--recipe", recipe)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def truncate_weights(dense, out):
    os.truncate(dense / "model.safetensors", 1000)


def fill_output(dense, out):
    out.mkdir()
    (out / "file").touch()


def file_for_output(dense, out):
    out.touch()


WRONG_INPUTS = {
    "truncated": (truncate_weights, "truncated inside its header (1000 bytes); fetch it again."),
    "no weights": (
        lambda dense, out: (dense / "model.safetensors").unlink(),
        "neither model.safetensors nor",
    ),
    "full output": (fill_output, "exists and is not empty; give another folder, or --overwrite to replace it."),
    "file for output": (file_for_output, "is a file; give a folder that does not exist yet."),
    "nothing to read": (lambda dense, out: shutil.rmtree(dense), "neither a local folder nor a Hub model"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_wrong_input_is_one_line_and_status_2(upcycled_moe, dense, tmp_path, spoil, message):
    source, out = shutil.copytree(dense, tmp_path / "dense"), tmp_path / "out"
    spoil(source, out)
    before = folder_hashes(tmp_path)
    status, stdout, err = upcycled_moe("convert", source, out, "--router", "linear")
    assert (status, stdout) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert folder_hashes(tmp_path) == before


def test_the_default_recipe_says_what_it_needs(upcycled_moe, dense, tmp_path):
    status, _, err = upcycled_moe("convert", dense, tmp_path / "out")
    assert status == 2
    assert err == (
        "upcycled-moe: error: router='mixture' averages attention keys over text; give calibration_data, or use "
        "router='linear'.\n"
    )


def test_absent_text_is_noticed_before_anything_is_written(upcycled_moe, dense, tmp_path):
    for options in ([], ["--dry-run"]):
        arguments = ["--calibration-data", tmp_path / "absent.txt", "--calibration-block-size", 64]
        status, _, err = upcycled_moe("convert", dense, tmp_path / "out", *arguments, *options)
        assert status == 2
        assert "absent.txt: no such file or folder" in err
        assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_output(upcycled_moe, dense, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    (out / "old").touch()
    status, _, err = upcycled_moe("convert", dense, out, "--router", "linear", "--overwrite")
    assert (status, err) == (0, "")
    assert (out / "model.safetensors").exists()
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_recipe(upcycled_moe, dense, tmp_path):
    recipe = tmp_path / "out" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("router: linear", encoding="utf-8")
    (recipe.parent / "config.json").touch()
    for options in ([], ["--dry-run"]):
        arguments = ["convert", dense, recipe.parent, "--recipe", recipe, "--overwrite", *options]
        status, out, err = upcycled_moe(*arguments)
        assert (status, out) == (2, "")
        assert f"holds {recipe}, which replacing it would delete" in err
    assert recipe.exists()


def test_warnings_go_to_stderr(upcycled_moe, dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "dense [no tokenizer]")
    for path in source.glob("tokenizer*"):
        path.unlink()
    status, out, err = upcycled_moe("convert", source, tmp_path / "out", "--router", "linear", "--json")
    assert status == 0
    assert json.loads(out)["routers"] is None
    assert err == f"warning: {source} has no tokenizer, so the result has none; put its files beside the weights.\n"
    assert "dense [no tokenizer]" in upcycled_moe("plan", source, "--router", "linear")[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_tells_equal_from_different_by_its_status(upcycled_moe, dense, converted, tmp_path, as_json):
    options = ["--num-sequences", 1, "--sequence-length", 16] + (["--json"] if as_json else [])
    status, out, err = upcycled_moe("verify", dense, converted, *options)
    assert (status, err) == (0, "")
    assert json.loads(out)["equal"] is True if as_json else out.startswith("Equal: largest |Δlogit| ")

    spoiled = shutil.copytree(converted, tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"][2] += 0.1
    save_file(tensors, tmp_path / "changed", metadata={"format": "pt"})
    (tmp_path / "changed").replace(spoiled / "model.safetensors")
    status, out, err = upcycled_moe("verify", dense, spoiled, *options)
    assert (status, err) == (3, "")
    assert json.loads(out)["rounding_noise"] > 0 if as_json else "the dense model's own rounding: up to " in out
    assert json.loads(out)["equal"] is False if as_json else out.startswith("DIFFERENT: largest |Δlogit| ")


def test_verify_of_what_cannot_be_loaded(upcycled_moe, dense, tmp_path):
    status, out, err = upcycled_moe("verify", dense, tmp_path)
    assert (status, out) == (2, "")
    assert err == (
        f"upcycled-moe: error: {tmp_path}: there is no config.json; give the folder of a finished checkpoint.\n"
    )


def test_verify_runs_no_downloaded_code_unasked(upcycled_moe, dense, monkeypatch):
    config = {"model_type": "upcycled_qwen_moe", "auto_map": {"AutoConfig": "configuration.Config"}}
    monkeypatch.setattr("upcycled_moe.common.checkpoints._config_dict", lambda model, revision: config)
    status, out, err = upcycled_moe("verify", dense, "org/model")
    assert (status, out) == (2, "")
    assert err == (
        "upcycled-moe: error: org/model: this Hub checkpoint runs code that it brings; give trust_remote_code "
        "(--trust-remote-code) if you trust it.\n"
    )
    status, out, err = upcycled_moe("verify", dense, "org/model", "--trust-remote-code")
    assert (status, out) == (2, "")
    assert "org/model: cannot be loaded (" in err


def test_verify_of_what_is_not_there(upcycled_moe, dense, tmp_path):
    status, out, err = upcycled_moe("verify", dense, tmp_path / "absent")
    assert (status, out) == (2, "")
    assert err == f"upcycled-moe: error: {tmp_path / 'absent'}: no such folder, and not a Hub id like org/name.\n"


def test_a_revision_of_a_local_folder_is_refused(upcycled_moe, dense, converted, tmp_path):
    for arguments in (["plan", dense, "--router", "linear"], ["convert", dense, tmp_path / "out"], ["verify", dense]):
        arguments += [converted] if arguments == ["verify", dense] else []
        status, out, err = upcycled_moe(*arguments, "--revision", "v1")
        assert (status, out) == (2, "")
        assert f"revision='v1' has no meaning for the local folder {dense}" in err


@pytest.mark.parametrize("command", ["convert", "verify"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 12 bytes."),
        MemoryError(),
    ],
    ids=["accelerator", "CPU", "Python"],
)
def test_a_full_memory_is_one_line_and_status_1(
    upcycled_moe, dense, converted, calibration, tmp_path, monkeypatch, command, error
):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(Qwen2Attention, "forward", fail)
    arguments = [dense, converted] if command == "verify" else [dense, tmp_path / "out", *calibration]
    status, out, err = upcycled_moe(command, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("upcycled-moe: error: out of memory (")
    assert "lower --sequence-length" in err if command == "verify" else "lower --calibration-batch-size" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_to_load_is_a_full_memory(upcycled_moe, dense, converted, monkeypatch):
    def fail(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", fail)
    assert upcycled_moe("verify", dense, converted)[0] == 1


def test_a_bug_keeps_its_traceback(upcycled_moe, dense, converted, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Qwen2Attention, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        upcycled_moe("verify", dense, converted)


def test_convert_with_verify_fails_on_a_difference(upcycled_moe, dense, tmp_path, monkeypatch):
    """A recipe that preserves the function; but a byte goes wrong on the way to the disk."""
    from upcycled_moe.conversion import convert as convert_module

    write_weights = convert_module.write_weights

    def write_wrongly(shards, contents, folder: Path, progress, **options):
        write_weights(shards, contents, folder, progress, **options)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(convert_module, "write_weights", write_wrongly)
    status, out, _ = upcycled_moe("convert", dense, tmp_path / "out", "--router", "linear", "--verify", "--json")
    assert status == 3
    assert json.loads(out)["verification"]["equal"] is False


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--experts", "noise"], "experts are copies of the FFN with noise of 0.01 standard deviations ("),
        (["--no-norm-topk-prob"], "routing weights do not sum to one (norm_topk_prob=false); leave --verify out."),
        (["--num-zero-experts", 1, "--dry-run"], "experts without computation take a share of the weights; leave"),
    ],
)
def test_what_differs_by_its_recipe_is_not_verified(upcycled_moe, dense, tmp_path, options, reason):
    options = [*options, "--router", "linear", "--num-experts", 4]
    status, out, err = upcycled_moe("convert", dense, tmp_path / "out", *options, "--verify")
    assert (status, out) == (2, "")
    assert f"differences from the dense model, and this recipe makes some: {reason}" in err
    assert err.endswith("`upcycled-moe verify` shows how far they are apart.\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        (
            "router_upcycling_8x0.5b",
            ["--router", "linear", "--backbone", "random"],
            {"router": "linear", "num_routers": None, "calibration_data": [], "num_experts": 8},
        ),
        (
            "fine_grained",
            ["--router-selection", "top_k"],
            {"router_selection": "top_k", "num_expert_groups": None, "expert_granularity": 8},
        ),
        ("dynamic_top_p", ["--router-selection", "top_k"], {"router_top_p": None, "num_experts": 16}),
    ],
)
def test_flags_change_a_recipe_of_the_package(upcycled_moe, dense, name, options, settings):
    status, out, err = upcycled_moe("plan", dense, "--recipe", name, *options, "--json")
    assert (status, err) == (0, "")
    recipe = json.loads(out)["recipe"]
    assert {setting: recipe[setting] for setting in settings} == settings


@pytest.mark.parametrize("option", ["--num-zero-experts", "--num-copy-experts", "--num-constant-experts"])
@pytest.mark.parametrize("router", ["linear", "mixture"])
def test_impossible_numbers_of_free_experts_are_one_line(upcycled_moe, dense, text_file, option, router):
    for count in (-8, 10**15):
        options = ["--router", router, "--calibration-data", text_file, f"{option}={count}"]
        status, out, err = upcycled_moe("plan", dense, *options)
        assert (status, out) == (2, "")
        assert err == f"upcycled-moe: error: {option[2:].replace('-', '_')}={count} is outside 0 to 256.\n"


@pytest.mark.parametrize("command", ["plan", "verify"], ids=["long results", "short results"])
def test_results_that_cannot_be_printed_are_an_error(warm_python, dense, converted, command):
    arguments = [command, dense, converted, *(["--router", "linear", "--json"] * (command == "plan"))]
    result = warm_python.run(RUN_THE_COMMAND_LINE, *arguments, stdout=Path("/dev/full"))
    assert result.returncode == 1
    assert result.stderr == "upcycled-moe: error: No space left on device\n"


def test_verify_says_what_rounding_may_hide(upcycled_moe, dense, converted):
    options = ["--num-sequences", 1, "--sequence-length", 16, "--dtype", "bfloat16"]
    status, out, _ = upcycled_moe("verify", dense, converted, *options)
    assert status == 0
    assert "pass for rounding, and faults that make no larger ones are not seen." in out
    assert json.loads(upcycled_moe("verify", dense, converted, *options, "--json")[1])["is_limited_by_rounding"]


@pytest.mark.parametrize("again", ["merge", "export"])
def test_what_was_made_of_a_converted_checkpoint_is_no_output_either(
    upcycled_moe, dense, linear_recipe, tmp_path, again
):
    recipe = linear_recipe(model=str(dense))
    assert upcycled_moe("convert", tmp_path / "moe", "--recipe", recipe)[0] == 0
    assert upcycled_moe(again, tmp_path / "moe", tmp_path / "derived")[0] == 0
    status, _, err = upcycled_moe("convert", tmp_path / "derived", "--recipe", recipe, "--overwrite")
    assert status == 2
    assert "and a single argument is OUT, which would be replaced" in err
