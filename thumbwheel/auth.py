"""Keys: receipts that prove who produced a response, and signatures that prove who wrote a checkpoint.

Receipts are HMAC-SHA256: the policy signs, the collector verifies, both hold `receipt.key`. Manifests are Ed25519: only
the trainer holds `manifest.key`; every server verifies with `manifest.pub`. A key's id is derived from the key, so a
signature always says which key to look for and never anything about its secret.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from thumbwheel import errors, files
from thumbwheel.v1.policy_pb2 import Receipt, ReceiptClaims

RECEIPT_KEY = "receipt.key"
MANIFEST_KEY = "manifest.key"
MANIFEST_PUB = "manifest.pub"

_RECEIPT_KEY_BYTES = 32
_KEY_ID_DIGITS = 16


def create_keys(folder: Path) -> None:
    """Writes those keys that are missing from `folder` (mode 0600), and leaves those that are there.

    Safe to call from several processes at once. Raises `errors.FailedPrecondition` where a key that is there is not
    usable, or `manifest.pub` is not the public half of `manifest.key`; `errors.NoSpace` where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with files.space_errors(folder, 4096, "keys"):
        if not (folder / RECEIPT_KEY).exists():
            _install(folder / RECEIPT_KEY, secrets.token_hex(_RECEIPT_KEY_BYTES).encode() + b"\n")
        if not (folder / MANIFEST_KEY).exists():
            if (folder / MANIFEST_PUB).exists():
                raise errors.FailedPrecondition(
                    f"{folder / MANIFEST_PUB} is there, but its private half {folder / MANIFEST_KEY} is not.",
                    remedy=f"Restore {MANIFEST_KEY}, or remove {MANIFEST_PUB} to begin with new keys.",
                )
            _install(folder / MANIFEST_KEY, _private_pem(Ed25519PrivateKey.generate()))
        ReceiptKey.load(folder)
        signer = ManifestSigner.load(folder)
        if not (folder / MANIFEST_PUB).exists():
            _install(folder / MANIFEST_PUB, signer.public_pem())
    if ManifestVerifier.load(folder).key_id != signer.key_id:
        raise errors.FailedPrecondition(
            f"{folder / MANIFEST_PUB} is not the public half of {folder / MANIFEST_KEY}.",
            remedy=f"Restore the right one, or remove {MANIFEST_PUB} to have it written anew.",
        )


@functools.lru_cache(maxsize=8)
def _keyed(secret: bytes) -> hmac.HMAC:
    return hmac.new(secret, digestmod="sha256")


