"""Selections of two moments are compared token by token, and kept on disk whole."""

import pytest
import torch
from training_runs import SHAPE

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from upcycled_moe.common.blocks import collate_blocks
from upcycled_moe.common.packing import BlockPacker
from upcycled_moe.common.routing import selection_overlap
from upcycled_moe.train.monitoring.probes import (
    ProbeFolder,
    probe_text,
    saturation,
    select_experts,
)


NUM_EXPERTS = 6


def test_overlap_is_that_of_sets():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.rand(2, 50, NUM_EXPERTS, generator=generator).argsort(dim=-1)[..., :3].to(torch.uint8) for _ in range(2)
    )
    # Empty slots.
    first[0, :5, 1:] = NUM_EXPERTS
    second[0, 3:8] = NUM_EXPERTS
    first[0, 7] = NUM_EXPERTS
    expected = []
    for one_layer, other_layer in zip(first.tolist(), second.tolist(), strict=True):
        shares = []
        for one, other in zip(one_layer, other_layer, strict=True):
            one, other = set(one) - {NUM_EXPERTS}, set(other) - {NUM_EXPERTS}
            shares.append(len(one & other) / max(len(one), len(other)) if one or other else 1.0)
        expected.append(sum(shares) / len(shares))
    assert selection_overlap(first, second, NUM_EXPERTS).tolist() == pytest.approx(expected)


def test_order_does_not_count():
    selected = torch.tensor([[[0, 1], [2, 3]]])
    assert selection_overlap(selected, selected.flip(-1), NUM_EXPERTS).tolist() == [1.0]


def test_text_is_as_long_as_asked():
    blocks = [{"input_ids": [number] * 8, "labels": [0] * 8} for number in range(5)]
    assert {name: ids.tolist() for name, ids in probe_text(blocks, 3).items()} == {"input_ids": [[0, 0, 0]]}
    for num_tokens, num_blocks in ((8, 1), (17, 3), (1000, 5)):
        assert probe_text(blocks, num_tokens)["input_ids"].shape == (num_blocks, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UpcycledQwenMoeForCausalLM(UpcycledQwenMoeConfig(**SHAPE, num_experts=NUM_EXPERTS)).train()


@pytest.mark.parametrize("document_mask", [True, False])
def test_selections_are_those_of_the_packed_batch_in_training(model, tmp_path, document_mask):
    generator = torch.Generator().manual_seed(0)
    packer = BlockPacker(64, document_mask)
    documents = [torch.randint(1, 384, (length,), generator=generator).tolist() for length in (5, 70, 9, 20, 33, 60)]
    blocks = [block for document in documents for block, _ in packer.add(document)]
    assert len(blocks) == 3
    folder = ProbeFolder(tmp_path)
    folder.write_text(probe_text(blocks, 3 * 64))
    selected = select_experts(model, folder.read_text(), 2, "cpu")

    batch = collate_blocks(blocks)
    assert ("position_ids" in batch) == document_mask
    with torch.no_grad():
        expected = model(**batch, output_router_logits=True, use_cache=False).selected_experts
    assert torch.equal(selected, torch.stack(expected).to(selected.dtype))
    assert model.training


def test_batches_are_those_of_the_collator_of_training(model):
    """Flash attention takes the bounds of documents from it."""
    batches = []

    def collate(blocks):
        batches.append(collate_blocks(blocks))
        return batches[-1]

    blocks = [{"input_ids": [number + 1] * 4, "position_ids": [0, 1, 0, 1]} for number in range(3)]
    select_experts(model, probe_text(blocks, 12), 2, "cpu", collate)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert all(batch["position_ids"].tolist()[0] == [0, 1, 0, 1] for batch in batches)


def test_folder_keeps_probes_and_forgets_those_after_a_step(tmp_path):
    folder = ProbeFolder(tmp_path)
    assert folder.read_text() is None
    assert folder.steps() == []
    text = {"input_ids": torch.arange(8).view(2, 4), "position_ids": torch.zeros(2, 4, dtype=torch.long)}
    folder.write_text(text)
    selections = {
        step: torch.tensor([[[number, number + 3]] * 8], dtype=torch.uint8) for number, step in enumerate((0, 20, 100))
    }
    for step, selected in selections.items():
        folder.write(step, selected)
    assert folder.steps() == [0, 20, 100]
    assert torch.equal(folder.read(20), selections[20])
    assert {name: ids.tolist() for name, ids in folder.read_text().items()} == {
        name: ids.tolist() for name, ids in text.items()
    }
    steps, values = saturation(folder, selections[20], NUM_EXPERTS)
    assert steps == [0, 20, 100]
    assert values.tolist() == [[0.0], [1.0], [0.0]]

    folder.cut(20)
    assert folder.steps() == [0, 20]
    folder.cut(0)
    assert folder.steps() == []
    assert folder.read_text() is None


def test_a_probe_that_cannot_be_written_leaves_nothing(tmp_path):
    folder = ProbeFolder(tmp_path)
    (folder.folder / "step-00000007.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match="step-00000007"):
        folder.write(7, torch.zeros(1, 1, 1, dtype=torch.uint8))
    assert [path.name for path in folder.folder.iterdir()] == ["step-00000007.safetensors"]
