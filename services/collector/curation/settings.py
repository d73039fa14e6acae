"""Settings of curation. The defaults refuse little: what people give in good faith passes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CurationSettings(BaseModel):
    """How much one rater may count, and what is too much to be chance."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    user_votes_per_day: int = Field(default=200, ge=1)
    """Pieces of feedback of one user in a UTC day that count; later ones are kept apart."""

    tenant_votes_per_day: int = Field(default=1_000_000, ge=1)
    """Pieces of feedback of one tenant in a UTC day that count."""

    user_share_of_median: float = Field(default=3.0, gt=0)
    """A user's comparisons weigh together at most this many times those of the tenant's median user."""

    user_share_floor: int = Field(default=50, ge=1)
    """Comparisons of a user up to which that share does not bind."""

    group_votes: int = Field(default=256, ge=1)
    """Most comparisons that are accepted on one prompt and its duplicates."""

    publish_ties: bool = False
    """Publish ties as comparisons that say so, for a reward model that learns from them (the trainer's `--ties`). All
    trainers must be of a release that knows them."""

    burst_votes_per_minute: int = Field(default=20, ge=1)
    """Votes within a clock minute up to which nobody is too fast."""

    burst_ratio: float = Field(default=5.0, gt=1)
    """Beyond them: how many times the rater's own usual minute, or that of the population, is too fast."""

    burst_votes_per_day: int = Field(default=1_000, ge=1)
    """Votes within a UTC day beyond which the whole day is quarantined: no person gives as many."""

    prior_accuracy: float = Field(default=0.75, gt=0.5, lt=1)
    """How often a rater of whom nothing is known is taken to be right; such a rater has weight 1."""

    prior_votes: float = Field(default=8.0, gt=0)
    """How many votes that assumption is worth."""

    min_judged: float = Field(default=20.0, gt=0)
    """Votes that could be judged, by others or by gold, before a rater can be found unreliable."""

    min_weight: float = Field(default=0.1, gt=0, lt=1)
    """A judged rater with less weight than this is quarantined as unreliable."""

    collusion_accounts: int = Field(default=3, ge=2)
    """Fewest accounts that make a colluding group. One person's taste, however strong, is no collusion."""

    collusion_votes: int = Field(default=8, ge=2)
    """Fewest votes on one side, or shared with another account, before an account can belong to a group."""

    account_chance: float = Field(default=1e-3, gt=0, lt=1)
    """An account is one-sided where an honest one would be as one-sided with less than this probability."""

    group_chance: float = Field(default=1e-6, gt=0, lt=1)
    """A group colludes where so many one-sided accounts, or so many equal votes, have less than this probability."""

    taste_correlation: float = Field(default=0.02, ge=0, lt=1)
    """Correlation of an honest account's votes on one side: people have tastes, and keep them."""

    duplicate_similarity: float = Field(default=0.85, gt=0, le=1)
    """Jaccard similarity of word triples from which two prompts are near duplicates."""