@dataclass(frozen=True)
class ReceiptKey:
    """The secret with which receipts are signed and verified."""

    key_id: str
    _secret: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `receipt.key`. Raises `errors.FailedPrecondition` naming the file."""
        path = folder / RECEIPT_KEY
        text = _read_key(path, private=True)
        try:
            secret = bytes.fromhex(text.decode("ascii").strip())
        except ValueError:
            secret = b""
        if len(secret) != _RECEIPT_KEY_BYTES:
            raise _bad_key(path, f"is not {_RECEIPT_KEY_BYTES * 2} hexadecimal digits")
        return cls(hashlib.sha256(b"thumbwheel receipt key id\0" + secret).hexdigest()[:_KEY_ID_DIGITS], secret)

    def sign(self, claims: ReceiptClaims) -> Receipt:
        """The receipt that attests `claims`."""
        data = claims.SerializeToString(deterministic=True)
        return Receipt(claims=data, key_id=self.key_id, signature=self._mac(data))

    def verify(self, receipt: Receipt, *, field: str) -> ReceiptClaims:
        """What the receipt attests; `field` is its path in the request, for messages.

        Raises `errors.InvalidArgument` where it is incomplete, `errors.PermissionDenied` where it does not hold.
        """
        for part, value in (("claims", receipt.claims), ("key_id", receipt.key_id), ("signature", receipt.signature)):
            if not value:
                raise errors.InvalidArgument("is empty.", field=f"{field}.{part}", remedy=_HAND_BACK)
        if receipt.key_id != self.key_id:
            raise errors.PermissionDenied(
                f"{field}.key_id: {receipt.key_id[:64]!r} is no key of this deployment.", remedy=_HAND_BACK
            )
        if not hmac.compare_digest(receipt.signature, self._mac(receipt.claims)):
            raise errors.PermissionDenied(
                f"{field}.signature: does not belong to these claims; the receipt was altered or forged.",
                remedy=_HAND_BACK,
            )
        try:
            return ReceiptClaims.FromString(receipt.claims)
        except DecodeError:
            raise errors.InvalidArgument(
                "is signed, but no ReceiptClaims.", field=f"{field}.claims", remedy=_HAND_BACK
            ) from None

    def _mac(self, data: bytes) -> bytes:
        # Not `hmac.digest`: that lets go of the interpreter, and in a busy server waits to have it again. And not a new
        # one each time: that takes longer than the digest.
        mac = _keyed(self._secret).copy()
        mac.update(data)
        return mac.digest()


@dataclass(frozen=True)
class ManifestSigner:
    """The private key with which the trainer signs manifests."""

    key_id: str
    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `manifest.key`. Raises `errors.FailedPrecondition` naming the file."""
        path = folder / MANIFEST_KEY
        data = _read_key(path, private=True)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise _bad_key(path, "is not a PEM private key") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise _bad_key(path, "is not an Ed25519 key")
        return cls(_public_key_id(key.public_key()), key)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `data`."""
        return self._key.sign(data)

    def public_pem(self) -> bytes:
        """The public half, as `manifest.pub` holds it."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


@dataclass(frozen=True)
class ManifestVerifier:
    """The public key with which servers verify manifests."""

    key_id: str
    _key: Ed25519PublicKey = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `manifest.pub`. Raises `errors.FailedPrecondition` naming the file."""
        path = folder / MANIFEST_PUB
        data = _read_key(path, private=False)
        try:
            key = serialization.load_pem_public_key(data)
        except ValueError as error:
            raise _bad_key(path, "is not a PEM public key") from error
        if not isinstance(key, Ed25519PublicKey):
            raise _bad_key(path, "is not an Ed25519 key")
        return cls(_public_key_id(key), key)

    def verify(self, data: bytes, signature: bytes, key_id: str) -> None:
        """Returns where `signature` is this key's over `data`. Raises `errors.PermissionDenied` otherwise."""
        if key_id != self.key_id:
            raise errors.PermissionDenied(
                f"signed by key {key_id[:64]!r}; only {self.key_id} is trusted here.",
                remedy=f"Give this process the {MANIFEST_PUB} of the trainer that signed it, if you trust it.",
            )
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            raise errors.PermissionDenied(f"the signature is not key {key_id}'s over these bytes.") from None


_HAND_BACK = "Hand back the receipt of the generation unchanged."


def _install(path: Path, data: bytes) -> None:
    """Puts a whole, synced file at `path`, unless another process was first: never half a key, never two."""
    staging = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        files.write_new(staging, data, mode=0o600)
        os.link(staging, path)
        files.sync(path.parent)
    except FileExistsError:
        pass
    finally:
        staging.unlink(missing_ok=True)


def _read_key(path: Path, *, private: bool) -> bytes:
    try:
        data = path.read_bytes()
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise errors.FailedPrecondition(
            f"{path} does not exist.",
            remedy="Copy it from the deployment it belongs to, or start with `thumbwheel up`, which makes keys.",
        ) from None
    except OSError as error:
        raise _bad_key(path, f"cannot be read ({error.strerror})") from error
    if private and mode & 0o007:
        raise errors.FailedPrecondition(f"{path} can be read by everyone.", remedy=f"Type: chmod 600 {path}")
    return data


def _bad_key(path: Path, fault: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"{path} {fault}.",
        remedy="Restore it from where it was made, or remove the key files and let `thumbwheel up` make new ones.",
    )


def _private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_key_id(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:_KEY_ID_DIGITS]
