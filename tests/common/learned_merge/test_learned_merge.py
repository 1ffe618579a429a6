"""A model whose weights are sums of others: their coefficients get the gradients that a naive sum would give them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import Trainer, TrainingArguments

from upcycled_moe.common.blocks import collate_blocks
from upcycled_moe.common.learned_merge.coefficients import SoftmaxCoefficients
from upcycled_moe.common.learned_merge.merge import BlendGroup, LearnedMerge
from upcycled_moe.common.learned_merge.sources import Blend, StoredSource
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming.contents import BLOCK_ELEMENTS
from upcycled_moe.common.streaming.stored import read_tensors


def _stored(folder, tensors):
    """Write `tensors` by their names, and return where they lie."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return read_tensors(folder)


def _noisy(model, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + scale * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }


def _whole(model, folder, num_sources=3, initial=(1.0, 2.0, 3.0), fixed=(), scale=0.3):
    """Return a merge of whole models, a group for each layer and one for the rest, and the tensors of the sources."""
    states = [_noisy(model, seed, scale) for seed in range(num_sources)]
    stored = [_stored(folder / str(number), state) for number, state in enumerate(states)]
    members = {}
    for name in states[0]:
        group = name.split(".")[2] if ".layers." in name else "rest"
        members.setdefault(group, []).append(Blend(name, [StoredSource(tensors[name]) for tensors in stored]))
    groups = [BlendGroup(name, SoftmaxCoefficients(initial, fixed), blends) for name, blends in members.items()]
    return LearnedMerge(model, groups), states


def _naive_loss(model, merge, states, tokens):
    """Return the loss of a model whose weights autograd sums up from all sources, and the logits a of each group."""
    logits = {group.name: group.coefficients.logits.detach().clone().requires_grad_() for group in merge.groups}
    weights = {}
    for group in merge.groups:
        fixed = group.coefficients.fixed
        c = torch.cat([fixed, (1 - fixed.sum()) * logits[group.name].double().softmax(0)])
        for blend in group.blends:
            stacked = torch.stack([state[blend.parameter] for state in states]).double()
            weights[blend.parameter] = torch.tensordot(c, stacked, 1).float()
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return functional_call(model, weights, (tokens,), {"labels": tokens}).loss, logits


