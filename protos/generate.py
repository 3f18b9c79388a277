"""Generate the python modules of every .proto file in this package.

    python -m ds_inpaint_protos.generate [FOLDER]

FOLDER is the root to write under; without it the modules beside the .proto files are replaced. A message
module refuses to run under a protobuf older than the compiler, so use the pinned grpcio-tools, the oldest
supported one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "ds_inpaint_protos"
SOURCE = Path(__file__).resolve().parent


def generate(destination: Path) -> list[Path]:
    """Write the generated modules under ``destination``, laid out as in this package.

    Returns their paths relative to ``destination``.

    Raises:
        RuntimeError: the compiler found a mistake in a .proto file; it says which on stderr.
    """
    from grpc_tools import protoc  # a development dependency, absent where the package is only used

    written = []
    with tempfile.TemporaryDirectory() as folder:
        for proto in sorted(SOURCE.rglob("*.proto")):
            # The virtual path PACKAGE/... makes the generated modules import each other from the package.
            status = protoc.main(
                [
                    "protoc",
                    f"-I{PACKAGE}={SOURCE}",
                    f"--python_out={folder}",
                    f"--pyi_out={folder}",
                    f"--grpc_python_out={folder}",
                    f"{PACKAGE}/{proto.relative_to(SOURCE)}",
                ]
            )
            if status != 0:
                raise RuntimeError(f"protoc could not compile {proto}; its messages are above.")
        root = Path(folder) / PACKAGE
        for module in sorted(path.relative_to(root) for path in root.rglob("*.py*")):
            (destination / module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / module, destination / module)
            written.append(module)
    return written


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE
    for module in generate(target):
        print(target / module)
