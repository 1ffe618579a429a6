"""Selections of two moments are compared token by token, and kept on disk whole."""

import pytest
import torch

from upcycled_moe.train.monitoring.probes import ProbeFolder, probe_text, saturation, selection_overlap


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
    blocks = [[number] * 8 for number in range(5)]
    assert probe_text(blocks, 3).tolist() == [[0, 0, 0]]
    assert probe_text(blocks, 8).shape == (1, 8)
    assert probe_text(blocks, 17).shape == (3, 8)
    assert probe_text(blocks, 1000).shape == (5, 8)


def test_folder_keeps_probes_and_forgets_those_after_a_step(tmp_path):
    folder = ProbeFolder(tmp_path)
    assert folder.read_text() is None
    assert folder.steps() == []
    folder.write_text(torch.arange(8).view(2, 4))
    selections = {
        step: torch.tensor([[[number, number + 3]] * 8], dtype=torch.uint8) for number, step in enumerate((0, 20, 100))
    }
    for step, selected in selections.items():
        folder.write(step, selected)
    assert folder.steps() == [0, 20, 100]
    assert torch.equal(folder.read(20), selections[20])
    assert torch.equal(folder.read_text(), torch.arange(8).view(2, 4))
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