@pytest.mark.parametrize(
    ("family", "fields"),
    [("qwen2", {"tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {})],
)
@pytest.mark.parametrize("fixed", [(), (0.25,)])
def test_gradients_are_those_of_the_naive_sum(make_dense, make_tokens, tmp_path, family, fields, fixed):
    model, tokens = make_dense(family, **fields), make_tokens(4, 16)
    merge, states = _whole(model, tmp_path, initial=(1.0, 2.0, 3.0)[len(fixed) :], fixed=fixed)
    expected, logits = _naive_loss(model, merge, states, tokens)
    expected.backward()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    merge.collect()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for group in merge.groups:
        torch.testing.assert_close(group.coefficients.logits.grad, logits[group.name].grad, rtol=1e-3, atol=1e-6)
    assert merge.gradient_norm() == pytest.approx(
        torch.cat([value.grad for value in logits.values()]).norm().item(), rel=1e-3
    )
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_accumulation_and_checkpointing_change_no_gradient(make_dense, make_tokens, tmp_path, checkpointing):
    model, tokens = make_dense(), make_tokens(4, 16)
    merge, states = _whole(model, tmp_path)
    expected, logits = _naive_loss(model, merge, states, tokens)
    expected.backward()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    for rows in tokens.split(1):
        (model(rows, labels=rows, use_cache=False).loss / 4).backward()
    merge.collect()
    for group in merge.groups:
        torch.testing.assert_close(group.coefficients.logits.grad, logits[group.name].grad, rtol=1e-3, atol=1e-6)


def test_frozen_embeddings_take_reentrant_checkpointing_with_inputs_that_have_gradients(
    make_dense, make_tokens, tmp_path
):
    gradients = {}
    for use_reentrant in (False, True):
        model, tokens = make_dense(), make_tokens()
        merge, _ = _whole(model, tmp_path / str(use_reentrant) / "all")
        merge = LearnedMerge(model, [group for group in merge.groups if group.name != "rest"])
        model.enable_input_require_grads()
        model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        assert model.get_input_embeddings().weight.grad is None
        merge.collect()
        gradients[use_reentrant] = torch.stack([group.coefficients.logits.grad for group in merge.groups])
    assert gradients[True].abs().min() > 0
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=1e-7)


class _OneWeight(torch.nn.Module):
    """A loss that is linear in its weight, so that the gradient of the weight is `direction` whatever it is."""

    def __init__(self, direction, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(direction.shape, dtype=dtype))
        self.other = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("bias", torch.zeros(4))
        self.direction = direction

    def forward(self):
        return (self.weight.double() * self.direction.double()).sum() * self.other


def _softmax_gradient(coefficients, inner_products):
    c = coefficients().detach()
    return (c * (inner_products - (c * inner_products).sum())).float()


def test_parts_of_tensors_of_any_shape_are_blended(tmp_path):
    torch.manual_seed(0)
    fused, plain, vector = torch.randn(3, 6, 4), torch.randn(6, 10), torch.randn(2, 8)
    tensors = _stored(tmp_path / "sources", {"fused": fused, "plain": plain, "first": vector[0], "second": vector[1]})
    model = _OneWeight(torch.randn(6, 8))
    # Rows 2 to 6 and columns 4 to 8 are halved rows of two experts and a part of a matrix; the rest is not blended.
    sources = [
        StoredSource(tensors["fused"], index=0, row=2, factor=0.5),
        StoredSource(tensors["fused"], index=2, row=2, factor=0.5),
        StoredSource(tensors["plain"], row=1, column=3, num_columns=4),
    ]
    parts = torch.stack([fused[0, 2:6] / 2, fused[2, 2:6] / 2, plain[1:5, 3:7]])
    group = BlendGroup("part", SoftmaxCoefficients([1, 2, 3]), [Blend("weight", sources, 2, 4, (4, 4))])
    merge = LearnedMerge(model, [group])
    c = torch.tensor([1, 2, 3]) / 6
    expected = torch.zeros(6, 8)
    expected[2:6, 4:8] = torch.tensordot(c, parts, 1)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-6)
    model().backward()
    merge.collect()
    products = (parts * model.direction[2:6, 4:8]).sum((1, 2))
    torch.testing.assert_close(
        group.coefficients.logits.grad, _softmax_gradient(group.coefficients, products), rtol=1e-4, atol=1e-6
    )
    # A vector, such as a norm's weight, and a tensor of matrices as a whole.
    vectors = BlendGroup(
        "vector",
        SoftmaxCoefficients([1, 1]),
        [Blend("weight", [StoredSource(tensors["first"]), StoredSource(tensors["second"])])],
    )
    model = _OneWeight(torch.randn(8))
    LearnedMerge(model, [vectors])
    torch.testing.assert_close(model.weight.detach(), vector.mean(0))
    model = _OneWeight(torch.randn(3, 6, 4))
    LearnedMerge(
        model, [BlendGroup("all", SoftmaxCoefficients([1]), [Blend("weight", [StoredSource(tensors["fused"])])])]
    )
    assert torch.equal(model.weight.detach(), fused)


def test_buffers_are_written_and_get_no_gradient(tmp_path):
    biases = torch.randn(2, 4)
    tensors = _stored(tmp_path / "s", {"a": biases[0], "b": biases[1], "w": torch.randn(3, 2), "v": torch.randn(3, 2)})
    model = _OneWeight(torch.randn(3, 2))
    blends = [
        Blend(name, [StoredSource(tensors[one]) for one in pair])
        for name, pair in {"bias": "ab", "weight": "wv"}.items()
    ]
    merge = LearnedMerge(model, [BlendGroup("all", SoftmaxCoefficients([1, 3]), blends)])
    torch.testing.assert_close(model.bias, biases[0] / 4 + 3 * biases[1] / 4)
    optimizer = merge.attached(torch.optim.SGD(merge.parameters(), lr=1.0))
    model().backward()
    optimizer.step()
    first, second = merge.values()["all"]
    assert first != pytest.approx(0.25)
    torch.testing.assert_close(model.bias, first * biases[0] + second * biases[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_that_are_almost_alike_have_exact_gradients(tmp_path, dtype):
    """Products of a gradient with them are alike to six digits; their difference is what counts."""
    generator = torch.Generator().manual_seed(0)
    # More than a block, so that sums go over several.
    base = torch.randn(3, BLOCK_ELEMENTS // 2, generator=generator)
    near = [base + 1e-5 * torch.randn(base.shape, generator=generator) for _ in range(3)]
    tensors = _stored(tmp_path / "sources", {str(number): value for number, value in enumerate(near)})
    model = _OneWeight(torch.randn(base.shape, generator=generator) + base, dtype)
    group = BlendGroup(
        "all", SoftmaxCoefficients([1, 1, 1]), [Blend("weight", [StoredSource(value) for value in tensors.values()])]
    )
    merge = LearnedMerge(model, [group])
    model().backward()
    gradient = model.weight.grad.double()
    merge.collect()
    products = torch.stack([(value.double() * gradient).sum() for value in near])
    torch.testing.assert_close(
        group.coefficients.logits.grad, _softmax_gradient(group.coefficients, products), rtol=1e-3, atol=0
    )


def test_sums_of_a_bfloat16_model_are_in_float32(tmp_path):
    value = torch.linspace(1, 2, 50).bfloat16()
    tensors = _stored(tmp_path / "s", {"value": value})
    model = _OneWeight(value, torch.bfloat16)
    sources = [StoredSource(tensors["value"])] * 60
    LearnedMerge(model, [BlendGroup("all", SoftmaxCoefficients([1] * 60), [Blend("weight", sources)])])
    assert torch.equal(model.weight.detach(), value)


def test_a_step_follows_its_gradient_and_writes_the_weights(make_dense, make_tokens, tmp_path):
    model, tokens = make_dense(), make_tokens()
    merge, states = _whole(model, tmp_path)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = merge.attached(torch.optim.SGD(merge.parameters(), lr=0.1))
    before = merge.values()
    losses = []
    for _ in range(3):
        # Of a step before, nothing is left: neither in the weights nor in the coefficients.
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        expected, logits = _naive_loss(model, merge, states, tokens)
        expected.backward()
        optimizer.step()
        losses.append(loss.item())
        for group in merge.groups:
            torch.testing.assert_close(group.coefficients.logits.grad, logits[group.name].grad, rtol=1e-3, atol=1e-6)
    assert losses[2] < losses[1] < losses[0]
    assert merge.values() != before
    weights = model.state_dict()
    for group in merge.groups:
        c = torch.tensor(merge.values()[group.name])
        assert c.sum() == pytest.approx(1, abs=1e-6)
        for blend in group.blends:
            expected = torch.tensordot(c, torch.stack([state[blend.parameter] for state in states]), 1)
            torch.testing.assert_close(weights[blend.parameter], expected, rtol=0, atol=1e-5)
            assert not torch.equal(weights[blend.parameter], frozen[blend.parameter])


def test_two_backward_passes_add_up(make_dense, make_tokens, tmp_path):
    model, tokens = make_dense(), make_tokens()
    merge, _ = _whole(model, tmp_path)
    model(tokens, labels=tokens).loss.backward()
    merge.collect()
    once = [group.coefficients.logits.grad.clone() for group in merge.groups]
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    merge.collect()
    for group, gradient in zip(merge.groups, once, strict=True):
        torch.testing.assert_close(group.coefficients.logits.grad, 2 * gradient)


def test_other_weights_stay_and_have_no_gradient(make_dense, make_tokens, tmp_path):
    model, tokens = make_dense(), make_tokens()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    merge, _ = _whole(model, tmp_path)
    model.load_state_dict(original)
    merge = LearnedMerge(model, [group for group in merge.groups if group.name == "1"])
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.1))
    model(tokens, labels=tokens).loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        blend.parameter for blend in merge.groups[0].blends
    }
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name]) == (".layers.1." not in name)


