"""What a policy learns from beside people's judgements: rollouts of itself, demonstrations from a file, and what it has
learnt before.

    ask        prompts go to the serving fleet, so that one round's rollouts are made while another is learnt
    collect    rollouts come back into the buffer, those left out that say nothing
    lesson     a round as the objective takes it: pairs made of rollouts, demonstrations and replayed samples added,
               thumbs weighted by how seldom responses like theirs are voted on
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thumbwheel import errors
from trainer import metrics, staleness
from trainer.buffer import Buffer
from trainer.config import TaskName, TrainerSettings
from trainer.prompts import Prompt, Prompts
from trainer.replay import Replay
from trainer.rollouts import Rollouts
from trainer.samples import Demonstration, Group, Kind, Pair, Sample, Thumb, Tokens
from trainer.voting import Voting

if TYPE_CHECKING:
    from trainer.ingest import Encoder

logger = logging.getLogger(__name__)

Refer = Callable[[Sequence[Tokens]], Mapping[Tokens, str]]
"""Responses of the reference model, by the prompts that they answer."""


def wanted_kinds(kinds: Iterable[Kind], settings: TrainerSettings) -> frozenset[Kind]:
    """What is to be taken from the stream for objectives that learn from `kinds`."""
    found = set(kinds) - {Group}
    if settings.pairs_from == "reward_model":
        found.discard(Pair)
    return frozenset(found)


def wants_rollouts(kinds: Iterable[Kind], settings: TrainerSettings) -> bool:
    """Whether objectives that learn from `kinds` need rollouts."""
    kinds = set(kinds)
    return Group in kinds or (Pair in kinds and settings.pairs_from != "people")


class Feed:
    """The feed of one task. Before `open` it asks for no rollouts."""

    def __init__(
        self,
        settings: TrainerSettings,
        task: TaskName,
        kinds: Iterable[Kind],
        *,
        prompts: Prompts,
        replay: Replay,
        demonstrations: Sequence[Demonstration] = (),
        voting: Voting | None = None,
        refer: Refer | None = None,
    ) -> None:
        self._settings, self._task, self._kinds = settings, task, frozenset(kinds)
        self.prompts, self.replay, self.demonstrations, self.voting = prompts, replay, demonstrations, voting
        self._rollouts: Rollouts | None = None
        self._refer = refer

    def open(self) -> None:
        """Begins to ask for rollouts, where the objective learns from them. Raises `errors.FailedPrecondition`."""
        if wants_rollouts(self._kinds, self._settings):
            self._rollouts = open_rollouts(self._settings, self._task)

    def ask(self, buffer: Buffer, *, ahead: int = 0) -> None:
        """Asks for as many rollouts as make a round of what waits, and `ahead` samples more."""
        if self._rollouts is None:
            return
        wanted = self._settings.round_size + ahead - len(buffer) - self._rollouts.outstanding
        prompts = self.prompts.take(max(0, wanted))
        if self._refer and (missing := [prompt.tokens for prompt in prompts if not prompt.reference]):
            found = self._refer(missing)
            self.prompts.refer(found)
            prompts = [Prompt(p.id, p.tokens, p.reference or found.get(p.tokens, "")) for p in prompts]
        self._rollouts.ask(prompts)

    def collect(self, buffer: Buffer, now: float, timeout: float = 0.0) -> None:
        """Takes in the rollouts that are back, waiting up to `timeout` seconds for the first. Raises what ended the
        background work, if something did.
        """
        if self._rollouts is None:
            return
        for prompt, group in self._rollouts.answers(timeout):
            outcome = self._outcome(prompt, group)
            metrics.ROLLOUTS.labels(self._task, outcome).inc()
            if outcome == "kept" and group is not None:
                buffer.add(group, now)
        metrics.PENDING.labels(self._task).set(len(buffer))

    def drop_stale(self, buffer: Buffer, newest: int) -> None:
        """Drops the rollouts that wait and were written too long before version `newest`, and counts them."""
        groups = [sample for sample in buffer.oldest(len(buffer)) if isinstance(sample, Group)]
        found = staleness.fresh(groups, newest, self._settings.max_staleness)
        if not found.dropped:
            return
        kept = {group.id for group in found.kept}
        buffer.drop(group.id for group in groups if group.id not in kept)
        metrics.ROLLOUTS.labels(self._task, "stale").inc(found.dropped)
        logger.warning(
            "rollouts dropped: they were written more than %d versions ago",
            self._settings.max_staleness,
            extra={"task": self._task, "dropped": found.dropped},
        )

    def lesson(self, samples: Sequence[Sample], *, round_number: int) -> list[Sample]:
        """What is learnt in a round of `samples`. It depends on them, the round and the checkpoint alone."""
        lesson = list(samples)
        if Pair in self._kinds and self._settings.pairs_from != "people":
            made = [pair_of(sample) for sample in samples if isinstance(sample, Group)]
            lesson += [pair for pair in made if pair is not None]
        if Group not in self._kinds:
            lesson = [sample for sample in lesson if not isinstance(sample, Group)]
        new = len(lesson)
        lesson += self.replay.draw(round(new * self._settings.replay_ratio), round_number)
        if Demonstration in self._kinds and self.demonstrations:
            count = min(len(self.demonstrations), math.ceil(new * self._settings.demonstrations_ratio))
            rng = random.Random(f"{self._settings.seed}/{round_number}/demonstrations")
            lesson += rng.sample(list(self.demonstrations), count)
        return lesson if self.voting is None else self.voting.weighted(lesson)

    def save(self, folder: Path) -> None:
        """Writes what has to survive into `folder`."""
        self.prompts.save(folder)
        self.replay.save(folder)
        if self.voting is not None:
            self.voting.save(folder)

    def close(self) -> None:
        """Ends the background work."""
        if self._rollouts is not None:
            self._rollouts.close()

    def _outcome(self, prompt: Prompt, group: Group | None) -> str:
        if not self.prompts.came_back(prompt):
            return "retracted"
        if group is None:
            return "refused"
        if len(group.rollouts) < 2 or variance(group) < self._settings.min_reward_variance:
            return "flat"
        return "kept"


def resume(
    settings: TrainerSettings,
    task: TaskName,
    kinds: Collection[Kind],
    *,
    folder: Path | None,
    encoder: Encoder,
    refer: Refer | None,
) -> Feed:
    """The feed of a task as it lies in the training checkpoint `folder`. A reward model has none but what it learnt."""
    replay, prompts = Replay(settings.seed), Prompts(settings.prompt_uses)
    if folder is not None:
        replay, prompts = Replay.load(folder, settings.seed), Prompts.load(folder, settings.prompt_uses)
    demonstrations: Sequence[Demonstration] = ()
    if task == "policy" and settings.demonstrations is not None:
        demonstrations = read_demonstrations(
            settings.demonstrations, encoder.tokenizer, encoder.vocab_size, settings.max_length
        )
    voting = None
    if Thumb in kinds and settings.voting_propensity:
        voting = Voting() if folder is None else Voting.load(folder)
    return Feed(
        settings,
        task,
        kinds,
        prompts=prompts,
        replay=replay,
        demonstrations=demonstrations,
        voting=voting,
        refer=refer,
    )


def open_rollouts(settings: TrainerSettings, task: TaskName) -> Rollouts:
    """Rollouts from the services that the settings name. Raises `errors.FailedPrecondition` for a key that would cross
    the network for all to read.
    """
    from thumbwheel.channels import check_key, key_from_environment
    from thumbwheel.client import AsyncClient
    from thumbwheel.tls import ClientTls

    key, tls = key_from_environment(), ClientTls.from_environment()
    check_key(key, (settings.policy, settings.reward), tls, allow_insecure=settings.allow_insecure)

    def connect() -> AsyncClient:
        return AsyncClient(
            policy=settings.policy,
            reward=settings.reward,
            api_key=key,
            tls=tls,
            allow_insecure=settings.allow_insecure,
        )

    return Rollouts(
        connect,
        task=task,
        responses=settings.rollout_responses,
        max_tokens=settings.rollout_tokens,
        pessimism=settings.reward_pessimism,
    )


def variance(group: Group) -> float:
    """Variance of the rewards of a group: where it is nothing, there is nothing to be learnt of the prompt."""
    return statistics.pvariance(rollout.reward for rollout in group.rollouts)


def pair_of(group: Group) -> Pair | None:
    """The best and the worst response of a group, as a comparison by the reward model; None where they are the same."""
    ranked = sorted(group.rollouts, key=lambda rollout: rollout.reward)
    if ranked[0].tokens == ranked[-1].tokens or ranked[0].reward == ranked[-1].reward:
        return None
    return Pair(
        id=f"{group.id}/pair",
        prompt=group.prompt,
        chosen=ranked[-1].tokens,
        rejected=ranked[0].tokens,
        weight=group.weight,
        received_at=group.received_at,
        versions=group.versions,
    )


def reward_version(samples: Iterable[Sample]) -> str:
    """The newest reward version that scored any of them; "" where none did."""
    return max((sample.reward_version for sample in samples if isinstance(sample, Group)), default="")


def read_demonstrations(path: Path, tokenizer: object, vocab_size: int, max_length: int) -> tuple[Demonstration, ...]:
    """The demonstrations in a file, in a format of `trainer.dataset`. Raises `errors.InvalidArgument` for others."""
    from trainer import dataset
    from trainer.encode import RecordEncoder

    encoder = RecordEncoder(tokenizer, vocab_size, max_length=max_length)
    found = []
    for record in dataset.read(path):
        sample = encoder.sample(record)
        if not isinstance(sample, Demonstration):
            raise errors.InvalidArgument(
                f"{record.where} is no demonstration.",
                field="demonstrations",
                remedy="Each line needs `prompt` and `completion`, or `messages`.",
            )
        found.append(sample)
    return tuple(found)
