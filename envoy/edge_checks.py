"""Checks: what is committed is up to date, and Envoy accepts every rendering."""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_rendering import HERE, committed_settings, render, write
from edge_routes import SERVICES, route_table
from edge_settings import PLACES, Place, settings_from

README = HERE / "README.md"
COMMITTED = {"compose": HERE / "rendered" / "compose.yaml"}
"""Renderings that are kept in the repository, because docker-compose.yml mounts them."""


def sample_settings(place: Place, folder: Path, descriptor: Path) -> dict[str, object]:
    """Settings for `envoy --mode validate`: real files, made in a folder.

    The committed settings of a place are kept except for paths, so that it is them
    that are validated.
    """
    import trustme
    from cryptography.hazmat.primitives.asymmetric import ec

    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    identities: dict[str, dict[str, str]] = {}
    for name, hosts in {
        "edge-server": ("localhost", "127.0.0.1", "::1"),
        "envoy": ("envoy.mesh",),
        "edge": ("edge.mesh",),
    }.items():
        issued = authority.issue_cert(*hosts, key_type=trustme.KeyType.ECDSA)
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        identities[name] = {"certificate": str(certificate), "key": str(key)}

    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    x, y = (
        base64.urlsafe_b64encode(number.to_bytes(32, "big")).decode().rstrip("=")
        for number in (numbers.x, numbers.y)
    )
    key_set = {"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1", "x": x, "y": y}]}
    (folder / "jwks.json").write_text(json.dumps(key_set))

    if place.name == "embedded":
        document: dict[str, object] = {
            "edge": {"host": "127.0.0.1", "port": 18443},
            "internal": {"host": "127.0.0.1", "port": 18444},
            "admin": {"host": "127.0.0.1", "port": 18445},
            "upstreams": {
                name: [["127.0.0.1", 50_001 + index], ["127.0.0.1", 50_101 + index]]
                for index, name in enumerate(SERVICES)
            },
            "jwt": {"issuer": "https://ordermesh.local", "audience": "ordermesh"},
            "otlp": {"host": "127.0.0.1", "port": 4317},
        }
    else:
        document = committed_settings(place)
    for listener, name in (("edge", "edge-server"), ("internal", "envoy")):
        inner = document.get(listener)
        document[listener] = {**(inner if isinstance(inner, dict) else {}), **identities[name]}
    return document | {
        "ca": str(folder / "ca.pem"),
        "upstream_client": identities["edge"],
        "descriptor": str(descriptor),
        "jwks": str(folder / "jwks.json"),
        "access_log": str(folder / "access.log"),
    }


def validate(binary: str, config: Path) -> str:
    """What `envoy --mode validate` has against a file; empty when nothing."""
    done = subprocess.run(
        [binary, "--mode", "validate", "-l", "warning", "-c", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    # A warning counts as well: deprecated fields and removed guards announce themselves so.
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode or said:
        # An error repeats the whole configuration behind what it has to say.
        return "\n".join(line[:600] for line in said) or f"exit {done.returncode}"
    return ""


def validate_all(binary: str, descriptor: Path) -> Iterator[tuple[str, str]]:
    """Renders every place and lets Envoy judge it; yields the place and the complaint."""
    for place in PLACES.values():
        with tempfile.TemporaryDirectory(prefix="envoy-validate-") as name:
            folder = Path(name)
            settings = settings_from(sample_settings(place, folder, descriptor), place)
            config = folder / "envoy.yaml"
            write(config, render(place, settings, descriptor))
            yield place.name, validate(binary, config)


def stale(descriptor: Path) -> list[Path]:
    """The committed files that differ from what would be rendered now."""
    found = []
    for name, path in COMMITTED.items():
        place = PLACES[name]
        text = render(place, settings_from(committed_settings(place), place), descriptor)
        if not path.exists() or path.read_text() != text:
            found.append(path)
    if route_table(descriptor) not in README.read_text():
        found.append(README)
    return found
