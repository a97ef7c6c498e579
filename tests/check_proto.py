"""Fails when baton/v1 is not what proto/baton/v1 generates. Run as `python -m tests.check_proto`."""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    tools = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable, "-m", "grpc_tools.protoc", "-I.",
                f"--plugin=protoc-gen-mypy={tools}/protoc-gen-mypy",
                f"--plugin=protoc-gen-mypy_grpc={tools}/protoc-gen-mypy_grpc",
                f"--python_out={folder}", f"--grpc_python_out={folder}",
                f"--mypy_out=quiet:{folder}", f"--mypy_grpc_out=quiet:{folder}", *protos,
            ],
            cwd=ROOT / "proto",
            check=True,
        )  # fmt: skip
        fresh = {path.name for path in Path(folder, "baton", "v1").iterdir()}
        kept = {path.name for path in (ROOT / "baton" / "v1").glob("*_pb2*")}
        _, differing, missing = filecmp.cmpfiles(
            Path(folder, "baton", "v1"), ROOT / "baton" / "v1", sorted(fresh), shallow=False
        )
    stale = sorted({*differing, *missing, *(kept - fresh)})
    if stale:
        print(f"baton/v1 is not what proto/ generates: {', '.join(stale)}. Run: make proto", file=sys.stderr)
        return 1
    print(f"baton/v1: {len(fresh)} generated files are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
