import copy

import pytest
import torch
import transformers
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Trainer, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM, UpcycledQwenMoeForSequenceClassification


# Dense parents whose Mixture-of-Experts copies must compute the same function.
DENSE_PARENTS = {
    "qwen2": ("qwen2", {}),
    "qwen2, tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen1.5, multi-head": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
}
SOME_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
KINDS = {
    "qwen2": {},
    "qwen3, best key, shared expert, a dense layer": {
        "base_model_type": "qwen3",
        "num_routers": 8,
        "router_pooling": "max",
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "sliding windows": SOME_SLIDING,
    "biased sigmoid groups, plain shared expert": {
        "router_type": "mlp",
        "router_score_function": "sigmoid",
        "use_router_bias": True,
        "router_selection": "grouped_top_k",
        "num_expert_groups": 2,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gating": "plain",
    },
    "empty slots, experts without computation": {
        "router_selection": "top_p",
        "router_top_p": 0.5,
        "num_experts_per_tok": 4,
        "num_copy_experts": 1,
        "num_constant_experts": 1,
    },
}


def upcycle(dense, make_moe, **fields):
    """Return the model in which every expert is the dense model's MLP and the routers are random."""
    inherited = {
        name: value
        for name, value in dense.config.to_diff_dict().items()
        if name not in ("model_type", "architectures", "transformers_version")
    }
    width = dense.config.intermediate_size
    model = make_moe(base_model_type=dense.config.model_type, moe_intermediate_size=width, **inherited, **fields)
    target = model.state_dict()
    with torch.no_grad():
        for name, weight in dense.state_dict().items():
            prefix, _, projection = name.partition(".mlp.")
            if name in target:
                target.pop(name).copy_(weight)
            elif projection == "gate_proj.weight":
                target[f"{prefix}.mlp.experts.gate_up_proj"][:, : weight.shape[0]].copy_(weight)
            elif projection == "up_proj.weight":
                target[f"{prefix}.mlp.experts.gate_up_proj"][:, weight.shape[0] :].copy_(weight)
            else:
                assert projection == "down_proj.weight", f"{name} has no place in the model"
                target[f"{prefix}.mlp.experts.down_proj"].copy_(weight)
    assert {name.split(".mlp.")[-1].split(".")[0] for name in target} == {"experts", "gate"}
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step_gradients(model, tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture
def experts_calls(monkeypatch):
    """The name of each experts function, in the order of their calls."""
    calls = []
    for name in ("batched_mm", "grouped_mm"):

        def record(*args, _name=name, _function=ALL_EXPERTS_FUNCTIONS[name], **kwargs):
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, name, record)
    return calls


@pytest.mark.parametrize("router", [{}, {"router_type": "linear"}, {"router_pooling": "max"}], ids=str)
@pytest.mark.parametrize(("family", "fields"), DENSE_PARENTS.values(), ids=DENSE_PARENTS)
def test_identical_experts_compute_what_the_dense_parent_computes(
    make_dense, make_moe, make_tokens, family, fields, router
):
    dense = make_dense(family, **fields)
    model = upcycle(dense, make_moe, **router)
    tokens = make_tokens(2, 24)
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :7] = 0

    expected = dense(tokens, attention_mask=attention_mask).logits
    logits = model(tokens, attention_mask=attention_mask).logits

    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 5e-6


