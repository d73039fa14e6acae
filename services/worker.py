"""Runs inside vLLM's workers: what a swap needs that vLLM does not do by itself (0.32, CPU backend)."""

from __future__ import annotations

from typing import Any


class SwapWorker:
    """Mixed into vLLM's worker (`worker_extension_cls`), whose `model_runner` it uses."""

    model_runner: Any

    def swap_weights(self, weights_path: str) -> None:
        """Replaces the model's weights by those in the folder.

        vLLM's own `reload_weights` passes over an output layer that is tied to the embedding, since the checkpoint has
        no weights of its own for it: on CPUs, where that layer multiplies with a packed copy, it would go on with the
        old weights, silently. So the copy is made anew.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_path=weights_path)
        model = self.model_runner.get_model()
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def keep_seeds(self) -> None:
        """Keeps seeded requests reproducible, and the engine alive, when a prompt is computed in pieces.

        A step that computes only a piece of a prompt samples a token and drops it; vLLM then turns the request's
        generator back by its offset, which CPU generators do not have, and the engine dies. That happens to every
        seeded request that a swap meets, as its prefix is computed anew. Here the generators of such requests sit the
        step out instead, so that there is nothing to turn back.
        """
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        runner = self.model_runner
        sample = runner.sample_tokens

        def sample_tokens(grammar_output: Any) -> Any:
            generators = runner.input_batch.generators
            dropped = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
            resting = {int(i): generators.pop(int(i)) for i in dropped if int(i) in generators}
            try:
                return sample(grammar_output)
            finally:
                generators.update(resting)

        runner.sample_tokens = sample_tokens
