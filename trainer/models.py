"""What is asked of a model: log-probabilities of responses, or scores. Any decoder of Transformers will do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thumbwheel import errors
from trainer import kernels
from trainer.batch import Batch

LOGIT_ROWS = 256
"""Response positions whose logits exist at a time: a vocabulary of 49,152 takes 48 MiB of fp32 for them."""

_UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def load_causal(path: Path) -> Any:
    """The causal language model in `path`, in bf16, in training mode, without dropout. Raises
    `errors.FailedPrecondition` for an architecture whose logits are more than a matrix product.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.bfloat16, attn_implementation=kernels.register()
    )
    for name in _UNSUPPORTED:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise errors.FailedPrecondition(
                f"{path}: {type(model).__name__} changes its logits by {name}, which is not supported.",
                remedy="Choose a base model without it, such as one of the Llama or Qwen families.",
            )
    return _ready(model.train())


def load_scorer(path: Path) -> Any:
    """The reward model in `path`, in bf16, in training mode, without dropout. Raises `errors.FailedPrecondition`."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        str(path), dtype=torch.bfloat16, attn_implementation=kernels.register()
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.score.bias is not None:
        raise errors.FailedPrecondition(
            f"{path}: {type(model).__name__} is no reward model.",
            remedy="It needs a linear layer called `score`, without bias.",
        )
    return _ready(model.train())


def new_scorer(path: Path) -> Any:
    """As `load_scorer`, of the body of the model in `path` with one scoring head of zeros, which has no opinion."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        str(path), num_labels=1, dtype=torch.bfloat16, attn_implementation=kernels.register()
    )
    torch.nn.init.zeros_(model.score.weight)
    return _ready(model.train())


def _ready(model: Any) -> Any:
    # The ratio to the reference would be noise; and samples are few, so there is nothing to regularise.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    kernels.adopt(model)
    return model


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """[B·L, H] outputs of the last layer."""
    output = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)


def response_token_logprobs(model: Any, batch: Batch) -> Tensor:
    """[N] log-probabilities of the response tokens, in float32. Logits exist for them only, and not all at once."""
    head = model.get_output_embeddings()
    return token_logprobs(head, hidden_states(model, batch)[batch.predictors], batch.targets)


def response_logprobs(model: Any, batch: Batch) -> Tensor:
    """[S] log-probabilities of the responses, in float32."""
    return batch.sums(response_token_logprobs(model, batch))


def token_logprobs(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] log-probabilities, in float32, of the tokens `targets` [N] given the last layer's outputs `hidden` [N, H]."""
    plain = type(head) is torch.nn.Linear and getattr(head, "bias", None) is None
    if plain and not hasattr(head.weight, "ds_id"):
        return kernels.token_logprobs(hidden, head.weight, targets, rows=LOGIT_ROWS)
    # A head of another kind, or one whose weights are on other ranks until it is called.
    parts = [
        checkpoint(_logprobs, head, rows, tokens, use_reentrant=False)
        for rows, tokens in zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _logprobs(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    chosen: Tensor = logits.gather(1, targets[:, None]).squeeze(1)
    normaliser: Tensor = logits.logsumexp(1)
    return chosen - normaliser


def last_hidden(model: Any, batch: Batch) -> Tensor:
    """[S, H] outputs of the last layer at the last token of every sequence, where a reward model's heads read."""
    return hidden_states(model, batch)[batch.last_tokens]


def head_scores(model: Any, batch: Batch) -> Tensor:
    """[S, K] scores by all K heads at the last token of every sequence."""
    output: Tensor = model.score(last_hidden(model, batch))
    return output


def scores(model: Any, batch: Batch) -> Tensor:
    """[S] scores by the first head, in float32."""
    return head_scores(model, batch)[:, 0].float()


def values(critic: Any, batch: Batch) -> Tensor:
    """[N] a critic's values, in float32, of the states in which the response tokens were chosen."""
    output: Tensor = critic.score(hidden_states(critic, batch)[batch.predictors])
    return output[:, 0].float()


_POLICY, _CRITIC = "policy.", "critic."


def policy_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of an `ActorCritic`, those of the policy, under the policy's own names; others as they are."""
    return {name.removeprefix(_POLICY): value for name, value in weights.items() if not name.startswith(_CRITIC)}


class ActorCritic(torch.nn.Module):
    """A policy and a critic that learn together. To everything that asks for log-probabilities it is the policy."""

    def __init__(self, policy: Any, critic: Any) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    @property
    def base_model(self) -> Any:
        """The policy's body."""
        return self.policy.base_model

    def get_output_embeddings(self) -> Any:
        """The policy's head."""
        return self.policy.get_output_embeddings()

    def save_pretrained(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes the policy; the critic stays in training checkpoints."""
        self.policy.save_pretrained(folder, state_dict=None if state_dict is None else policy_weights(state_dict))

    def gradient_checkpointing_enable(self, arguments: dict[str, Any]) -> None:
        """Of both."""
        for model in (self.policy, self.critic):
            model.gradient_checkpointing_enable(arguments)

    def gradient_checkpointing_disable(self) -> None:
        """Of both."""
        for model in (self.policy, self.critic):
            model.gradient_checkpointing_disable()


@torch.no_grad()
def continuation_logprobs(model: Any, prompt: Iterable[int], continuation: Iterable[int]) -> list[float]:
    """Log-probability of every token of `continuation` after `prompt`, computed as one plain sequence."""
    prompt, continuation = list(prompt), list(continuation)
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + continuation], device=device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    logprobs: list[float] = token_logprobs(
        model.get_output_embeddings(), hidden, torch.tensor(continuation, device=device)
    ).tolist()
    return logprobs


@torch.no_grad()
def sequence_score(model: Any, tokens: Iterable[int]) -> float:
    """A reward model's score at the last of `tokens`, by its first head, computed as one plain sequence."""
    ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    return float(model.score(hidden)[0].float().item())