@pytest.mark.parametrize("fields", [{"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2}], ids=str)
def test_layers_that_keep_a_dense_mlp_keep_the_function(make_dense, make_moe, make_tokens, fields):
    dense = make_dense()
    model = upcycle(dense, make_moe, **fields)

    assert (model(make_tokens()).logits - dense(make_tokens()).logits).abs().max() <= 5e-6


def test_weights_that_do_not_sum_to_one_change_the_function(make_dense, make_moe, make_tokens):
    dense = make_dense()
    model = upcycle(dense, make_moe, norm_topk_prob=False)

    assert (model(make_tokens()).logits - dense(make_tokens()).logits).abs().max() > 0.1


@pytest.mark.parametrize("layers", [1, 3])
def test_a_token_beyond_the_sliding_windows_does_not_matter(make_moe, make_tokens, layers):
    """With windows of 5 in every layer, the last token sees `layers * 4` tokens back and no further."""
    sliding = {"num_hidden_layers": layers, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    reach = layers * 4
    tokens = make_tokens(1, 20)
    beyond, within = tokens.clone(), tokens.clone()
    beyond[0, -1 - reach - 1] += 1
    within[0, -1 - reach] += 1
    windowed, full = make_moe(**sliding), make_moe(num_hidden_layers=layers)

    def last(model, tokens):
        return model(tokens).logits[0, -1]

    torch.testing.assert_close(last(windowed, beyond), last(windowed, tokens), rtol=0, atol=1e-5)
    assert (last(windowed, within) - last(windowed, tokens)).abs().max() > 1e-4
    assert (last(full, beyond) - last(full, tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_generation_with_a_cache_equals_generation_without(make_moe, make_tokens, fields):
    model = make_moe(eos_token_id=None, **fields)
    prompt = make_tokens(2, 12)
    attention_mask = torch.ones_like(prompt)
    attention_mask[0, :4] = 0
    options = {"attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    cached = model.generate(prompt, use_cache=True, **options)
    recomputed = model.generate(prompt, use_cache=False, **options)

    assert cached.past_key_values is not None
    assert recomputed.past_key_values is None
    assert cached.sequences.shape == (2, 24)
    assert torch.equal(cached.sequences, recomputed.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(recomputed.logits), rtol=0, atol=1e-5)


def checkpoint_activations(model, **kwargs):
    """Turn gradient checkpointing on; Transformers has renamed the method."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs or None)


@pytest.mark.parametrize(
    ("options", "coefficients"),
    [
        ({}, {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1}),
        ({"use_reentrant": True}, {"router_aux_loss_coef": 0.0}),
    ],
    ids=["default", "reentrant"],
)
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_gradient_checkpointing_changes_no_gradient(make_moe, make_tokens, fields, options, coefficients):
    model = make_moe(**fields, **coefficients)
    tokens = make_tokens()
    calls = []
    model.model.layers[-1].mlp.gate.register_forward_pre_hook(lambda *_: calls.append(1))

    loss, expected = train_step_gradients(model, tokens)
    assert len(calls) == 1
    model.enable_input_require_grads()
    checkpoint_activations(model, **options)
    checkpointed_loss, checkpointed = train_step_gradients(model, tokens)

    assert len(calls) == 3, "the layers were not recomputed"
    torch.testing.assert_close(checkpointed_loss, loss)
    torch.testing.assert_close(checkpointed, expected)


@pytest.mark.parametrize("checkpointing", ["Transformers", "Accelerate"])
def test_checkpointed_layers_are_recorded_once(make_moe, make_tokens, checkpointing):
    """Their routers run again, hooks included, in the backward pass."""
    model = make_moe(router_aux_loss_coef=0.3, router_jitter_noise=0.0 if checkpointing == "Accelerate" else 0.2)
    tokens = make_tokens()
    steps, states = [], []
    for is_checkpointed in (False, True):
        if is_checkpointed and checkpointing == "Transformers":
            checkpoint_activations(model)
        elif is_checkpointed:
            # As `fsdp_activation_checkpointing` does, which keeps no random state: noise would be another one.
            for index, layer in enumerate(model.model.layers):
                model.model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
        model.zero_grad()
        torch.manual_seed(1)
        outputs = model.train()(tokens, labels=tokens, output_router_logits=True)
        outputs.loss.backward()
        states.append(torch.get_rng_state())
        grads = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in gradients(model).items()}
        recorded = (outputs.router_logits, outputs.selected_experts, outputs.layer_router_losses)
        steps.append((outputs.loss.detach(), grads, *recorded))

    assert len(steps[1][2]) == len(steps[1][3]) == 3
    torch.testing.assert_close(steps[1], steps[0])
    assert torch.equal(*states)


def test_reentrant_checkpointing_would_cut_the_router_losses_off_and_is_refused(make_moe, make_tokens):
    model = make_moe(router_aux_loss_coef=0.3)
    checkpoint_activations(model, use_reentrant=True)

    with pytest.raises(ValueError, match="use_reentrant=True cuts them off"):
        model.train()(make_tokens(), labels=make_tokens())
    model.eval()(make_tokens(), labels=make_tokens())


@pytest.mark.parametrize(
    ("fields", "implementation"),
    [*((fields, "grouped_mm") for fields in KINDS.values()), ({}, "batched_mm")],
    ids=[*KINDS, "qwen2, batched_mm"],
)
def test_a_training_step_compiles_as_one_graph(make_moe, make_tokens, fields, implementation):
    """`aot_eager` traces forward and backward as the default backend does, without compiling kernels."""
    if implementation == "grouped_mm" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("On CPU, the backward pass of grouped_mm in older Transformers branches on its data.")
    # Each layer is traced by itself; of two, one may be dense or look at all tokens, and the other not.
    model = make_moe(router_aux_loss_coef=0.3, num_hidden_layers=2, **fields)
    model.set_experts_implementation(implementation)
    tokens = make_tokens()
    loss, expected = train_step_gradients(model, tokens)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, compiled_gradients = train_step_gradients(compiled, tokens)

    torch.testing.assert_close(compiled_loss, loss)
    compiled_gradients = {name.removeprefix("_orig_mod."): value for name, value in compiled_gradients.items()}
    torch.testing.assert_close(compiled_gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_inference_compiles_as_one_graph(make_moe, make_tokens, implementation, backend):
    model = make_moe()
    model.set_experts_implementation(implementation)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    with torch.no_grad():
        torch.testing.assert_close(compiled(make_tokens()).logits, model(make_tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_attention_backends_agree(make_moe, make_tokens, fields, implementation):
    tokens = make_tokens(2, 16)
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :6] = 0
    model = make_moe(**fields)
    model.set_attn_implementation("eager")
    expected = model(tokens, attention_mask=attention_mask, output_attentions=True)
    assert len(expected.attentions) == 3

    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(tokens, attention_mask=attention_mask).logits

    real = attention_mask.bool()
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_experts_implementations_agree_and_really_switch(make_moe, make_tokens, experts_calls, fields, implementation):
    model = make_moe(**fields)
    tokens = make_tokens()

    assert model.config._experts_implementation == "grouped_mm"
    loss, expected = train_step_gradients(model, tokens)
    assert experts_calls == ["grouped_mm"] * len(model.config.moe_layers)

    experts_calls.clear()
    model.set_experts_implementation(implementation)
    switched_loss, switched = train_step_gradients(model, tokens)
    assert experts_calls == ([] if implementation == "eager" else [implementation] * len(model.config.moe_layers))

    torch.testing.assert_close(switched_loss, loss)
    torch.testing.assert_close(switched, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_autocast_reaches_the_experts(make_moe, implementation):
    """Of the implementations, `grouped_mm` is one that autocast itself passes over."""
    torch.manual_seed(0)
    model = make_moe()
    model.set_experts_implementation(implementation)
    block = model.model.layers[-1].mlp
    tokens = torch.randn(1, 16, model.config.hidden_size)
    seen = []
    block.experts.register_forward_pre_hook(
        lambda experts, inputs: seen.extend([inputs[0].dtype, experts.gate_up_proj.dtype, experts.down_proj.dtype])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(tokens)
    output.float().square().sum().backward()
    assert seen == [torch.bfloat16] * 3
    assert block.experts.gate_up_proj.grad.dtype == torch.float32

    gradients = {name: parameter.grad for name, parameter in block.experts.named_parameters()}
    block.zero_grad()
    expected = block(tokens)
    expected.square().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02 * expected.std().item())
    for name, parameter in block.experts.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.02, (name, error)


def test_autocast_goes_with_offloaded_experts(make_moe, make_tokens):
    model, tokens = make_moe(), make_tokens()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(input_ids=tokens).logits
        offloaded = cpu_offload(model, execution_device="cpu")(input_ids=tokens).logits
    torch.testing.assert_close(offloaded, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_lora_on_attention_and_experts_trains_and_merges(make_moe, make_tokens, fields):
    tokens = make_tokens()
    model = make_moe(**fields)
    base = copy.deepcopy(model.state_dict())
    lora = LoraConfig(
        r=4,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted = get_peft_model(model, lora)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.5)

    # The second half of each adapter starts at zero, so the first half has a gradient from the second step on.
    for _ in range(2):
        loss, adapter_gradients = train_step_gradients(adapted, tokens)
        optimizer.step()
    assert all(".lora_" in name for name in adapter_gradients)
    for module in ("q_proj", "v_proj", "experts"):
        trained = [name for name, gradient in adapter_gradients.items() if module in name and gradient.abs().max() > 0]
        num_adapters = 4 * len(model.config.moe_layers) if module == "experts" else 2 * 3
        assert len(trained) == num_adapters, module

    adapted_loss = adapted.eval()(tokens, labels=tokens).loss
    adapted_logits = adapted(tokens).logits
    assert adapted_loss < loss
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, adapted_logits, rtol=0, atol=1e-4)
    merged_weights = merged.state_dict()
    assert merged_weights.keys() == base.keys()
    changed = {name for name, weight in merged_weights.items() if not torch.equal(weight, base[name])}
    assert {name.split(".", 3)[-1] for name in changed} == {
        "self_attn.q_proj.weight",
        "self_attn.v_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_lora_can_train_the_routers_whole_beside_its_adapters(make_moe, make_tokens):
    """The adapted model holds each router twice, the frozen original and the trained copy."""
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    model = make_moe(router_aux_loss_coef=0.3, use_router_bias=True)
    adapted = get_peft_model(model, lora)

    _, trained = train_step_gradients(adapted, make_tokens())
    loads = torch.tensor([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]])
    adapted.update_router_biases(loads)

    for layer, decoder_layer in enumerate(model.model.layers):
        wrapper = decoder_layer.mlp.gate
        moved = wrapper.modules_to_save["default"].selector.e_score_correction_bias
        assert moved.argmin() == layer
        assert not wrapper.original_module.selector.e_score_correction_bias.any()
    with pytest.raises(ValueError, match="loads are of 2 layers, but the model has 3"):
        adapted.update_router_biases(loads[:2])

    routers = [name for name, gradient in trained.items() if ".gate." in name and gradient.abs().max() > 0]
    assert len(routers) == 2 * 3  # the queries and keys of three layers


@pytest.mark.parametrize(("router_type", "parameter"), [("linear", "weight"), ("mixture", "query_weight")])
def test_lora_can_adapt_the_routers_too(make_moe, make_tokens, router_type, parameter):
    model = make_moe(router_type=router_type, router_aux_loss_coef=0.3, use_router_bias=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=[f"mlp.gate.{parameter}"]))

    _, trained = train_step_gradients(adapted, make_tokens())
    model.update_router_biases(torch.arange(12).view(3, 4))

    routers = [name for name, gradient in trained.items() if ".gate." in name and gradient.abs().max() > 0]
    assert len(routers) == 3  # the second halves, as the first have no gradient yet


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_bfloat16_trains_and_stays_close(make_moe, make_tokens, fields):
    model = make_moe(router_z_loss_coef=0.1, **fields)
    tokens = make_tokens(4, 24)
    expected = model(tokens).logits

    logits = model.bfloat16()(tokens).logits
    _, trained = train_step_gradients(model, tokens)

    assert logits.dtype == torch.bfloat16
    # A near-tie may send a token to another expert, which moves its logits, and those of later ones, by any amount.
    difference = (logits.float() - expected).abs()
    assert difference.median() < 0.05 * expected.std()
    assert len(trained) == len(list(model.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in trained.values())


def test_hidden_states_and_router_logits_have_one_entry_a_layer(make_moe, make_tokens):
    model = make_moe(mlp_only_layers=[1])
    outputs = model(make_tokens(2, 12), output_hidden_states=True, output_router_logits=True)

    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 12, 64)] * 4
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(24, 4)] * 2


def test_exactly_one_kind_of_input_is_asked_for(make_moe, make_tokens):
    model = make_moe()
    embeddings = model.get_input_embeddings()(make_tokens())

    assert torch.equal(model(inputs_embeds=embeddings).logits, model(make_tokens()).logits)
    for arguments in ({}, {"input_ids": make_tokens(), "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_tensor_also_after_loading(make_moe, make_tokens, tmp_path, tied):
    model = make_moe(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = UpcycledQwenMoeForCausalLM.from_pretrained(tmp_path)

    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(make_tokens()).logits, model(make_tokens()).logits)


class TestSequenceClassification:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_scores_the_last_real_token_whichever_side_is_padded(self, make_moe, make_tokens, side):
        model = make_moe(UpcycledQwenMoeForSequenceClassification, num_labels=3)
        sequences = [make_tokens(1, 9), make_tokens(1, 5, seed=1), make_tokens(1, 1, seed=2)]
        padded = torch.zeros(3, 9, dtype=torch.long)
        for row, tokens in zip(padded, sequences, strict=True):
            length = tokens.shape[1]
            row[9 - length if side == "left" else 0 :][:length] = tokens[0]

        alone = torch.cat([model(tokens).logits for tokens in sequences])
        together = model(padded, attention_mask=(padded != 0).long()).logits

        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    def test_keeps_the_router_losses(self, make_moe, make_tokens):
        model = make_moe(UpcycledQwenMoeForSequenceClassification, num_labels=3, router_aux_loss_coef=0.3)
        tokens, labels = make_tokens(2, 9), torch.tensor([0, 2])

        evaluated = model(tokens, labels=labels)
        asked = model(tokens, labels=labels, output_router_logits=True)
        trained = model.train()(tokens, labels=labels)

        cross_entropy = -evaluated.logits.log_softmax(-1)[[0, 1], labels].mean()
        torch.testing.assert_close(evaluated.loss, cross_entropy)
        assert len(asked.router_logits) == 3
        assert asked.aux_loss >= 1.9
        for outputs in (asked, trained):
            torch.testing.assert_close(outputs.loss, cross_entropy + 0.3 * asked.aux_loss)

    def test_several_sequences_need_a_padding_token(self, make_moe, make_tokens):
        model = make_moe(UpcycledQwenMoeForSequenceClassification, pad_token_id=None)

        assert model(make_tokens(1, 5)).logits.shape == (1, 2)
        with pytest.raises(ValueError, match="no padding token is defined; set config"):
            model(make_tokens(2, 5))

    def test_accumulated_gradients_are_those_of_the_whole_batch(self, make_moe, make_tokens, tmp_path):
        """The Trainer leaves it to a model that takes `num_items_in_batch` to divide by it; this loss is a mean."""
        examples = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(make_tokens(8, 9))]
        trained = []
        for batch, steps in ((8, 1), (2, 4)):
            model = make_moe(UpcycledQwenMoeForSequenceClassification, num_labels=3, router_aux_loss_coef=0.0)
            arguments = TrainingArguments(
                output_dir=tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                max_steps=1,
                learning_rate=1.0,
                max_grad_norm=0.0,
                optim="sgd",
                lr_scheduler_type="constant",
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            )
            Trainer(model, arguments, train_dataset=examples).train()
            trained.append(model.score.weight.detach())

        torch.testing.assert_close(trained[1], trained[0])
