"""Keys, receipts and manifest signatures."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from thumbwheel import errors
from thumbwheel.auth import ManifestSigner, ManifestVerifier, ReceiptKey, create_keys
from thumbwheel.v1.policy_pb2 import Receipt, ReceiptClaims

CLAIMS = ReceiptClaims(
    tenant="default",
    generation_id="0192f7a4-5c6e-7d00-8000-000000000001",
    prompt_id="0192f7a4-5c6e-7d00-8000-000000000002",
    prompt_sha256=bytes(range(32)),
    response_sha256=bytes(range(32, 64)),
    version="policy-000003",
    issued_at=Timestamp(seconds=1_700_000_000, nanos=5),
)
KEY = ReceiptKey("0011223344556677", b"k" * 32)


def test_create_keys_makes_private_files_once(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    create_keys(folder)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    create_keys(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
    assert sorted(first) == ["manifest.key", "manifest.pub", "receipt.key"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}


def test_two_deployments_have_different_keys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        create_keys(tmp_path / name)
    assert ReceiptKey.load(tmp_path / "a").key_id != ReceiptKey.load(tmp_path / "b").key_id
    assert ManifestSigner.load(tmp_path / "a").key_id != ManifestSigner.load(tmp_path / "b").key_id


def test_processes_that_create_keys_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create_keys, [tmp_path] * 16))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.key", "manifest.pub", "receipt.key"]
    assert ManifestSigner.load(tmp_path).key_id == ManifestVerifier.load(tmp_path).key_id


def test_a_lost_public_key_is_written_again(tmp_path: Path) -> None:
    create_keys(tmp_path)
    public = (tmp_path / "manifest.pub").read_bytes()
    (tmp_path / "manifest.pub").unlink()
    create_keys(tmp_path)
    assert (tmp_path / "manifest.pub").read_bytes() == public


def test_a_lost_private_key_is_not_replaced_silently(tmp_path: Path) -> None:
    create_keys(tmp_path)
    (tmp_path / "manifest.key").unlink()
    with pytest.raises(errors.FailedPrecondition, match=r"manifest\.key is not\. Restore manifest\.key"):
        create_keys(tmp_path)


def test_halves_that_do_not_match_are_refused(tmp_path: Path) -> None:
    create_keys(tmp_path / "a")
    create_keys(tmp_path / "b")
    (tmp_path / "a/manifest.pub").write_bytes((tmp_path / "b/manifest.pub").read_bytes())
    with pytest.raises(errors.FailedPrecondition, match=r"manifest\.pub is not the public half"):
        create_keys(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "load"),
    [("receipt.key", ReceiptKey.load), ("manifest.key", ManifestSigner.load), ("manifest.pub", ManifestVerifier.load)],
)
@pytest.mark.parametrize("content", [None, b"", b"not a key\n", b"\xff" * 64])
def test_a_bad_key_file_is_named_with_a_remedy(tmp_path: Path, name: str, load: object, content: bytes | None) -> None:
    create_keys(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert callable(load)
    with pytest.raises(errors.FailedPrecondition) as caught:
        load(tmp_path)
    assert str(path) in caught.value.message
    assert "thumbwheel up" in caught.value.remedy


def test_keys_of_another_algorithm_are_refused(tmp_path: Path) -> None:
    key = generate_private_key(SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    create_keys(tmp_path)
    (tmp_path / "manifest.key").write_bytes(private)
    (tmp_path / "manifest.pub").write_bytes(public)
    with pytest.raises(errors.FailedPrecondition, match=r"manifest\.key is not an Ed25519 key"):
        ManifestSigner.load(tmp_path)
    with pytest.raises(errors.FailedPrecondition, match=r"manifest\.pub is not an Ed25519 key"):
        ManifestVerifier.load(tmp_path)


@pytest.mark.parametrize(("name", "load"), [("receipt.key", ReceiptKey.load), ("manifest.key", ManifestSigner.load)])
def test_a_secret_open_to_everyone_is_refused(tmp_path: Path, name: str, load: object) -> None:
    create_keys(tmp_path)
    (tmp_path / name).chmod(0o644)
    assert callable(load)
    with pytest.raises(errors.FailedPrecondition, match=rf"can be read by everyone\. Type: chmod 600 .*{name}"):
        load(tmp_path)


def test_a_secret_is_not_shown(tmp_path: Path) -> None:
    create_keys(tmp_path)
    secret = (tmp_path / "receipt.key").read_text().strip()
    key = ReceiptKey.load(tmp_path)
    assert repr(key) == f"ReceiptKey(key_id='{key.key_id}')"
    assert key.key_id not in secret


def test_a_receipt_attests_its_claims(tmp_path: Path) -> None:
    create_keys(tmp_path)
    receipt = ReceiptKey.load(tmp_path).sign(CLAIMS)
    assert ReceiptKey.load(tmp_path).verify(receipt, field="thumb.receipt") == CLAIMS


@pytest.mark.parametrize("part", ["claims", "key_id", "signature"])
def test_an_incomplete_receipt_names_the_part(part: str) -> None:
    receipt = KEY.sign(CLAIMS)
    receipt.ClearField(part)  # type: ignore[arg-type]  # a parametrised field name
    with pytest.raises(errors.InvalidArgument) as caught:
        KEY.verify(receipt, field="comparison.a")
    assert caught.value.field == f"comparison.a.{part}"


def test_a_receipt_of_another_key_is_refused() -> None:
    with pytest.raises(errors.PermissionDenied, match=r"comparison\.b\.key_id: 'other' is no key"):
        KEY.verify(ReceiptKey("other", b"o" * 32).sign(CLAIMS), field="comparison.b")


def test_a_known_key_id_does_not_help_a_forger() -> None:
    forged = ReceiptKey(KEY.key_id, b"o" * 32).sign(CLAIMS)
    with pytest.raises(errors.PermissionDenied, match=r"comparison\.b\.signature: .* forged"):
        KEY.verify(forged, field="comparison.b")


def test_signed_bytes_that_are_no_claims_are_refused() -> None:
    signature = KEY._mac(b"\xff\xff")
    with pytest.raises(errors.InvalidArgument) as caught:
        KEY.verify(Receipt(claims=b"\xff\xff", key_id=KEY.key_id, signature=signature), field="r")
    assert caught.value.field == "r.claims"


@settings(deadline=None)
@given(st.data())
def test_any_flipped_bit_of_a_receipt_is_refused(data: st.DataObject) -> None:
    receipt = KEY.sign(CLAIMS)
    part = data.draw(st.sampled_from(["claims", "signature", "key_id"]))
    if part == "key_id":
        place = data.draw(st.integers(0, len(receipt.key_id) - 1))
        flipped = chr(ord(receipt.key_id[place]) ^ 1 << data.draw(st.integers(0, 6)))
        receipt.key_id = receipt.key_id[:place] + flipped + receipt.key_id[place + 1 :]
    elif part == "claims":
        receipt.claims = _flip(receipt.claims, data)
    else:
        receipt.signature = _flip(receipt.signature, data)
    with pytest.raises(errors.PermissionDenied):
        KEY.verify(receipt, field="receipt")


@settings(deadline=None)
@given(st.data())
def test_any_flipped_bit_of_a_manifest_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    create_keys(folder)
    signer, verifier = ManifestSigner.load(folder), ManifestVerifier.load(folder)
    manifest = b'{"version": "policy-000003"}'
    signature = signer.sign(manifest)
    verifier.verify(manifest, signature, signer.key_id)
    with pytest.raises(errors.PermissionDenied):
        verifier.verify(_flip(manifest, data), signature, signer.key_id)
    with pytest.raises(errors.PermissionDenied):
        verifier.verify(manifest, _flip(signature, data), signer.key_id)


def test_a_manifest_signed_by_another_key_is_refused(tmp_path: Path) -> None:
    create_keys(tmp_path / "a")
    create_keys(tmp_path / "b")
    signer, verifier = ManifestSigner.load(tmp_path / "a"), ManifestVerifier.load(tmp_path / "b")
    with pytest.raises(errors.PermissionDenied, match=f"signed by key '{signer.key_id}'; only {verifier.key_id}"):
        verifier.verify(b"data", signer.sign(b"data"), signer.key_id)
    with pytest.raises(errors.PermissionDenied, match="the signature is not key"):
        verifier.verify(b"data", signer.sign(b"data"), verifier.key_id)


def _flip(value: bytes, data: st.DataObject) -> bytes:
    bit = data.draw(st.integers(0, len(value) * 8 - 1))
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