def _trainer(model, merge, folder, max_steps):
    generator = torch.Generator().manual_seed(0)
    blocks = [{"input_ids": torch.randint(3, 128, (12,), generator=generator).tolist()} for _ in range(12)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.1))
    return Trainer(model, arguments, collate_blocks, blocks, optimizers=(optimizer, None))


def test_a_trainer_goes_on_to_the_bit_from_its_checkpoint(make_dense, tmp_path):
    whole, _ = _whole(model := make_dense(), tmp_path / "whole")
    _trainer(model, whole, tmp_path / "run", 4).train()
    again, _ = _whole(model_again := make_dense(), tmp_path / "again")
    _trainer(model_again, again, tmp_path / "run", 4).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert again.values() == whole.values() != _whole(make_dense(), tmp_path / "fresh")[0].values()
    for name, value in model.state_dict().items():
        assert torch.equal(value, model_again.state_dict()[name])


def test_loading_coefficients_writes_the_weights(make_dense, tmp_path):
    merge, _ = _whole(model := make_dense(), tmp_path / "first")
    other, _ = _whole(other_model := make_dense(), tmp_path / "other", initial=(3.0, 1.0, 1.0))
    other.load_state_dict(merge.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, other_model.state_dict()[name])


def test_a_state_without_coefficients_is_refused(make_dense, tmp_path):
    merge, _ = _whole(make_dense(), tmp_path / "sources")
    state = torch.optim.Adam(merge.parameters(), lr=0.1).state_dict()
    with pytest.raises(SettingsError, match="holds no coefficients"):
        merge.attached(torch.optim.Adam(merge.parameters(), lr=0.1)).load_state_dict(state)


