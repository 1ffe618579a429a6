"""Rendering, padding and scoring of conversations: the token that is scored is the conversation's last one."""

import pytest
import torch
from datasets import Dataset
from dense_checkpoints import sample_text
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForSequenceClassification
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.tokenizers import train_tokenizer
from upcycled_moe.preference.scoring import load_reward_model, score_conversations
from upcycled_moe.preference.template import (
    CHATML,
    conversation_ids,
    ending_ids,
    set_chat_template,
    set_padding,
    tokenize_pairs,
)


SHAPE = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "num_labels": 1,
}
EXPERTS = {"num_experts": 4, "shared_expert_intermediate_size": 48, "shared_expert_gating": "complement"}
# Templates whose conversations end with the token that ends texts, and with the answer itself.
ENDS_WITH_EOS = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
ENDS_WITH_ANSWER = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"


def conversation(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]


CONVERSATIONS = [conversation("the " * length, "of 1" * (1 + length % 4)) for length in (9, 1, 30, 4, 17)]


class Warnings(Progress):
    def __init__(self):
        self.messages = []

    def warn(self, message):
        self.messages.append(message)


def qwen_tokenizer(**tokens):
    """As Qwen's: `<|endoftext|>` ends texts and pads; instruct models end turns with `<|im_end|>`."""
    tokenizer = train_tokenizer([sample_text(2000)], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def reward_model(kind, **fields):
    torch.manual_seed(0)
    if kind == "dense":
        return Qwen2ForSequenceClassification(Qwen2Config(**SHAPE, **fields)).eval()
    return UpcycledQwenMoeForSequenceClassification(UpcycledQwenMoeConfig(**SHAPE, **EXPERTS, **fields)).eval()


def naive_score(model, tokens):
    """The head on the last token's hidden state, of a sequence that is alone and has no padding."""
    hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state
    return (hidden[0, -1] @ model.score.weight[0]).item()


@pytest.mark.parametrize("tokens", [{}, {"eos_token": "<|im_end|>"}, {"eos_token": "<|im_end|>", "pad_token": None}])
def test_qwen_pads_with_the_token_that_ends_texts(tokens):
    tokenizer, model = qwen_tokenizer(**tokens), reward_model("dense")
    set_padding(tokenizer, model, "m")

    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in ending_ids(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"
    # It ends with the line break after `<|im_end|>`.
    assert ending_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("Ċ")}


def test_a_token_that_ends_conversations_does_not_pad():
    tokenizer, model = qwen_tokenizer(chat_template=ENDS_WITH_EOS), reward_model("dense")
    set_padding(tokenizer, model, "m")

    assert ending_ids(tokenizer) == {tokenizer.eos_token_id}
    assert tokenizer.pad_token == "<|im_start|>"
    assert tokenizer.pad_token_id == model.config.pad_token_id


def test_where_no_token_is_left_that_is_said():
    tokenizer = train_tokenizer([sample_text(2000)], 320)
    tokenizer.chat_template = ENDS_WITH_EOS
    with pytest.raises(SettingsError, match=r"m: no special token is left to pad with.*'<\|endoftext\|>'"):
        set_padding(tokenizer, reward_model("dense"), "m")


def test_a_missing_template_names_the_way_out_and_a_file_is_taken(tmp_path):
    tokenizer = qwen_tokenizer(chat_template=None)
    with pytest.raises(SettingsError, match=r"no chat template.*chat_template=FILE.*chatml"):
        set_chat_template(tokenizer, None, "m")
    with pytest.raises(SettingsError, match=r"chat_template=gone\.jinja: cannot be read"):
        set_chat_template(tokenizer, "gone.jinja", "m")
    (tmp_path / "t.jinja").write_text(ENDS_WITH_ANSWER)
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"), "m")
    assert tokenizer.decode(conversation_ids(tokenizer, conversation("a", "b"))) == "user: aassistant: b"
    set_chat_template(tokenizer, "chatml", "m")
    assert tokenizer.chat_template == CHATML


def test_a_conversation_that_the_template_refuses_is_one_line():
    tokenizer = qwen_tokenizer(chat_template="{{ raise_exception('no system messages') }}")
    with pytest.raises(SettingsError, match=r"refuses a conversation of system, user .no system messages"):
        conversation_ids(tokenizer, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


@pytest.mark.parametrize("render", [conversation_ids, lambda tokenizer, _: ending_ids(tokenizer)])
def test_a_template_that_renders_nothing_is_one_line(render):
    tokenizer = qwen_tokenizer(chat_template="{# nothing #}")
    with pytest.raises(SettingsError, match=r"refuses a conversation of user, assistant .it renders nothing"):
        render(tokenizer, conversation("a", "b"))


def test_the_token_that_a_configuration_pads_with_is_kept_where_no_conversation_ends_with_it():
    tokenizer, model = qwen_tokenizer(), reward_model("dense")
    for token, kept in (("<|im_start|>", "<|im_start|>"), ("Ċ", "<|endoftext|>")):
        model.config.pad_token_id = tokenizer.convert_tokens_to_ids(token)
        set_padding(tokenizer, model, "m")
        assert tokenizer.convert_ids_to_tokens(model.config.pad_token_id) == tokenizer.pad_token == kept


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_last_token_is_scored_however_it_is_padded(kind):
    tokenizer, model = qwen_tokenizer(), reward_model(kind)
    set_padding(tokenizer, model, "m")
    sequences = [conversation_ids(tokenizer, one) for one in CONVERSATIONS]
    expected = torch.tensor([naive_score(model, tokens) for tokens in sequences])
    assert expected.std() > 0.05

    together = torch.tensor(score_conversations(model, tokenizer, CONVERSATIONS, batch_size=2))
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        padded = model(**batch).logits[:, 0]
        torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_saved_model_scores_the_same_and_pads_with_the_same_token(kind, tmp_path):
    tokenizer, model = qwen_tokenizer(), reward_model(kind)
    set_padding(tokenizer, model, "m")
    expected = score_conversations(model, tokenizer, CONVERSATIONS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_reward_model(str(tmp_path), device="cpu")

    assert not loaded.training
    assert loaded.config.pad_token_id == loaded_tokenizer.pad_token_id == tokenizer.pad_token_id
    assert score_conversations(loaded, loaded_tokenizer, CONVERSATIONS) == pytest.approx(expected, abs=1e-6)
    # As someone without this package would.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=False)
    rendered = [loaded_tokenizer.apply_chat_template(one, tokenize=False) for one in CONVERSATIONS]
    batch = loaded_tokenizer(rendered, return_tensors="pt", padding=True)
    scores = plain.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_a_checkpoint_was_trained_to_pad_with_is_kept(tmp_path):
    tokenizer, model = qwen_tokenizer(), reward_model("dense")
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    assert load_reward_model(str(tmp_path))[1].pad_token == "<|im_start|>"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_labels": 2}, "num_labels=2, but a reward model has num_labels=1"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "names Qwen2ForCausalLM, but a reward model is a …"),
    ],
)
def test_a_checkpoint_that_is_no_reward_model_is_refused(fields, said, tmp_path):
    Qwen2Config(**{**SHAPE, "architectures": ["Qwen2ForSequenceClassification"], **fields}).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=said):
        load_reward_model(str(tmp_path))
    with pytest.raises(SettingsError, match="gone"):
        load_reward_model(str(tmp_path / "gone"))


