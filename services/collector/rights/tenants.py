"""What each tenant has agreed with its users: consent, how long content is kept, and what is redacted.

The file is TOML. A tenant that it does not name, and a setting that a tenant does not name, has what `[defaults]` says:

    [defaults]
    retention_days = 365

    [tenants.clinic]
    consent_required = true
    retention_days = 30
    redact = "builtin"
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thumbwheel import errors


class TenantRules(BaseModel):
    """The rules of one tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    consent_required: bool = False
    """Whether only feedback and generations with the user's consent are learnt from. A no counts in any case."""

    retention_days: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Content older than this is erased; 0 keeps it until it is forgotten."""

    redact: str = ""
    """What is done to text before it leaves the collector: empty for nothing, "builtin", or "module:function"."""

    def consents(self, given: bool | None) -> bool:
        """Whether what came with this consent (None: not asked) may be learnt from."""
        return given if given is not None else not self.consent_required

    def expired_before(self, now: int) -> int:
        """Content from before this time is not kept, both in microseconds since the epoch; 0 where all is kept."""
        return now - int(self.retention_days * 86_400e6) if self.retention_days else 0


class Tenants:
    """The rules of every tenant."""

    def __init__(self, defaults: TenantRules | None = None, named: Mapping[str, TenantRules] | None = None) -> None:
        self.defaults = defaults or TenantRules()
        self.named = dict(named or {})

    @property
    def shortest_retention_seconds(self) -> float:
        """The shortest time for which anybody's content is kept; infinite where all is kept."""
        days = [rules.retention_days for rules in (self.defaults, *self.named.values()) if rules.retention_days]
        return 86_400 * min(days, default=math.inf)

    def expired_before(self, now: int) -> dict[str, int]:
        """As `TenantRules.expired_before`, of each tenant that is named, and under "" of all others; empty where all is
        kept.
        """
        found = {tenant: rules.expired_before(now) for tenant, rules in {"": self.defaults, **self.named}.items()}
        return found if any(found.values()) else {}

    def __getitem__(self, tenant: str) -> TenantRules:
        """The rules of a tenant, named in the file or not."""
        return self.named.get(tenant, self.defaults)

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Reads the file, if there is one. Raises `errors.FailedPrecondition` naming it and the setting at fault."""
        if path is None:
            return cls()
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.FailedPrecondition(
                f"The tenants file {path} cannot be read: {error}.",
                remedy="Correct it, or name another with --tenants.",
            ) from error
        unknown = sorted(document.keys() - {"defaults", "tenants"})
        if unknown:
            raise _wrong(path, unknown[0], "is no table of this file", "Use [defaults] and [tenants.NAME].")
        defaults = _table(path, "defaults", document.get("defaults", {}))
        named = _table(path, "tenants", document.get("tenants", {}))
        common = _rules(path, "defaults", defaults)
        rules = {
            name: _rules(path, f"tenants.{name}", defaults | _table(path, f"tenants.{name}", table))
            for name, table in named.items()
        }
        return cls(common, rules)


def _table(path: Path, where: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(path, where, "is not a table", f"Write it as [{where}].")
    return value


def _rules(path: Path, where: str, table: Mapping[str, object]) -> TenantRules:
    try:
        # TOML tells 30 from 30.0; a number of days is a number of days.
        days = table.get("retention_days")
        whole = {"retention_days": float(days)} if isinstance(days, int) and not isinstance(days, bool) else {}
        return TenantRules.model_validate({**table, **whole})
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join([where, *(str(part) for part in problem["loc"])])
        raise _wrong(path, field, problem["msg"], f"There are {', '.join(TenantRules.model_fields)}.") from error


def _wrong(path: Path, where: str, fault: str, remedy: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f"The tenants file {path}: {where}: {fault}.", remedy=remedy)
