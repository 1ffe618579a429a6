import pytest
import torch


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random tokens [2, 48], longer than the sliding window."""
    return torch.randint(1, 320, (2, 48), generator=torch.Generator().manual_seed(1))
