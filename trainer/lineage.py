"""What a version says of where it comes from, and by what servers know it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thumbwheel.v1.rollout_pb2 import Lineage, ModelRole, Probe
from trainer import feed, publish
from trainer.config import TaskName, TrainerSettings
from trainer.samples import Sample
from trainer.state import State, ranges

if TYPE_CHECKING:
    from trainer.losses.mixture import Mixture
    from trainer.team import Team

_SETTINGS = (
    *("epochs", "batch_size", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "max_length", "micro_batch_tokens", "seed", "zero_stage", "lora_rank", "lora_alpha"),
)
"""Those that every objective learns by."""


def of(
    objective: Mixture,
    settings: TrainerSettings,
    task: TaskName,
    before: State,
    after: State,
    samples: Sequence[Sample],
    reference: str,
) -> Lineage:
    """How a round came from the state before to the one after it, by these samples."""
    general = {name: str(getattr(settings, name)) for name in _SETTINGS}
    return Lineage(
        objective=objective.name,
        settings=objective.settings() | general | {"learning_rate": repr(settings.learning_rate(task))},
        offsets=ranges(before, after),
        sample_count=len(samples),
        reference_version=reference if objective.needs_reference else "",
        reward_version=feed.reward_version(samples),
        code_version=publish.code_version(),
        steps=after.steps,
    )


def probe(team: Team, tokenizer: Any, role: ModelRole.ValueType) -> Probe:
    """What the model that has just learnt says of a fixed text: servers check it after a swap."""
    if role == ModelRole.MODEL_ROLE_POLICY:
        prompt, continuation = publish.probe_tokens(tokenizer)
        return Probe(prompt_token_ids=prompt, token_ids=continuation, logprobs=team.probe(prompt, continuation))
    prompt, response = publish.scored_probe_tokens(tokenizer)
    score = team.probe_score([*prompt, *response])
    return Probe(prompt_token_ids=prompt, token_ids=response, score=score)
