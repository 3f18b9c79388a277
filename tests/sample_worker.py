"""One rank of ``ds_inpaint.sample``; with a number after the dashes it dies like a killed process at that file.

python tests/sample_worker.py ARGUMENTS... [-- NUMBER]
"""

from __future__ import annotations

import os
import signal
import sys
from unittest.mock import patch

from ds_inpaint import sample


def main(arguments: list[str]) -> int:
    if "--" not in arguments:
        return sample.main(arguments)
    dashes = arguments.index("--")
    left = int(arguments[dashes + 1])
    plain = sample.write_whole

    def write_or_die(*inputs):
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        plain(*inputs)

    with patch.object(sample, "write_whole", write_or_die):
        return sample.main(arguments[:dashes])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
