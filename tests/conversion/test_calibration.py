import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.calibration import calibrate, calibration_blocks
from upcycled_moe.conversion.source import open_source


FAMILIES = ["qwen2", "qwen2-sliding", "qwen1.5", "qwen3"]
# What the fast kernels and the loops below round differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(source, blocks, layers, *, attended=True, batch_size=3, **arguments):
    device = torch.device("cpu")
    return list(
        calibrate(source, blocks, layers, attended=attended, batch_size=batch_size, device=device, **arguments)
    )


@torch.no_grad()
def naive_calibration(folder, blocks):
    """Return mean keys [n, h], attended keys [n, h] and FFN inputs [T, H] of each layer, from the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    seen = {}
    for layer_idx, layer in enumerate(model.model.layers):
        key_module = layer.self_attn.k_norm if config.model_type == "qwen3" else layer.self_attn.k_proj
        modules = {"keys": key_module, "ffn_inputs": layer.post_attention_layernorm}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda _, __, output, key=(name, layer_idx): seen.update({key: output}),
            )
    attentions = model(blocks, output_attentions=True).attentions
    num_sequences, length = blocks.shape
    layers = []
    for layer_idx in range(config.num_hidden_layers):
        keys = seen["keys", layer_idx].reshape(num_sequences, length, kv_heads, -1).double()
        mean = torch.zeros(heads, keys.shape[-1], dtype=torch.float64)
        attended = torch.zeros_like(mean)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            for sequence in range(num_sequences):
                for position in range(length):
                    mean[head] += keys[sequence, position, kv_head]
                    for other in range(position + 1):
                        weight = attentions[layer_idx][sequence, head, position, other].double()
                        attended[head] += weight * keys[sequence, other, kv_head]
        num_tokens = num_sequences * length
        layers.append((mean / num_tokens, attended / num_tokens, seen["ffn_inputs", layer_idx].flatten(0, 1)))
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_inputs_are_those_of_the_whole_model(dense, family):
    folder = dense(family)
    # 24 tokens are more than the sliding window; 3 sequences make batches of 2 and 1.
    blocks = torch.randint(1, 320, (3, 24), generator=torch.Generator().manual_seed(0))
    layers = run(open_source(str(folder)), blocks, [0, 1, 2], batch_size=2)
    for layer, (mean_keys, attended_keys, ffn_inputs) in zip(layers, naive_calibration(folder, blocks), strict=True):
        torch.testing.assert_close(layer.mean_keys, mean_keys, **CLOSE)
        torch.testing.assert_close(layer.attended_keys, attended_keys, **CLOSE)
        torch.testing.assert_close(torch.cat(layer.ffn_inputs), ffn_inputs, **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_domains_have_means_of_their_own(dense, batch_size):
    """Six sequences of three domains, two each; batches need not end where domains do."""
    folder = dense("qwen3")
    blocks = torch.randint(1, 320, (6, 24), generator=torch.Generator().manual_seed(0))
    layers = run(open_source(str(folder)), blocks, [0, 2], batch_size=batch_size, num_domains=3)
    expected = [layer for number, layer in enumerate(naive_calibration(folder, blocks)) if number != 1]
    for layer, (_, _, ffn_inputs) in zip(layers, expected, strict=True):
        assert layer.domain_means.shape == (3, 64)
        for domain in range(3):
            total = torch.zeros(64, dtype=torch.float64)
            for token in ffn_inputs[domain * 48 : (domain + 1) * 48]:
                total += token.double()
            torch.testing.assert_close(layer.domain_means[domain], total / 48, **CLOSE)
    assert all(layer.domain_means is None for layer in run(open_source(str(folder)), blocks, [0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliding_window_and_the_groups_matter_here(dense, family):
    """The comparison above would be empty if all heads attended alike, or all keys were one."""
    blocks = torch.randint(1, 320, (3, 24), generator=torch.Generator().manual_seed(0))
    for layer in run(open_source(str(dense(family))), blocks, [0, 1, 2]):
        assert torch.pdist(layer.attended_keys).min() > 1e-3
        assert (layer.mean_keys - layer.attended_keys).norm() > 1e-2
        # Grouped-query attention: heads that share a key-value head have one mean key.
        same = torch.equal(layer.mean_keys[0], layer.mean_keys[1])
        assert same == (family != "qwen1.5")


def test_layers_above_the_last_one_asked_for_do_not_run(dense):
    source = open_source(str(dense()))
    blocks = torch.randint(1, 320, (4, 16), generator=torch.Generator().manual_seed(0))
    advances = []
    layers = calibrate(
        source,
        blocks,
        [1],
        attended=False,
        batch_size=2,
        device=torch.device("cpu"),
        on_layer=lambda: advances.append(1),
    )
    (layer,) = layers
    assert layer.layer == 1
    assert layer.attended_keys is None
    assert len(advances) == 2
    torch.testing.assert_close(layer.mean_keys, run(source, blocks, [0, 1, 2])[1].mean_keys, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_near(dense, dtype):
    blocks = torch.randint(1, 320, (3, 24), generator=torch.Generator().manual_seed(0))
    exact = run(open_source(str(dense("qwen3"))), blocks, [0, 1, 2])
    rounded = run(open_source(str(dense("qwen3", dtype=dtype))), blocks, [0, 1, 2])
    for one, other in zip(exact, rounded, strict=True):
        assert torch.nn.functional.cosine_similarity(one.attended_keys, other.attended_keys).min() > 0.999


def test_blocks_are_the_packed_text(dense, mixture_recipe, text_file):
    folder = dense()
    blocks = calibration_blocks(open_source(str(folder)), mixture_recipe())
    assert blocks.shape == (8, 64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoded = tokenizer.decode(blocks.flatten())
    assert len(decoded) > 1000
    assert text_file.read_text(encoding="utf-8").startswith(decoded)


def test_too_little_text_is_refused(dense, mixture_recipe):
    with pytest.raises(SettingsError, match=r"calibration_tokens=1000000 asks for more; lower it or give more text"):
        calibration_blocks(open_source(str(dense())), mixture_recipe(calibration_tokens=1_000_000))


def test_every_domain_has_as_many_blocks(dense, mixture_recipe, text_file, tmp_path):
    for name, word in (("one", "alpha "), ("two", "beta ")):
        (tmp_path / f"{name}.txt").write_text(word * 2000, encoding="utf-8")
    domains = [str(tmp_path / "one.txt"), str(text_file), str(tmp_path / "two.txt")]
    recipe = mixture_recipe(router="domain", num_experts=6, calibration_data=domains)
    folder = dense()
    blocks = calibration_blocks(open_source(str(folder)), recipe)
    # 8 blocks are not a multiple of 3 domains: 2 of each.
    assert blocks.shape == (6, 64)
    assert (recipe.num_calibration_blocks, recipe.num_calibrated_tokens) == (6, 384)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, domain in enumerate(domains):
        text = tokenizer.decode(blocks[2 * number : 2 * number + 2].flatten())
        assert Path(domain).read_text(encoding="utf-8").startswith(text)


def test_a_domain_with_too_little_text_is_named(dense, mixture_recipe, text_file, tmp_path):
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    recipe = mixture_recipe(router="domain", calibration_data=[str(text_file), str(tmp_path / "short.txt")])
    with pytest.raises(SettingsError) as error:
        calibration_blocks(open_source(str(dense())), recipe)
    assert str(error.value) == (
        f"calibration_data, domain '{tmp_path / 'short.txt'}', has 0 tokens in whole sequences, "
        "calibration_tokens=512 in equal parts from 2 domains asks for more; lower it or give more text."
    )


def test_a_tokenizer_of_another_model_is_refused(dense, mixture_recipe):
    source = open_source(str(dense(vocab_size=100)))
    with pytest.raises(SettingsError, match=r"its tokenizer gives token \d+, the model's vocab_size is 100"):
        calibration_blocks(source, mixture_recipe())


def test_a_broken_tokenizer_is_refused(dense, mixture_recipe, tmp_path):
    folder = shutil.copytree(dense(), tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SettingsError, match="its tokenizer cannot be loaded"):
        calibration_blocks(open_source(str(folder)), mixture_recipe())
