"""Turns protos/ into generated/, and compares the two.

Everything needed comes from installed packages: protoc and google.protobuf from
grpcio-tools, google.api and google.rpc from googleapis-common-protos, and the rules of
buf.validate from protovalidate, which holds them as a descriptor and not as a file.

    python tools/protos.py generate        writes generated/
    python tools/protos.py check           fails when generated/ is not what protos/ say
    python tools/protos.py image PATH      writes a descriptor set with comments, for buf
"""

import argparse
import filecmp
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "generated"

VALIDATE = "buf/validate/validate.proto"
"""Held by protovalidate as a descriptor; its Python module is in no package, so it is generated."""

ERROR_DETAILS = "google/rpc/error_details.proto"
"""No proto of ours imports it, but Envoy needs it to write a status's details as JSON."""

STATUS = ("google/rpc/code.proto", "google/rpc/status.proto")
"""What gRPC puts on the wire when a call fails; no proto of ours imports it either."""

TYPINGS = "typings"
"""The folder in generated/ with type stubs of google.api and google.rpc: their package has none."""

DESCRIPTOR_SET = "ordermesh.binpb"
"""The file in generated/ that Envoy's transcoder, `buf curl` and the next release's check read."""


class ProtocError(Exception):
    """Raised when protoc refuses its input; protoc has printed why."""


def our_protos() -> list[str]:
    """The files under protos/, as protos import them, in a fixed order."""
    found = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    if not found:
        message = f"no .proto file under {PROTOS}"
        raise FileNotFoundError(message)
    return found


def validate_descriptor() -> bytes:
    """The descriptor set of buf/validate/validate.proto, taken from protovalidate."""
    # The wheel has no public way to it. Should a release move it, this import says so
    # at generation time; nothing at run time depends on it.
    from protovalidate._gen.buf.validate import validate_pb

    described = descriptor_pb2.FileDescriptorProto.FromString(
        validate_pb.Violation.desc().file.proto.to_binary()
    )
    if described.name != VALIDATE:
        message = f"protovalidate describes {described.name}, not {VALIDATE}"
        raise ValueError(message)
    return descriptor_pb2.FileDescriptorSet(file=[described]).SerializeToString(deterministic=True)


def installed_protos() -> Path:
    """The folder that holds google/api and google/rpc as .proto files."""
    spec = importlib.util.find_spec("google.rpc.status_pb2")
    if spec is None or spec.origin is None:
        message = "googleapis-common-protos is not installed"
        raise FileNotFoundError(message)
    return Path(spec.origin).parents[2]


def protoc(arguments: Sequence[str], files: Iterable[str]) -> None:
    """Runs protoc over `files`. Raises ProtocError on errors and on warnings alike."""
    with tempfile.TemporaryDirectory() as scratch:
        validate = Path(scratch) / "validate.binpb"
        validate.write_bytes(validate_descriptor())
        plugins = Path(sys.executable).parent
        done = subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", "--fatal_warnings"),
                *(f"-I{PROTOS}", f"-I{installed_protos()}", f"--descriptor_set_in={validate}"),
                f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
                *arguments,
                *files,
            ],
            check=False,
        )
    if done.returncode != 0:
        message = f"protoc exited with {done.returncode}"
        raise ProtocError(message)


def write_image(path: Path) -> None:
    """Writes all protos with their comments and imports as one descriptor set, for buf to judge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    protoc(
        ["--include_imports", "--include_source_info", f"--descriptor_set_out={path}"],
        [*our_protos(), ERROR_DETAILS],
    )


def generate(into: Path) -> None:
    """Writes Python modules, their type stubs and the descriptor set into an empty folder."""
    protos = our_protos()
    descriptor_set = into / DESCRIPTOR_SET
    protoc(
        ["--include_imports", f"--descriptor_set_out={descriptor_set}"], [*protos, ERROR_DETAILS]
    )
    protoc([f"--python_out={into}", f"--mypy_out=quiet:{into}"], [*protos, VALIDATE])
    # Only files that define a service get client and server classes.
    described = descriptor_pb2.FileDescriptorSet.FromString(descriptor_set.read_bytes())
    with_services = [file.name for file in described.file if file.service and file.name in protos]
    if with_services:
        protoc([f"--grpc_python_out={into}", f"--mypy_grpc_out=quiet:{into}"], with_services)
    typings = into / TYPINGS
    typings.mkdir()
    untyped = {
        file.name
        for file in described.file
        if file.name.startswith("google/") and not file.name.startswith("google/protobuf/")
    }
    protoc([f"--mypy_out=quiet:{typings}"], sorted({*untyped, *STATUS}))


def files_of(folder: Path) -> set[Path]:
    """Every generated file under `folder`, relative to it."""
    return {
        path.relative_to(folder)
        for pattern in ("buf/**/*", "ordermesh/**/*", f"{TYPINGS}/**/*", DESCRIPTOR_SET)
        for path in folder.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def differences(fresh: Path, kept: Path) -> list[Path]:
    """The files that `kept` lacks, has too many of, or has with other content than `fresh`."""
    wanted, found = files_of(fresh), files_of(kept)
    _, changed, unreadable = filecmp.cmpfiles(
        fresh, kept, [path.as_posix() for path in wanted & found], shallow=False
    )
    return sorted({*(wanted ^ found), *map(Path, changed), *map(Path, unreadable)})


def bring_up_to_date(fresh: Path, kept: Path) -> list[Path]:
    """Makes `kept` hold what `fresh` holds, touching only files that differ; returns those."""
    differing = differences(fresh, kept)
    for path in differing:
        target = kept / path
        if (fresh / path).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((fresh / path).read_bytes())
        else:
            target.unlink()
    return differing


def main() -> int:
    """Runs one of the three commands; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("generate", help="write generated/")
    commands.add_parser("check", help="fail when generated/ is not what protos/ say")
    image = commands.add_parser("image", help="write a descriptor set with comments")
    image.add_argument("path", type=Path)
    arguments = parser.parse_args()

    try:
        if arguments.command == "image":
            write_image(arguments.path)
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            fresh = Path(scratch)
            generate(fresh)
            if arguments.command == "generate":
                written = bring_up_to_date(fresh, GENERATED)
                print(f"generated/ is up to date; {len(written)} files changed")
                return 0
            differing = differences(fresh, GENERATED)
    except (ProtocError, OSError, ValueError) as error:
        print(f"tools/protos.py: {error}", file=sys.stderr)
        return 1
    if differing:
        print("generated/ is not what protos/ say; run `make proto` and commit:", file=sys.stderr)
        for path in differing:
            print(f"  generated/{path}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
