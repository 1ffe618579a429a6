"""Parts of iterative DPO against naive references: log-probabilities, references, figures, answers, router losses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from dense_checkpoints import byte_level_tokenizer
from trl import DPOConfig, DPOTrainer

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.errors import RunError
from upcycled_moe.train.preference import references, round_figures
from upcycled_moe.train.preference.dpo_sampling import Sampling, ending_tokens, sample_answers
from upcycled_moe.train.preference.dpo_trainer import RoundTrainer, train_round
from upcycled_moe.train.preference.dpo_training_arguments import DPOTrainingArguments
from upcycled_moe.train.preference.log_probabilities import Answer, AnswerScorer, tokenize_answers
from upcycled_moe.train.preference.round_pairs import best_and_worst, read_rows, write_rows


TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that pads with the token that ends answers."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(make_dense, tokenizer):
    return make_dense(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=0)


def conversations(*texts: tuple[str, str, str]) -> Dataset:
    """Return pairs of a prompt, a chosen and a rejected answer each."""
    rows = []
    for prompt, *answers in texts:
        sides = zip(("chosen", "rejected"), answers, strict=True)
        row = {side: [{"role": "assistant", "content": answer}] for side, answer in sides}
        rows.append({"prompt": [{"role": "user", "content": prompt}], **row, "source": "test"})
    return Dataset.from_list(rows)


PAIRS = (("the of", "and to", "in"), ("is", "that it was for with", "as have 17"), ("this", "from", "had had had"))


def naive_log_prob(model, prompt: list[int], answer: list[int]) -> float:
    """Return `ln p(answer | prompt)` from the logits of that sequence alone, token by token."""
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + place - 1, token].item() for place, token in enumerate(answer))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_probabilities_are_those_of_each_answer_alone(model, tokenizer, batch_size):
    pairs = tokenize_answers(conversations(*PAIRS), tokenizer, 64, "pairs")
    answers = pairs.answers("chosen_ids") + pairs.answers("rejected_ids")
    scores = AnswerScorer(tokenizer.pad_token_id, batch_size)(model, answers)
    assert scores == pytest.approx([naive_log_prob(model, *answer) for answer in answers], abs=1e-4)


def test_pairs_become_the_tokens_that_trl_makes_of_them(model, tokenizer, tmp_path):
    pairs = conversations(*PAIRS)
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, precompute_ref_log_probs=True, report_to="none")
    theirs = DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer).train_dataset
    ours = tokenize_answers(pairs, tokenizer, 64, "pairs").rows
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == theirs[column][:]


def test_long_answers_are_cut_and_long_prompts_left_out(tokenizer):
    pairs = conversations(*PAIRS, ("the " * 40, "of", "and"))
    whole = tokenize_answers(pairs, tokenizer, 10_000, "pairs")
    lengths = [len(prompt) + len(answer) for prompt, answer in whole.answers("rejected_ids")]
    limit = max(lengths[:3]) - 1
    cut = tokenize_answers(pairs, tokenizer, limit, "pairs")
    assert (len(whole.rows), whole.num_dropped, whole.num_cut) == (4, 0, 0)
    assert (len(cut.rows), cut.num_dropped) == (3, 1)
    assert cut.num_cut >= 1
    assert max(len(prompt) + len(answer) for prompt, answer in cut.answers("rejected_ids")) == limit
    with pytest.raises(SettingsError, match=r"pairs: every prompt is 2 tokens long or longer"):
        tokenize_answers(pairs, tokenizer, 2, "pairs")


def test_an_average_of_references_moves_as_it_is_defined():
    average = torch.eye(5, dtype=torch.float64)[0]
    for num_policies in range(1, 6):
        newest = torch.eye(5, dtype=torch.float64)[num_policies - 1]
        average = newest if num_policies == 1 else 0.7 * average + 0.3 * newest
        expected = average[:num_policies].tolist()
        assert references.ema_coefficients(num_policies, 0.7) == pytest.approx(expected, abs=1e-12)
    assert references.last_coefficients(3, 0.7) == [0, 0, 1]
    assert references.uniform_coefficients(4, 0.7) == [0.25] * 4
    assert references.ema_coefficients(4, 0.0) == references.last_coefficients(4, 0.7)


def test_a_reference_is_a_policy_where_one_counts_alone_in_all_layers():
    assert references.only_policy({"layer 0": [0, 1.0], "rest": [0, 1.0]}) == 1
    assert references.only_policy({"layer 0": [0, 1.0], "rest": [1.0, 0]}) is None
    assert references.only_policy({"model": [0.5, 0.5]}) is None


def test_figures_of_pairs():
    policy = {"chosen": [-1.0, -2.0, -3.0, -4.0], "rejected": [-2.0, -2.0, -1.0, -9.0]}
    start = {"chosen": [-2.0, -2.0, -2.0, -5.0], "rejected": [-1.0, -2.0, -2.0, -9.0]}
    figures = round_figures.pair_figures(policy, start, ["a", "a", "b", "b"], beta=0.5)
    margins = [0.5 * 2, 0.0, 0.5 * -2, 0.5 * 1]
    assert figures["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert figures["accuracy_by_source"] == {"a": 0.75, "b": 0.5}
    assert figures["margin"] == pytest.approx(sum(margins) / 4)
    assert figures["loss"] == pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in margins) / 4)
    assert (figures["log_ratio_chosen"], figures["log_ratio_rejected"]) == (0.25, 0.0)


def test_the_divergence_of_samples_is_the_divergence_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    policy, start = (torch.randn(6, generator=generator).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(policy.exp(), 40_000, replacement=True, generator=generator)
    figures = round_figures.sample_figures(policy[drawn].tolist(), start[drawn].tolist(), [1] * len(drawn), None)
    expected = F.kl_div(start, policy, reduction="sum", log_target=True).item()
    assert abs(figures["divergence"] - expected) < 4 * figures["divergence_error"] < 0.05


def test_the_best_and_the_worst_answer_make_a_pair():
    prompts = [[{"role": "user", "content": str(number)}] for number in range(4)]
    answers = [["a", "b", "c"], ["d", "d", "d"], ["e", "f", "g"], ["h", "i", "j"]]
    rewards = [[0.0, 2.0, -1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [5.0, 4.0, 4.5]]
    pairs = best_and_worst(prompts, answers, rewards, 0.0, torch.Generator().manual_seed(0))
    shown = [
        (pair["prompt"][0]["content"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs
    ]
    assert shown == [("0", "b", "c"), ("3", "h", "i")]
    flipped = best_and_worst(prompts, answers, rewards, 1.0, torch.Generator().manual_seed(0))
    assert [pair["chosen"][0]["content"] for pair in flipped] == ["c", "i"]


def test_rows_come_back_from_a_file(tmp_path):
    pairs = conversations(*PAIRS).select([2, 0])
    write_rows(pairs, tmp_path / "pairs.parquet")
    assert read_rows(tmp_path / "pairs.parquet").to_list() == pairs.to_list()


def test_answers_follow_their_own_prompts_whatever_else_is_in_the_batch(model, tokenizer):
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13]]
    # So cold that the likeliest token is drawn.
    sampling = Sampling(num_samples=2, max_new_tokens=6, temperature=1e-4, batch_size=6)
    answers = sample_answers(model, tokenizer, prompts, sampling, seed=0)
    for prompt, drawn in zip(prompts, answers, strict=True):
        greedy = []
        while len(greedy) < 6 and (not greedy or greedy[-1] not in ending_tokens(tokenizer)):
            with torch.no_grad():
                greedy.append(model(torch.tensor([prompt + greedy])).logits[0, -1].argmax().item())
        assert drawn == [Answer(prompt, greedy)] * 2


def test_answers_are_the_same_for_the_same_seed_and_leave_random_numbers_alone(model, tokenizer):
    prompts = [[5, 6], [7]]
    sampling = Sampling(num_samples=2, max_new_tokens=8, temperature=1.0, batch_size=2)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = sample_answers(model, tokenizer, prompts, sampling, seed=3)
    assert torch.rand(1) == expected
    assert sample_answers(model, tokenizer, prompts, sampling, seed=3) == first
    assert sample_answers(model, tokenizer, prompts, sampling, seed=4) != first


def test_answers_end_with_the_token_of_the_template(tokenizer):
    assert ending_tokens(tokenizer) == [tokenizer.eos_token_id]


def naive_router_losses(model, input_ids, attention_mask) -> torch.Tensor:
    """Return what balance and z-loss add, of real tokens and routed experts, layer by layer."""
    config = model.config
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=True)
    real = attention_mask.flatten().bool()
    total = 0.0
    for logits in outputs.router_logits:
        logits = logits[real]
        probabilities = logits.softmax(-1)
        loads = torch.zeros(config.num_experts)
        for token in probabilities:
            loads[token.topk(config.num_experts_per_tok).indices] += 1 / len(probabilities)
        total += config.router_aux_loss_coef * config.num_experts * (loads * probabilities.mean(0)).sum()
        total += config.router_z_loss_coef * (logits.logsumexp(-1) ** 2).mean()
    return total / len(outputs.router_logits)


def naive_dpo_loss(model, batch, beta: float) -> torch.Tensor:
    """Return DPO's loss of a batch of two halves, chosen and rejected."""
    log_probs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)[:, :-1]
    targets, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    chosen, rejected = (log_probs.gather(-1, targets[..., None])[..., 0] * mask).sum(-1).chunk(2)
    margins = (chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"])
    return -F.logsigmoid(beta * margins).mean()


def test_the_loss_has_the_routers_of_the_model(make_moe, tokenizer, tmp_path):
    model = make_moe(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        router_type="linear",
        shared_expert_intermediate_size=16,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.1,
    )
    pairs = tokenize_answers(conversations(*PAIRS), tokenizer, 64, "pairs").rows
    for column, values in (("ref_chosen_logps", [-20.0, -30.0, -9.0]), ("ref_rejected_logps", [-8.0, -20.0, -30.0])):
        pairs = pairs.add_column(column, values)
    args = DPOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, beta=0.3)
    trainer = RoundTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    batch = trainer.data_collator(list(pairs))
    assert not batch["attention_mask"].all()
    router = model.model.layers[0].mlp.gate.weight

    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, router)
    model.eval()
    dpo_loss = naive_dpo_loss(model, batch, beta=0.3)
    expected = dpo_loss + naive_router_losses(model, batch["input_ids"], batch["attention_mask"])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, router)[0], rtol=1e-4, atol=1e-6)
    (without,) = torch.autograd.grad(naive_dpo_loss(model, batch, beta=0.3), router)
    assert (gradient - without).norm() > 0.1 * without.norm()


