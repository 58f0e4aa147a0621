"""The keys of a mesh: its certificate authority, the certificates, and the callers' tokens.

They are made at the first start and kept in the state folder, so that a client's CA file and
tokens outlive a restart. They are for one machine: production brings its own.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
from dataclasses import dataclass
from pathlib import Path

import jwt
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ISSUER = "https://ordermesh.local"
AUDIENCE = "ordermesh"
ROLES = ("merchant", "operator")

_ALGORITHM = "ES256"
_LEAF_LIFETIME = dt.timedelta(days=800)  # clients of Apple's make refuse more than 825
_RENEW_BEFORE = dt.timedelta(days=30)

# Who has a certificate, and by which names it is recognised (subject alternative names).
_SUBJECTS: dict[str, tuple[str, ...]] = {
    "edge-server": ("localhost", "127.0.0.1", "::1"),
    "edge": ("edge.mesh",),
    "envoy": ("envoy.mesh",),
    "order": ("order.mesh",),
    "payment": ("payment.mesh",),
    "notification": ("notification.mesh",),
    "rates": ("rates.mesh",),
}


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate with its private key, as PEM files."""

    certificate: Path
    key: Path


class Certificates:
    """The development CA of one state folder and the certificates that it signed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = folder / "ca.pem"
        """The CA's certificate, which every client trusts."""

    def of(self, subject: str) -> KeyPair:
        """Answers a subject's certificate: ``edge-server``, ``edge``, ``envoy`` or a service."""
        return KeyPair(self._folder / f"{subject}.pem", self._folder / f"{subject}.key")

    def ensure(self) -> None:
        """Makes the CA unless there is one, and every certificate that is missing or runs out."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ca_key = self._folder / "ca.key"
        known = self.ca.exists() and ca_key.exists()
        if known:
            ca = trustme.CA.from_pem(self.ca.read_bytes(), ca_key.read_bytes())
        else:
            ca = trustme.CA(
                organization_name="ordermesh", organization_unit_name="development CA of one mesh"
            )
            write_private(ca_key, ca.private_key_pem.bytes())
            write_private(self.ca, ca.cert_pem.bytes())
        for subject, names in _SUBJECTS.items():
            pair = self.of(subject)
            if known and _is_fresh(pair):
                continue
            issued = ca.issue_cert(*names, not_after=_now() + _LEAF_LIFETIME)
            write_private(pair.key, issued.private_key_pem.bytes())
            chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
            write_private(pair.certificate, chain)


class TokenKey:
    """The key that signs callers' tokens, and the JWKS by which the edge verifies them."""

    def __init__(self, folder: Path) -> None:
        self._key_file = folder / "signing.key"
        self.jwks = folder / "jwks.json"
        """The public half, as a JSON Web Key Set."""

    def ensure(self) -> None:
        """Makes the key unless there is one, and writes the JWKS."""
        self._key_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._key_file.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            write_private(
                self._key_file,
                made.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                ),
            )
        point = self._key().public_key().public_numbers()
        key = {
            "kty": "EC",
            "crv": "P-256",
            "use": "sig",
            "alg": _ALGORITHM,
            "kid": self._key_id(),
            "x": _base64url(point.x.to_bytes(32, "big")),
            "y": _base64url(point.y.to_bytes(32, "big")),
        }
        write_private(self.jwks, json.dumps({"keys": [key]}, indent=2).encode() + b"\n")

    def token(
        self,
        *,
        merchant: str = "default",
        roles: tuple[str, ...] = ("merchant",),
        subject: str = "",
        lifetime: dt.timedelta = dt.timedelta(hours=12),
    ) -> str:
        """Signs a token that the edge takes until it runs out.

        Args:
            merchant: Whose orders it gives access to.
            roles: Of `ROLES`.
            subject: Who calls; ``<merchant>-cli`` when empty.
            lifetime: From now.
        """
        now = _now()
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject or f"{merchant}-cli",
            "merchant": merchant,
            "roles": list(roles),
            "iat": now,
            "exp": now + lifetime,
        }
        headers = {"kid": self._key_id()}
        return jwt.encode(claims, self._key(), algorithm=_ALGORITHM, headers=headers)

    def _key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self._key_file.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{self._key_file} holds no elliptic curve key")
        return key

    def _key_id(self) -> str:
        public = (
            self._key()
            .public_key()
            .public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        digest = hashes.Hash(hashes.SHA256())
        digest.update(public)
        return digest.finalize().hex()[:16]


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that only we can read, whole or not at all."""
    making = path.with_name(path.name + ".new")
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    making.replace(path)


def _is_fresh(pair: KeyPair) -> bool:
    if not (pair.certificate.exists() and pair.key.exists()):
        return False
    certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    return certificate.not_valid_after_utc > _now() + _RENEW_BEFORE


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
