"""What the trainer measures; every metric by task."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from thumbwheel import tracing

if TYPE_CHECKING:
    from trainer.reward.watch import RewardWatch

logger = logging.getLogger(__name__)

LOSS = Gauge("thumbwheel_trainer_loss", "Loss of the last step.", ["task"])
MEASURE = Gauge(
    "thumbwheel_trainer_measure",
    "What the objective measured at the last step: margin, accuracy, rewards, KL, clip fraction and the like.",
    ["task", "measure"],
)
GRAD_NORM = Gauge("thumbwheel_trainer_grad_norm", "Norm of the gradient before clipping, last step.", ["task"])
LEARNT = Counter("thumbwheel_trainer_samples_learnt_total", "Samples learnt from.", ["task"])
PENDING = Gauge("thumbwheel_trainer_pending_samples", "Samples that wait for a round.", ["task"])
DUPLICATES = Counter("thumbwheel_trainer_duplicates_total", "Comparisons dropped because they were seen.", ["task"])
RETRACTIONS = Counter("thumbwheel_trainer_retractions_total", "Comparisons retracted.", ["task"])
ROUNDS = Counter("thumbwheel_trainer_rounds_total", "Rounds learnt.", ["task"])
PUBLISHED = Gauge("thumbwheel_trainer_published_version", "Sequence of the version last announced.", ["task"])
ANNOUNCE_RETRIES = Counter("thumbwheel_trainer_announce_retries_total", "Announcements tried again.", ["task"])
PHASE = Histogram(
    "thumbwheel_trainer_phase_seconds",
    "Time a phase of a round took.",
    ["task", "phase"],
    buckets=(0.01, 0.05, 0.25, 1, 2.5, 5, 10, 30, 60, 120, 300, 900),
)
STEP_PHASE = Histogram(
    "thumbwheel_trainer_step_seconds",
    "Time a part of an optimizer step took: gradients, and the optimizer with the reduction over ranks before it.",
    ["task", "phase"],
    buckets=(0.01, 0.05, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
FEEDBACK_TO_PUBLISH = Histogram(
    "thumbwheel_trainer_feedback_to_publish_seconds",
    "Time from a comparison's commit to the announcement of the version that learnt from it.",
    ["task"],
    buckets=(1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400),
)
AWAY = Gauge(
    "thumbwheel_trainer_service_away", "1 while rollouts wait for a service that does not answer.", ["task", "service"]
)
ROLLOUT_RETRIES = Counter(
    "thumbwheel_trainer_rollout_retries_total", "Attempts at rollouts that have to be made again.", ["task", "service"]
)
ROLLOUTS = Counter(
    "thumbwheel_trainer_rollouts_total",
    "Groups of rollouts by what became of them: kept; flat, all responses being worth the same; stale, by too old a "
    "version; refused by a service; retracted meanwhile.",
    ["task", "outcome"],
)
STALENESS = Histogram(
    "thumbwheel_trainer_staleness_versions",
    "How many versions before the learning one a sample's oldest token was written.",
    ["task"],
    buckets=(0, 1, 2, 3, 4, 8, 16, 64),
)
HALTED = Gauge(
    "thumbwheel_trainer_halted", "1 where a task has stopped learning and publishing, by why.", ["task", "reason"]
)
VITAL = Gauge(
    "thumbwheel_trainer_vital",
    "What the guards look at, last round: kl, entropy, repetition, response_tokens, diversity, reward.",
    ["task", "sign"],
)
LAG = Gauge("thumbwheel_trainer_lag_records", "Records on the stream that are not read yet.", ["task", "topic"])
TOKENS_PER_SECOND = Gauge(
    "thumbwheel_trainer_tokens_per_second",
    "Tokens of prompts and responses learnt from a second, last round.",
    ["task"],
)

REWARD = Gauge(
    "thumbwheel_reward_watch",
    "The reward model on the newest comparisons, each before it was learnt: fresh_accuracy, fresh_ece, "
    "fresh_ece_calibrated, temperature, length_correlation, score_mean, score_std.",
    ["measure"],
)
POLICY_SCORE_MEAN = Gauge(
    "thumbwheel_reward_policy_score_mean", "Mean score of what a policy version wrote, of the newest.", ["version"]
)
POLICY_SCORE_STD = Gauge(
    "thumbwheel_reward_policy_score_std", "Spread of the scores of what a policy version wrote.", ["version"]
)
NEWER_PREFERRED = Gauge(
    "thumbwheel_reward_newer_preferred_ratio",
    "Share of the newest comparisons of two policy versions in which people preferred the newer.",
)
OVER_OPTIMISED = Gauge(
    "thumbwheel_reward_over_optimised", "1 where scores rise with policy versions that people do not prefer."
)


@contextmanager
def phase(task: str, name: str) -> Iterator[None]:
    """Measures a phase of a round, and makes a span of it."""
    with tracing.span(f"trainer.{name}", task=task), PHASE.labels(task, name).time():
        yield


def watch(seen: RewardWatch) -> dict[str, float]:
    """Shows how the reward model does on the newest comparisons, and returns it; warns of over-optimisation."""
    summary = seen.summary()
    for measure, value in summary.items():
        REWARD.labels(measure).set(value)
    for gauge in (POLICY_SCORE_MEAN, POLICY_SCORE_STD):
        gauge.clear()  # versions that nothing of late was written by
    for version, written in seen.by_version().items():
        POLICY_SCORE_MEAN.labels(version).set(written.mean)
        POLICY_SCORE_STD.labels(version).set(written.std)
    preferred, compared = seen.newer_preferred()
    if compared:
        NEWER_PREFERRED.set(preferred / compared)
    why = seen.over_optimised()
    OVER_OPTIMISED.set(bool(why))
    if why:
        logger.warning("the policy is over-optimised: %s", why)
    return summary
