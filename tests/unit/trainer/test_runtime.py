"""What a process is set up for."""

from __future__ import annotations

import os

import pytest

from trainer import runtime


@pytest.mark.usefixtures("one_rank")
def test_the_process_is_a_group_of_one_and_deterministic() -> None:
    import torch

    assert torch.distributed.get_world_size() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("one_rank")
def test_on_a_gpu_as_well_a_kernel_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning alone, attention on a GPU takes one whose gradients differ from run to run."""
    import torch

    monkeypatch.setattr(runtime, "choose_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    runtime.prepare(2)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 1024), ("cuda", 4096)])
def test_a_pass_takes_the_tokens_that_suit_the_device_unless_told(
    device: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(runtime, "device", lambda: torch.device(device))
    assert [runtime.pass_tokens(0), runtime.pass_tokens(77)] == [tokens, 77]


@pytest.mark.parametrize(("beside_servers", "spins"), [(False, None), (True, "0")])
def test_only_beside_servers_do_waiting_threads_sleep_at_once(
    monkeypatch: pytest.MonkeyPatch, *, beside_servers: bool, spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {})
    runtime.before_imports(beside_servers=beside_servers)
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize(("rank", "cores"), [("0", {4, 5}), ("1", {6, 7, 9})])
def test_ranks_of_a_machine_stay_on_cores_of_their_own(
    rank: str, cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[set[int]] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 9})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, mine: taken.append(set(mine)))
    assert runtime._threads(0, on_gpu=False) == len(cores)
    assert runtime._threads(1, on_gpu=False) == 1
    assert taken == [cores, cores]