def test_a_step_without_gradients_is_refused(make_dense, tmp_path):
    merge, _ = _whole(make_dense(), tmp_path / "sources")
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.1))
    with pytest.raises(SettingsError, match=r"No weight of the merge has a gradient; .* not with FSDP"):
        optimizer.step()


@pytest.mark.parametrize(
    ("initial", "fixed", "message"),
    [
        ([], (), "must all be above zero"),
        ([1, 0], (), "must all be above zero"),
        ([1, float("nan")], (), "must all be above zero"),
        ([1, 1], (1.0,), "sum to less than 1"),
        ([1, 1], (-0.1,), "at least 0"),
    ],
)
def test_shares_that_are_none_are_refused(initial, fixed, message):
    with pytest.raises(SettingsError, match=message):
        SoftmaxCoefficients(initial, fixed)


def test_coefficients_start_where_they_are_told():
    coefficients = SoftmaxCoefficients([1, 3], fixed=[0.2])
    assert coefficients().tolist() == pytest.approx([0.2, 0.2, 0.6], abs=1e-7)
    assert sum(coefficients().tolist()) == pytest.approx(1, abs=1e-15)
    assert SoftmaxCoefficients([1, 1, 1, 1])().tolist() == [0.25] * 4


def test_groups_that_cannot_be_are_refused(tmp_path):
    tensors = _stored(tmp_path / "s", {"a": torch.randn(4, 4), "b": torch.randn(4, 4)})
    model, sources = _OneWeight(torch.randn(4, 4)), [StoredSource(tensors["a"]), StoredSource(tensors["b"])]

    def groups(*blends, names="ab"):
        return [
            BlendGroup(name, SoftmaxCoefficients([1, 1]), [blend]) for name, blend in zip(names, blends, strict=False)
        ]

    whole = Blend("weight", sources)
    upper, lower = Blend("weight", sources, shape=(2, 4)), Blend("weight", sources, 2, 0, (2, 4))
    LearnedMerge(model, groups(upper, lower))
    for wrong, message in (
        (groups(Blend("absent", sources)), "'absent' is no weight"),
        (groups(whole, upper), "blend the same weights"),
        (groups(Blend("weight", sources[:1])), "has 1 sources, and the group coefficients of 2"),
        (groups(upper, lower, names="aa"), "names of their own"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnedMerge(model, wrong)


TWO_PROCESSES = """
import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.tensor import distribute_module, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from upcycled_moe.common.learned_merge.coefficients import SoftmaxCoefficients
from upcycled_moe.common.learned_merge.merge import BlendGroup, LearnedMerge
from upcycled_moe.common.learned_merge.sources import Blend, StoredSource
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming.stored import read_tensors

folder = Path(sys.argv[1])
tensors = read_tensors(folder)
rows, targets = tensors["rows"].load(), tensors["targets"].load()

def learned(part, wrap):
    model = nn.Linear(4, 3, bias=False)
    blend = Blend("weight", [StoredSource(tensors[name]) for name in ("a", "b")])
    merge = LearnedMerge(model, [BlendGroup("all", SoftmaxCoefficients([1, 1]), [blend])])
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.1))
    model = wrap(model)
    for _ in range(5):
        (model(rows[part]) - targets[part]).square().mean().backward()
        optimizer.step()
    return merge.values()["all"]

def run(rank):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {"ddp": learned(slice(4 * rank, 4 * rank + 4), DistributedDataParallel)}
    result["alone"] = learned(slice(None), lambda model: model)
    try:
        sharded = distribute_module(nn.Linear(4, 3, bias=False), init_device_mesh("cpu", (2,)))
        blend = Blend("weight", [StoredSource(tensors["a"])])
        LearnedMerge(sharded, [BlendGroup("all", SoftmaxCoefficients([1]), [blend])])
    except SettingsError as error:
        result["sharded"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()

context = torch.multiprocessing.get_context("fork")
processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
for process in processes: process.start()
for process in processes: process.join()
sys.exit(max(process.exitcode for process in processes))
"""


@pytest.mark.distributed
def test_two_processes_learn_the_same_as_one_and_sharded_weights_are_refused(warm_python, tmp_path):
    torch.manual_seed(0)
    values = {"a": (3, 4), "b": (3, 4), "rows": (8, 4), "targets": (8, 3)}
    save_file({name: torch.randn(shape) for name, shape in values.items()}, tmp_path / "model.safetensors")
    ended = warm_python.run(TWO_PROCESSES, tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["ddp"] == second["ddp"]
    assert first["ddp"] == pytest.approx(first["alone"], abs=1e-5)
    assert abs(first["ddp"][0] - 0.5) > 0.05
    assert first["sharded"].startswith("'weight' is sharded; learn a merge with a whole model on each device")