def with_reference(pairs: Dataset) -> Dataset:
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        pairs = pairs.add_column(column, [-20.0] * len(pairs))
    return pairs


def router_biases(model) -> list[torch.Tensor]:
    return [tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("e_score_correction_bias")]


def test_biases_of_routers_follow_the_loads_of_a_step_and_a_resumed_round_goes_on_with_them(
    make_moe, tokenizer, tmp_path, monkeypatch
):
    pairs = with_reference(tokenize_answers(conversations(*PAIRS), tokenizer, 64, "pairs").rows)
    args = DPOTrainingArguments(
        use_cpu=True, max_steps=2, per_device_train_batch_size=3, save_steps=1, logging_steps=1, learning_rate=1e-3
    )

    def fresh():
        names = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 0)
        model = make_moe(vocab_size=len(tokenizer), use_router_bias=True, router_bias_update_rate=0.25, **names)
        model.load_state_dict(start or model.state_dict())
        return model

    start = None
    start = fresh().state_dict()
    model, whole = fresh(), fresh()
    before = router_biases(model)
    batch = RoundTrainer(model=fresh(), args=args, train_dataset=pairs, processing_class=tokenizer).data_collator(
        list(pairs)
    )
    with torch.no_grad():
        selected = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_selected_experts=True
        ).selected_experts
    train_round(whole, tokenizer, pairs, args, tmp_path / "whole", seed=0, name="round 1")

    update = RoundTrainer.update_router_biases

    def stopping(trainer) -> None:
        if trainer.state.global_step == 1:
            raise KeyboardInterrupt
        update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(RoundTrainer, "update_router_biases", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_round(model, tokenizer, pairs, args, tmp_path / "stopped", seed=0, name="round 1")
    real = batch["attention_mask"].flatten().bool()
    for old, new, experts in zip(before, router_biases(model), selected, strict=True):
        loads = experts[real].flatten().bincount(minlength=len(old))[: len(old)].float()
        torch.testing.assert_close(new - old, 0.25 * torch.sign(loads.mean() - loads))
        assert not torch.equal(new, old)
    resumed = fresh()
    train_round(resumed, tokenizer, pairs, args, tmp_path / "stopped", seed=0, name="round 1")
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


def test_a_policy_with_weights_that_are_not_finite_is_no_result(model, tokenizer, tmp_path):
    pairs = with_reference(tokenize_answers(conversations(*PAIRS), tokenizer, 64, "pairs").rows)
    args = DPOTrainingArguments(use_cpu=True, max_steps=1, learning_rate=float("inf"), save_strategy="no")
    with pytest.raises(RunError, match=r"round 1: the weights are not finite after training"):
        train_round(model, tokenizer, pairs, args, tmp_path, seed=0, name="round 1")
