"""One rank, or a clear error."""

from __future__ import annotations

import pytest

from thumbwheel import errors
from trainer import runtime


def test_more_than_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(errors.FailedPrecondition, match=r"WORLD_SIZE is 2.*--nproc-per-node 1"):
        runtime.prepare(threads=0)


@pytest.mark.usefixtures("one_rank")
def test_the_process_is_a_group_of_one_and_deterministic() -> None:
    import torch

    assert torch.distributed.get_world_size() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 2
