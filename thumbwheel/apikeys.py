"""API keys: who may call what. Kept in `api-keys.json` as hashes, watched, so that changes need no restart.

A key reads `tw_ID_SECRET`. Its secret is 256 random bits, so one SHA-256 keeps it: there is nothing to guess, and a
slow hash, made for passwords that people choose, would only cost every call milliseconds and help who floods us.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from thumbwheel import errors, files
from thumbwheel.calls import DEFAULT_TENANT

logger = logging.getLogger(__name__)

FILE = "api-keys.json"
Scope: TypeAlias = Literal["generate", "score", "feedback", "control", "admin"]
"""What a key may do. `control` opens its tenant's part of the control plane; `admin` everything, for every tenant."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "tw"
_SECRET_BYTES = 32


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept. Times are ISO 8601 in UTC; "" is never."""

    id: str
    sha256: str
    tenant: str
    scopes: tuple[Scope, ...]
    created_at: str
    expires_at: str = ""
    revoked_at: str = ""

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """Whether it holds."""
        if self.revoked_at:
            return "revoked"
        return "expired" if self.expires_at and datetime.fromisoformat(self.expires_at) <= now else "active"


def create(
    folder: Path, *, scopes: Sequence[str], tenant: str = DEFAULT_TENANT, days: float | None = None
) -> tuple[ApiKey, str]:
    """Adds a key. Returns it and its text, which is not kept and cannot be shown again.

    Raises `errors.InvalidArgument` for a scope there is not, `errors.FailedPrecondition` for a file that is unreadable.
    """
    if not scopes or not set(scopes) <= set(SCOPES):
        raise errors.InvalidArgument(
            f"is {', '.join(scopes) or 'empty'}; there are {', '.join(SCOPES)}.", field="scopes"
        )
    if not tenant or len(tenant) > 128 or not tenant.isprintable():
        raise errors.InvalidArgument("is not 1 to 128 printable characters.", field="tenant")
    if days is not None and days <= 0:
        raise errors.InvalidArgument(f"is {days:g}; it must be above 0.", field="days")
    now = datetime.now(UTC)
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    key = ApiKey(
        id=secrets.token_hex(6),
        sha256=_digest(secret),
        tenant=tenant,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        created_at=now.isoformat(timespec="seconds"),
        expires_at="" if days is None else (now + timedelta(days=days)).isoformat(timespec="seconds"),
    )
    with _locked(folder):
        _write(folder / FILE, [*_read_if_there(folder), key])
    return key, f"{_PREFIX}_{key.id}_{secret}"


def revoke(folder: Path, id: str) -> ApiKey:
    """Ends a key; servers know within a second. Raises `errors.NotFound`."""
    with _locked(folder):
        keys = _read_if_there(folder)
        if not any(key.id == id for key in keys):
            raise errors.NotFound(f"There is no key {id!r}.", remedy="`thumbwheel keys list` names those there are.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        keys = [replace(key, revoked_at=key.revoked_at or now) if key.id == id else key for key in keys]
        _write(folder / FILE, keys)
    return next(key for key in keys if key.id == id)


def listed(folder: Path) -> list[ApiKey]:
    """All keys there are or were, oldest first."""
    return _read_if_there(folder)


class KeyRing:
    """The keys of a deployment, as of the last `reload`. Opening raises `errors.FailedPrecondition`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        if not self._path.exists():
            raise errors.FailedPrecondition(
                f"API keys are required, but {self._path} does not exist.",
                remedy="Make a key with `thumbwheel keys create --scope generate`.",
            )
        self.load()

    def load(self) -> None:
        """Reads the file. Raises `errors.FailedPrecondition` where it is unreadable."""
        status = self._path.stat()
        self._keys = {key.id: key for key in _read(self._path)}
        self._stamp = (status.st_mtime_ns, status.st_size, status.st_ino)

    def reload(self) -> bool:
        """Reads the file where it has changed. One that is gone or broken is logged, and the keys known stay."""
        try:
            status = self._path.stat()
            if (status.st_mtime_ns, status.st_size, status.st_ino) == self._stamp:
                return False
            self.load()
        except (OSError, errors.FailedPrecondition) as error:
            # Neither open to all nor closed to all by a slip of an editor; the fault is said until it is mended.
            logger.error("the API keys known go on to hold: %s", error)
            return False
        logger.info("API keys reloaded", extra={"keys": len(self._keys)})
        return True

    def check(self, text: str, scope: Scope) -> ApiKey:
        """The key that `text` is. Raises `errors.Unauthenticated`, and `errors.PermissionDenied` for another scope."""
        prefix, _, rest = text.partition("_")
        id, _, secret = rest.partition("_")
        key = self._keys.get(id) if prefix == _PREFIX else None
        # Compared also where there is no such key, so that time does not tell which ids there are.
        holds = hmac.compare_digest(_digest(secret), key.sha256 if key is not None else _digest(""))
        if key is None or not holds or not secret:
            raise errors.Unauthenticated(
                "The API key is not one of this deployment.", remedy="Make one with `thumbwheel keys create`."
            )
        if (state := key.state(datetime.now(UTC))) != "active":
            raise errors.Unauthenticated(f"The API key {id} is {state}.", remedy="Use a newer one.")
        if scope not in key.scopes and "admin" not in key.scopes:
            raise errors.PermissionDenied(
                f"The API key {id} does not have the scope {scope!r}, only {', '.join(key.scopes)}.",
                remedy=f"Make one with `thumbwheel keys create --scope {scope}`.",
            )
        return key


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _read_if_there(folder: Path) -> list[ApiKey]:
    return _read(folder / FILE) if (folder / FILE).exists() else []


def _read(path: Path) -> list[ApiKey]:
    try:
        keys = []
        for entry in json.loads(path.read_text())["keys"]:
            key = ApiKey(**{**entry, "scopes": tuple(entry["scopes"])})
            if len(bytes.fromhex(key.sha256)) != 32 or not set(key.scopes) <= set(SCOPES):
                raise ValueError(f"key {key.id} has a bad hash or scope")
            key.state(datetime.now(UTC))
            keys.append(key)
        return keys
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.FailedPrecondition(
            f"{path} is not a file of API keys: {error}.", remedy="Restore it, or move it away and make new keys."
        ) from error


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    staging = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with files.space_errors(path.parent, 65_536, "API keys"):
        try:
            text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n"
            files.write_new(staging, text.encode(), mode=0o600)
            os.replace(staging, path)
            files.sync(path.parent)
        finally:
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps two commands from writing over each other."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".api-keys.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