def test_long_conversations_lose_their_beginning_and_that_is_said():
    tokenizer, model = qwen_tokenizer(), reward_model("dense")
    set_padding(tokenizer, model, "m")
    sequences = [conversation_ids(tokenizer, one) for one in CONVERSATIONS]
    warnings, max_length = Warnings(), sorted(map(len, sequences))[2]
    scores = score_conversations(model, tokenizer, CONVERSATIONS, max_length=max_length, progress=warnings)

    assert scores == pytest.approx([naive_score(model, tokens[-max_length:]) for tokens in sequences], abs=1e-4)
    assert f"2 of 5 conversations are longer than max_length={max_length}" in warnings.messages[0]


def pair(chosen, rejected):
    return {
        "prompt": conversation("Why?"),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": "s",
    }


def test_pairs_become_whole_conversations_and_those_that_are_too_long_are_counted():
    tokenizer, model, warnings = qwen_tokenizer(), reward_model("dense"), Warnings()
    set_padding(tokenizer, model, "m")
    pairs = Dataset.from_list([pair("of 1", "to"), pair("the " * 90, "of")])
    rows, num_too_long, numbers = tokenize_pairs(pairs, tokenizer, 60, "train_data", warnings)

    assert num_too_long == len(warnings.messages) == 1
    assert numbers == (0,)
    assert "1 of 2 pairs are longer than max_length=60" in warnings.messages[0]
    assert rows[0] == {
        "source": "s",
        "chosen_ids": conversation_ids(tokenizer, conversation("Why?", "of 1")),
        "chosen_length": 4,
        "rejected_ids": conversation_ids(tokenizer, conversation("Why?", "to")),
        "rejected_length": 2,
    }
    with pytest.raises(SettingsError, match="all 2 pairs are longer than max_length=3"):
        tokenize_pairs(pairs, tokenizer, 3, "train_data")


def test_an_answer_that_ends_with_the_token_that_pads_is_refused():
    tokenizer, model = qwen_tokenizer(chat_template=ENDS_WITH_ANSWER), reward_model("dense")
    set_padding(tokenizer, model, "m")
    pairs = Dataset.from_list([pair("of<|endoftext|>", "to")])
    with pytest.raises(SettingsError, match=r"a conversation ends with '<\|endoftext\|>', which also pads"):
        tokenize_pairs(pairs, tokenizer, 60, "train_data")
