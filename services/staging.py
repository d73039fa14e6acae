"""Runs inside vLLM's workers: a version's weights are made ready beside those in use, and put in their place at once.

    load       a second set of the model's weights: read, and packed as the processor multiplies them, by a thread on
               the cores that the engine leaves free
    exchange   the two sets change places; once more, and they are back

So requests rest for the exchange, and not while weights are read and packed, and the way back from a swap that fails is
as quick, and exact. It takes the memory of a second set of weights, and is for CPUs: on GPUs captured graphs hold the
addresses of the weights, so they are replaced in place (`services.worker.SwapWorker.swap_weights`).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import nn

_SWITCH_SECONDS = 0.0002
"""How long this thread may keep the interpreter while the engine's waits for it, which it does at each operation."""
_KEPT = {"_modules"}
_ABSENT: Any = object()


class Staged:
    """A second set of the weights of `model`, of the version in `folder`, filled by a thread of its own."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._live, self._folder = model, folder
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._given_up = False
        self._thread = futures.ThreadPoolExecutor(1, "staging", initializer=_leave_the_engine_s_cores)
        self._loading = self._thread.submit(self._load)
        self._thread.shutdown(wait=False)

    def ready(self) -> bool:
        """Whether all is loaded. Raises what went wrong, where something did."""
        if not self._loading.done():
            return False
        self._loading.result()
        return True

    def give_up(self) -> None:
        """Stops loading, and waits until it has."""
        self._given_up = True
        futures.wait([self._loading])

    @torch.no_grad()
    def _load(self) -> None:
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            beside = self._beside(self._live, {}, {})
            missing = {name for name, _ in beside.named_parameters()}
            missing -= beside.load_weights(self._weights())  # type: ignore[operator]  # every model of vLLM's has it
            if missing:
                raise ValueError(f"{len(missing)} weights are in no file, such as {min(missing)}.")
            for _, module in self._pairs:
                if self._given_up:
                    _stop()
                if module._parameters and isinstance(
                    method := getattr(module, "quant_method", None), QuantizeMethodBase
                ):
                    method.process_weights_after_loading(module)
        finally:
            sys.setswitchinterval(before)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path in sorted(self._folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    if self._given_up:
                        _stop()
                    yield name, file.get_tensor(name)

    def exchange(self) -> None:
        """Puts the weights made ready in the place of those in use, and those here."""
        assert self.ready(), "loaded first"
        for live, beside in self._pairs:
            mine, its = live.__dict__, beside.__dict__
            differ = [name for name in mine.keys() | its.keys() if mine.get(name) is not its.get(name)]
            for name in set(differ) - _KEPT:
                values = mine.pop(name, _ABSENT), its.pop(name, _ABSENT)
                for where, value in zip((its, mine), values, strict=True):
                    if value is not _ABSENT:
                        where[name] = value

    def _beside(self, live: nn.Module, made: dict[int, nn.Parameter], modules: dict[int, nn.Module]) -> nn.Module:
        """A module like `live`, with all beneath it, that shares everything with it but its weights. What is in two
        places there is so here: `made` and `modules` have what is beside, by the identity of what is in use.
        """
        from vllm.model_executor.model_loader.reload import layerwise, meta, sanitize

        if id(live) in modules:
            return modules[id(live)]
        beside = modules[id(live)] = copy.copy(live)
        self._pairs.append((live, beside))
        described = layerwise.get_layerwise_info(live).restore_metadata[0]  # as the files have them, not as packed
        beside._parameters = {}
        for name, held in live._parameters.items():
            if held is not None and id(held) not in made:
                like = described.get(name)
                if like is None:
                    fresh = torch.empty_like(held.data)
                    fresh.__class__, fresh.__dict__ = held.__class__, held.__dict__.copy()
                else:
                    fresh = sanitize.restore_layer_refs(meta.materialize_meta_tensor(like), live)
                    if hasattr(fresh, "weight_loader"):
                        # A reload in place has left its own there, which does nothing outside of one.
                        fresh.weight_loader = layerwise._get_original_loader(fresh)
                made[id(held)] = fresh  # type: ignore[assignment]  # it is one, by its class
            beside._parameters[name] = None if held is None else made[id(held)]
        own = live._non_persistent_buffers_set
        beside._buffers = {
            name: held if held is None or name in own else held.clone() for name, held in live._buffers.items()
        }
        beside._modules = {
            name: None if child is None else self._beside(child, made, modules) for name, child in live._modules.items()
        }
        return beside


def _stop() -> NoReturn:
    raise RuntimeError("It was given up.")


def _leave_the_engine_s_cores() -> None:
    """Moves this thread to the cores that the engine does not compute on, where there are such."""
    engine_s, all_there_are = os.sched_getaffinity(os.getpid()), set(range(os.cpu_count() or 1))
    os.sched_setaffinity(0, all_there_are - engine_s or engine_s)


class StagingWorker:
    """Mixed into vLLM's worker, by way of `services.worker.SwapWorker`."""

    model_runner: Any
    _staged: Staged | None = None

    def stage(self, weights_path: str) -> bool:
        """Begins to make a version ready. False where that cannot be done here."""
        from vllm.platforms import current_platform

        self.end_staging()
        if current_platform.is_cpu():
            self._staged = Staged(self.model_runner.get_model(), Path(weights_path))
        return self._staged is not None

    def staged(self) -> bool:
        """Whether it is ready. Raises what vLLM raises where the weights do not fit."""
        assert self._staged is not None, "stage comes first"
        return self._staged.ready()

    def exchange_weights(self) -> None:
        """What was made ready is in use from here on; called once more, what was in use before."""
        assert self._staged is not None, "stage comes first"
        self._staged.exchange()

    def end_staging(self) -> None:
        """Lets go of what is not in use."""
        if self._staged is not None:
            self._staged.give_up()
        self._staged = None
