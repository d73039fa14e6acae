"""A simulated population: people who judge as they see it, and accounts that push one policy version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from services.collector.curation import Choice, Decision, RaterId, Response, State, Vote

VERSIONS = 8
TARGET = "v3"
DAY = 86_400_000_000
SECOND = 1_000_000
START = 20_000 * DAY
DAYS = 20


class World:
    """Prompts with three responses each, of different versions, and what people think of them."""

    def __init__(self, seed: int, prompts: int = 3_000) -> None:
        self.random = np.random.default_rng(seed)
        self._feedback = count()
        self._prompt = count()
        self._quality: dict[str, float] = {}
        self._of_version = self.random.normal(0.0, 0.4, VERSIONS)
        self.prompts = [self.prompt() for _ in range(prompts)]

    def prompt(self, *versions: int) -> tuple[str, list[Response]]:
        """A new prompt, with responses of these versions, or of three random ones."""
        prompt_id = f"p{next(self._prompt):06}"
        chosen = versions or self.random.choice(VERSIONS, 3, replace=False)
        responses = []
        for version in chosen:
            generation_id = f"{prompt_id}-{version}"
            self._quality[generation_id] = float(self._of_version[version] + self.random.normal())
            sha256 = hashlib.sha256(generation_id.encode()).digest()
            responses.append(Response(generation_id, sha256, version=f"v{version}"))
        return prompt_id, responses

    def vote(self, user: str, at: int, prompt: str, a: Response, b: Response, choice: Choice) -> Vote:
        """One comparison."""
        feedback_id = f"f{next(self._feedback):07}"
        return Vote(feedback_id, RaterId("acme", user), prompt, choice, a, at, b, prompt_sha256=prompt.encode())

    def honest(self, users: int, mean_votes: float = 25.0, taste: float = 0.3) -> list[Vote]:
        """Votes of people: most give few, some many; each has tastes, and looks more or less closely."""
        votes = []
        for user in range(users):
            how_many = int(np.clip(self.random.lognormal(np.log(mean_votes) - 0.5, 1.0), 1, 180))
            care = float(self.random.lognormal(np.log(2.0), 0.4))
            tastes = self.random.normal(0.0, taste, VERSIONS)
            for moment in self.moments(how_many):
                prompt, responses = self.prompts[int(self.random.integers(len(self.prompts)))]
                first, second = self.random.choice(len(responses), 2, replace=False)
                a, b = responses[first], responses[second]
                liking = [self._quality[one.generation_id] + tastes[int(one.version[1:])] for one in (a, b)]
                margin = care * (liking[0] - liking[1])
                a_wins = self.random.random() < 1.0 / (1.0 + np.exp(-margin))
                votes.append(self.vote(f"person{user:04}", moment, prompt, a, b, Choice.A if a_wins else Choice.B))
        return votes

    def moments(self, how_many: int) -> list[int]:
        """Times of votes: sittings of up to twenty, some seconds apart."""
        at: list[int] = []
        while len(at) < how_many:
            moment = START + int(self.random.integers(DAYS * DAY))
            for _ in range(min(how_many - len(at), int(self.random.integers(5, 21)))):
                at.append(moment)
                moment += int(self.random.uniform(6.0, 60.0) * SECOND)
        return at

    def colluders(self, accounts: int, votes_each: int, *, wins: bool = True, effort: float = 1.0) -> list[Vote]:
        """Accounts that let the target win, or lose, on this share of the pairs that have it, at the pace of people."""
        pairs = [
            (prompt, target, other)
            for prompt, responses in self.prompts
            for target in responses
            for other in responses
            if target.version == TARGET and other is not target
        ]
        votes = []
        for account in range(accounts):
            which = self.random.choice(len(pairs), min(votes_each, len(pairs)), replace=False)
            for moment, i in zip(self.moments(len(which)), which, strict=True):
                pushes = self.random.random() < effort
                votes.append(self._pushed(f"puppet{account:03}", moment, *pairs[i], wins=wins == pushes))
        return votes

    def flooder(self, how_many: int, days: int = 1) -> list[Vote]:
        """One account that asks, and then votes for the target, again and again."""
        target = int(TARGET[1:])
        votes = []
        for i in range(how_many):
            other = (target + 1 + i % (VERSIONS - 1)) % VERSIONS
            prompt, (a, b) = self.prompt(target, other)
            votes.append(self._pushed("flooder", START + i * days * DAY // how_many, prompt, a, b, wins=True))
        return votes

    def without_versions(self, votes: list[Vote]) -> list[Vote]:
        """The votes as if nobody knew which version gave which response."""
        return [
            replace(vote, a=replace(vote.a, version=""), b=None if vote.b is None else replace(vote.b, version=""))
            for vote in votes
        ]

    def _pushed(self, user: str, at: int, prompt: str, target: Response, other: Response, *, wins: bool) -> Vote:
        if self.random.random() < 0.5:
            return self.vote(user, at, prompt, target, other, Choice.A if wins else Choice.B)
        return self.vote(user, at, prompt, other, target, Choice.B if wins else Choice.A)


def ranked(votes: Iterable[Vote]) -> list[Vote]:
    """The votes with the ranks that the collector gives at receipt."""
    ranks: dict[object, int] = {}
    out = []
    for vote in sorted(votes, key=lambda vote: vote.order):
        day = vote.received_at // DAY
        of_user, of_tenant = (vote.rater, day), (vote.rater.tenant, day)
        out.append(replace(vote, user_rank=ranks.get(of_user, 0), tenant_rank=ranks.get(of_tenant, 0)))
        ranks[of_user], ranks[of_tenant] = ranks.get(of_user, 0) + 1, ranks.get(of_tenant, 0) + 1
    return out


def win_rate(votes: Iterable[Vote], weight: Callable[[Vote], float] = lambda _: 1.0) -> float:
    """Weighted share, in percent, of the votes on the target against other versions that it won."""
    won = total = 0.0
    for vote in votes:
        assert vote.b is not None
        winner, loser = (vote.a, vote.b) if vote.choice is Choice.A else (vote.b, vote.a)
        if TARGET in (winner.version, loser.version):
            total += weight(vote)
            won += weight(vote) * (winner.version == TARGET)
    return 100.0 * won / total


def accepted_win_rate(votes: Iterable[Vote], decisions: Sequence[Decision]) -> float:
    """The same over what was accepted, with its weight."""
    weights = {one.feedback_id: one.weight for one in decisions if one.state is State.ACCEPTED}
    return win_rate(votes, lambda vote: weights.get(vote.feedback_id, 0.0))
