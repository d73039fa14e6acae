"""Runs inside vLLM's workers: what a swap needs that vLLM does not do by itself (0.32)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.staging import StagingWorker

PROBE = "thumbwheel-probe"


class SwapWorker(StagingWorker):
    """Mixed into vLLM's worker (`worker_extension_cls`), whose methods and `model_runner` it uses."""

    execute_model: Any
    sample_tokens: Any

    def swap_weights(self, weights_path: str) -> None:
        """Replaces the model's weights by those in the folder, in place.

        vLLM's own `reload_weights` passes over an output layer that is tied to the embedding, since the checkpoint has
        no weights of its own for it: on CPUs, where that layer multiplies with a packed copy, it would go on with the
        old weights, silently. So the copy is made anew.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self._forget_unfinished_load()
        self.model_runner.reload_weights(weights_path=weights_path)
        model = self.model_runner.get_model()
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def _forget_unfinished_load(self) -> None:
        """Puts back what a load that failed midway has left.

        vLLM collects the weights of a layer until it has them all. A load that failed leaves layers with some, which
        the next load would count as its own: it would mix weights of two versions, silently.
        """
        from vllm.model_executor.model_loader.reload import layerwise

        for layer in self.model_runner.get_model().modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                if info.kernel_tensors is not None:
                    layerwise._place_kernel_tensors(layer, info)
                info.reset()
        layerwise.LOADING_LAYERS.clear()

    def probe_logprobs(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Log-probability of every token of `continuation` after `prompt`, by the weights as they are now.

        Runs one step of the engine's own path (embedding, packed layers, attention with KV cache, output layer) while
        the scheduler is paused. The KV cache must be empty: the step writes into blocks that nobody has. Empty on
        workers that compute no logits.
        """
        from vllm import SamplingParams

        tokens = [*prompt, *continuation]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        output = self._run_alone(tokens, sampling_params=params, pooling_params=None)
        found = (output.prompt_logprobs_dict or {}).get(PROBE) if output is not None else None
        if found is None:
            return []
        # Row i is about token i + 1, and its first column is the token that was given.
        logprobs: list[float] = found.logprobs[len(prompt) - 1 :, 0].float().tolist()
        return logprobs

    def probe_score(self, tokens: Sequence[int]) -> list[float]:
        """[1] A reward model's score of `tokens`, by its first head and the weights as they are now; otherwise as
        `probe_logprobs`.
        """
        from vllm import PoolingParams

        params = PoolingParams(task="classify", use_activation=False)
        params.verify(self.model_runner.model_config)
        output = self._run_alone(tokens, sampling_params=None, pooling_params=params)
        if output is None or not output.pooler_output:
            return []
        return [float(output.pooler_output[0].float().flatten()[0])]

    def _run_alone(self, tokens: Sequence[int], **params: Any) -> Any:
        """One step with one request in it, and its traces removed. What the model runner answers, or None."""
        from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

        blocks, free = [], 1  # block 0 is the one that vLLM never uses
        for group in self.model_runner.kv_cache_config.kv_cache_groups:
            # One more than the tokens need, since a token is sampled at the end.
            count = len(tokens) // group.kv_cache_spec.block_size + 1
            blocks.append(list(range(free, free + count)))
            free += count
        step, after = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
        step.scheduled_new_reqs = [
            NewRequestData(
                req_id=PROBE,
                prompt_token_ids=list(tokens),
                prefill_token_ids=list(tokens),
                mm_features=[],
                block_ids=tuple(blocks),
                num_computed_tokens=0,
                lora_request=None,
                **params,
            )
        ]
        step.num_scheduled_tokens = {PROBE: len(tokens)}
        step.total_num_scheduled_tokens = len(tokens)
        after.finished_req_ids = {PROBE}
        try:
            output = self.execute_model(step)
            if output is None:
                output = self.sample_tokens(None)
            # A GPU's output comes as a promise.
            return output.get_output() if hasattr(output, "get_output") else output
        finally:
            self.execute_model(after)

    def prepare(self) -> None:
        """What is done once, before the first request."""
        from vllm.platforms import current_platform

        from services import executor, sampler

        if current_platform.is_cpu():
            executor.adapt()
            self._keep_seeds()
            sampler.install(self.model_runner)

    def _keep_seeds(self) -> None:
        """Keeps seeded requests reproducible, and the engine alive, when a prompt is computed in pieces.

        A step that computes only a piece of a prompt samples a token and drops it; vLLM then turns the request's
        generator back by its offset, which CPU generators do not have, and the engine dies. That happens to every
        seeded request that a swap meets, as its prefix is computed anew. Here the generators of such requests sit the
        step out instead, so that there is nothing to turn back.
        """
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
