"""The keys of a mesh: made once, kept, private, and what a verifier needs."""

import datetime as dt
import json
from pathlib import Path

import jwt
import pytest
from cryptography import x509

from meshctl import credentials
from meshctl.credentials import AUDIENCE, ISSUER, Certificates, TokenKey


def _names(certificate: Path) -> set[str]:
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    extension = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(name.value) for name in extension.value}


def test_each_certificate_carries_the_names_by_which_its_owner_is_known(tmp_path: Path) -> None:
    """Services, the edge as a client, the edge as a server, and the internal listener."""
    certificates = Certificates(tmp_path)
    certificates.ensure()
    assert _names(certificates.of("edge-server").certificate) == {"localhost", "127.0.0.1", "::1"}
    assert _names(certificates.of("edge").certificate) == {"edge.mesh"}
    assert _names(certificates.of("envoy").certificate) == {"envoy.mesh"}
    for service in ("order", "payment", "notification", "rates"):
        assert _names(certificates.of(service).certificate) == {f"{service}.mesh"}


def test_certificates_are_kept_at_the_next_start(tmp_path: Path) -> None:
    """A client's CA file stays good."""
    Certificates(tmp_path).ensure()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Certificates(tmp_path).ensure()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_certificates_that_run_out_soon_are_made_anew_by_the_same_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mesh that is started after two years still works."""
    certificates = Certificates(tmp_path)
    certificates.ensure()
    ca, leaf = certificates.ca.read_bytes(), certificates.of("order").certificate.read_bytes()
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=780)
    monkeypatch.setattr(credentials, "_now", lambda: later)
    certificates.ensure()
    assert certificates.ca.read_bytes() == ca
    assert certificates.of("order").certificate.read_bytes() != leaf


def test_a_new_ca_signs_every_certificate_anew(tmp_path: Path) -> None:
    """A certificate of a CA that is lost would be trusted by nobody."""
    certificates = Certificates(tmp_path)
    certificates.ensure()
    before = certificates.of("order").certificate.read_bytes()
    certificates.ca.unlink()
    certificates.ensure()
    assert certificates.of("order").certificate.read_bytes() != before


def test_private_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Keys are 0600 in a folder that is 0700."""
    folder = tmp_path / "tls"
    Certificates(folder).ensure()
    TokenKey(tmp_path / "jwt").ensure()
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in [*folder.iterdir(), *(tmp_path / "jwt").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_a_token_verifies_against_the_jwks_and_says_who_calls(tmp_path: Path) -> None:
    """ES256, with issuer, audience, subject, merchant, roles and an end."""
    key = TokenKey(tmp_path)
    key.ensure()
    token = key.token(
        merchant="acme", roles=("merchant", "operator"), lifetime=dt.timedelta(minutes=5)
    )
    (published,) = json.loads(key.jwks.read_text())["keys"]
    assert jwt.get_unverified_header(token)["kid"] == published["kid"]
    claims = jwt.decode(
        token, jwt.PyJWK(published), algorithms=["ES256"], audience=AUDIENCE, issuer=ISSUER
    )
    assert claims["merchant"] == "acme"
    assert claims["roles"] == ["merchant", "operator"]
    assert claims["sub"] == "acme-cli"
    assert claims["exp"] - claims["iat"] == 300


def test_the_jwks_holds_no_private_number(tmp_path: Path) -> None:
    """`d` is the private key of an elliptic curve JWK."""
    key = TokenKey(tmp_path)
    key.ensure()
    (published,) = json.loads(key.jwks.read_text())["keys"]
    assert "d" not in published
