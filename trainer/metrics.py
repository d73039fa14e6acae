"""What the trainer measures; every metric by task."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

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
FEEDBACK_TO_PUBLISH = Histogram(
    "thumbwheel_trainer_feedback_to_publish_seconds",
    "Time from a comparison's commit to the announcement of the version that learnt from it.",
    ["task"],
    buckets=(1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400),
)
