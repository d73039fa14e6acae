"""What a version says of where it comes from, and by what servers know it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thumbwheel.v1.rollout_pb2 import CheckpointManifest, Lineage, ModelRole, Probe
from trainer import feed, publish, runtime
from trainer.config import TaskName, TrainerSettings
from trainer.samples import Sample
from trainer.staleness import sequence as version_number
from trainer.state import State, ranges

if TYPE_CHECKING:
    from trainer.losses.mixture import Mixture
    from trainer.team import Team

_SETTINGS = (
    *(
        "epochs",
        "batch_size",
        "warmup_steps",
        "learning_rate_decay",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
    ),
    *("max_grad_norm", "max_length", "seed", "zero_stage", "lora_rank", "lora_alpha"),
    "voting_propensity",
)
"""Those that are not an objective's own."""


def manifest(
    objective: Mixture,
    settings: TrainerSettings,
    task: TaskName,
    *,
    before: State,
    after: State,
    samples: Sequence[Sample],
    samples_sha256: str,
    retracted: Sequence[str],
    base: CheckpointManifest,
    measured: Mapping[str, float],
    probe: Probe,
) -> CheckpointManifest:
    """The manifest, but for its files and signature, of the version that a round made: it led from the state `before`
    to the one `after` it, by these samples. `retracted` are those that were learnt earlier and have been taken back
    since.
    """
    general = {name: str(getattr(settings, name)) for name in _SETTINGS}
    general["micro_batch_tokens"] = str(runtime.pass_tokens(settings.micro_batch_tokens))
    lineage = Lineage(
        objective=objective.name,
        settings=objective.settings() | general | {"learning_rate": repr(settings.learning_rate(task))},
        offsets=ranges(before, after),
        sample_count=len(samples),
        samples_sha256=samples_sha256,
        retracted_sample_ids=retracted,
        reference_version=base.version if objective.needs_reference else "",
        reward_version=feed.reward_version(samples),
        code_version=publish.code_version(),
        steps=after.steps,
    )
    made = CheckpointManifest(
        version=after.version,
        role=objective.role,
        sequence=version_number(after.version),
        parent=before.version,
        base_model=base.base_model,
        lineage=lineage,
        metrics=measured,
        probes=[probe],
    )
    made.created_at.GetCurrentTime()
    return made


def probe(team: Team, tokenizer: Any, role: ModelRole.ValueType) -> Probe:
    """What the model that has just learnt says of a fixed text: servers check it after a swap."""
    if role == ModelRole.MODEL_ROLE_POLICY:
        prompt, continuation = publish.probe_tokens(tokenizer)
        return Probe(prompt_token_ids=prompt, token_ids=continuation, logprobs=team.probe(prompt, continuation))
    prompt, response = publish.scored_probe_tokens(tokenizer)
    score = team.probe_score([*prompt, *response])
    return Probe(prompt_token_ids=prompt, token_ids=response, score=score)
