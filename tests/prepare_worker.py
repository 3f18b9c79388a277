"""Ranks that prepare one dataset again and again: alone, together, and after a kill at each of several places.

python tests/prepare_worker.py OUT ARGUMENT ...

The arguments are those of the command without ``--out``. Leaves ``OUT/alone``, by rank 0; ``OUT/together``, by all
ranks; and ``OUT/PLACE`` for each of KILLED, begun by rank 0 alone and finished by all. Some of the rows are bad.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from ds_inpaint import cache, commands, outputs, policies, prepare
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError, RowsRejected
from ds_inpaint.outputs import write_whole
from ds_inpaint.zero_config import setup

KILLED = {
    "before_the_plan": "plan.json",
    "after_a_prompt_shard": "prompts/00001.safetensors",
    "inside_a_shard": "rows/00002.safetensors",
    "before_a_listing": "rows/00001.json",
    "before_an_index": "heldout.jsonl",
    "before_the_manifest": "manifest.json",
}
"""The file whose writing each kill interrupts, after half of what lies beside it under another name meanwhile."""
EXIT_CODE = 9


def killing(victim: Path) -> Callable:
    """What writes files, but for ``victim``, in whose middle the process ends."""

    def write(file: Path, content: Callable) -> None:
        if file == victim:
            beside = file.with_name(f"{file.name}.tmp")
            content(beside)
            os.truncate(beside, beside.stat().st_size // 2)
            os._exit(EXIT_CODE)
        write_whole(file, content)

    return write


def kill(out: Path, arguments: list[str], victim: str) -> None:
    """Prepare in a child process that dies while it writes ``victim``."""
    child = os.fork()
    if child == 0:
        write = killing(out / victim)
        with patch.object(cache, "write_whole", write), patch.object(outputs, "write_whole", write):
            prepare.main([*arguments, "--out", str(out)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_CODE, victim


def refuse(*arguments: object) -> None:
    raise InputError("planted")


def main(out: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0":
        alone = Ranks(0, 1, torch.device("cpu"))
        with patch.object(prepare, "setup", lambda section: alone):
            for place, victim in KILLED.items():
                kill(out / place, arguments, victim)
            assert prepare.main([*arguments, "--out", str(out / "alone")]) == RowsRejected.exit_code
    ranks = setup(policies.Inference().section)
    with (
        patch.object(prepare, "setup", lambda section: ranks),
        patch.object(Ranks, "leave", lambda self: None),
        patch.object(commands, "SECONDS_FOR_RANK_0", 0),
    ):
        for name in ("together", *KILLED):
            code = RowsRejected.exit_code if ranks.is_main else 0
            assert prepare.main([*arguments, "--out", str(out / name)]) == code
        # A rank that cannot go on alone takes the others along.
        with patch.object(prepare, "_encode_prompts", refuse) if ranks.is_main else nullcontext():
            assert prepare.main([*arguments, "--out", str(out / "refused")]) == InputError.exit_code
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
