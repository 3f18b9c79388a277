"""The ``deepspeed`` command: whose ``-m`` it is, and two real launches of two ranks each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ds_inpaint import launcher

COMMAND = Path(sys.executable).with_name("deepspeed")

PROBE = """
import json, os, pathlib, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
seen = {name: os.environ[name] for name in names} | {"argv": sys.argv[1:], "pid": os.getpid()}
folder, mode = pathlib.Path(sys.argv[2]), sys.argv[3]
written = folder / ("writing" + seen["RANK"])
written.write_text(json.dumps(seen))
written.rename(folder / ("rank" + seen["RANK"]))
while mode == "wait" or len(list(folder.glob("rank*"))) < 2:
    time.sleep(0.05)
sys.exit(3 if seen["RANK"] == "1" else 0)
"""


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("-m pkg.run x.yaml", "--module pkg.run x.yaml"),
        ("--num_gpus 2 -m pkg.run x.yaml", "--num_gpus 2 --module pkg.run x.yaml"),
        ("-m --num_gpus 2 pkg.run", "--module --num_gpus 2 pkg.run"),
        ("-H hosts -i a:0@b:1 -e c -q -m pkg.run", "-H hosts -i a:0@b:1 -e c -q --module pkg.run"),
        ("--hostfile=hosts --master_port=1 -m pkg.run", "--hostfile=hosts --master_port=1 --module pkg.run"),
        ("--launcher_args x -m pkg.run", "--launcher_args x --module pkg.run"),
        ("-m pkg.run -m other", "--module pkg.run -m other"),
        ("--module pkg.run -m other", "--module pkg.run -m other"),
        ("train.py -m other", "train.py -m other"),
        ("--num_gpus 2 train.py x.yaml -m", "--num_gpus 2 train.py x.yaml -m"),
        ("--no_python tool --num_gpus 2 -m pkg", "--no_python tool --num_gpus 2 -m pkg"),
        ("--include train.py -m pkg.run", "--include train.py --module pkg.run"),
        ("--module pkg.run --module", "--module pkg.run --module"),
        ("--num_gpus 2 train.py", "--num_gpus 2 train.py"),
        ("", ""),
    ],
)
def test_m_is_the_launchers_only_before_the_program(given, spelled):
    assert launcher.spell_module(given.split()) == spelled.split()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("--hostfile -m pkg.run", "-H/--hostfile: expected one argument"),
        ("--num_gpus 2 -m", "the following arguments are required: user_script"),
        ("--num_gpu5 2 -m pkg.run", "unrecognized arguments: --num_gpu5"),
    ],
)
def test_a_broken_command_line_gets_deepspeeds_own_complaint(given, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        launcher.spell_module(given.split())
    assert complaint in capsys.readouterr().err


def test_a_job_gets_a_free_port_unless_it_asks_for_one():
    assert launcher.port_options(given=29500) == []
    [option] = launcher.port_options(given=0)
    name, port = option.split("=")
    assert name == "--master_port"
    with socket.create_server(("127.0.0.1", int(port))):
        assert launcher.port_options(given=0) != [option]


@pytest.mark.parametrize(
    ("device", "num_gpus", "before", "after"),
    [
        ("cpu", 2, {}, {"OMP_NUM_THREADS": "4"}),
        ("cpu", 3, {}, {"OMP_NUM_THREADS": "2"}),
        ("cpu", 99, {}, {"OMP_NUM_THREADS": "1"}),
        ("cpu", 2, {"OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7"}),
        ("cuda", 2, {}, {}),
    ],
)
def test_ranks_divide_the_cores_of_a_cpu(monkeypatch, device, num_gpus, before, after):
    environment = dict(before)
    monkeypatch.setattr(launcher.get_accelerator(), "device_name", lambda: device)
    monkeypatch.setattr(launcher.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(launcher.os, "environ", environment)
    launcher.divide_cores(num_gpus)
    assert environment == after


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ("--node_rank=0", 3),
        ("--node_rank=1", 2),
        ("--node_rank=0 --num_gpus=1", 1),
        ("--node_rank=0 --include b:0", 1),
        ("--node_rank=1 --exclude b:1", 1),
        ("--node_rank=2", 0),
        ("--node_rank=1 --num_nodes=1", 0),
        ("", 0),
    ],
)
def test_a_machine_of_a_hostfile_knows_how_many_ranks_share_its_cores(tmp_path, given, ranks):
    (tmp_path / "hosts").write_text("a slots=3\nb slots=2\n")
    arguments = [f"--hostfile={tmp_path / 'hosts'}", "--no_ssh", *given.split(), "train.py"]
    assert launcher.slots_here(launcher.runner.parse_args(arguments)) == ranks


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Two launches at once: ``-m`` of a program that fails, ``--module`` of one that waits to be ended."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "probe.py").write_text(PROBE)
    environment = os.environ | {"PYTHONPATH": str(folder), "DS_ACCELERATOR": "cpu"}
    jobs = {}
    for mode, spelling in (("fail", "-m"), ("wait", "--module")):
        (folder / mode).mkdir()
        arguments = [str(folder / mode), mode, "-m", "--num_gpus", "5"]
        jobs[mode] = subprocess.Popen(
            [COMMAND, "--num_gpus", "2", "--quiet", spelling, "probe", *arguments],
            env=environment,
            cwd=folder,
        )
    yield folder, jobs
    for job in jobs.values():
        job.kill()


def wait_for_ranks(folder: Path) -> list[dict]:
    """What both ranks of a launch saw, once they run."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("rank*"))) < 2:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(2)]


def test_ranks_know_their_place_and_a_failing_one_gives_its_exit_code(launched):
    folder, jobs = launched
    for rank, seen in enumerate(wait_for_ranks(folder / "fail")):
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert seen["argv"] == [f"--local_rank={rank}", str(folder / "fail"), "fail", "-m", "--num_gpus", "5"]
        assert int(seen["OMP_NUM_THREADS"]) >= 1
    assert jobs["fail"].wait(timeout=60) == 3


def test_a_signal_ends_the_ranks_too(launched):
    folder, jobs = launched
    ranks = wait_for_ranks(folder / "wait")
    jobs["wait"].send_signal(signal.SIGTERM)
    assert jobs["wait"].wait(timeout=60) == 128 + signal.SIGTERM
    assert not any(psutil.pid_exists(seen["pid"]) for seen in ranks)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit(-9)", 128 + signal.SIGKILL),  # as DeepSpeed tells of a rank
        ("import os; os.kill(os.getpid(), 15)", 128 + signal.SIGTERM),
        ("import os, time; os.kill(os.getppid(), 15); time.sleep(60)", 128 + signal.SIGTERM),
    ],
)
def test_exit_codes_are_those_that_shells_expect(program, code):
    supervised = f"""
import sys
from ds_inpaint import launcher
sys.exit(launcher.supervise([sys.executable, "-c", {program!r}]))
"""
    assert subprocess.run([sys.executable, "-c", supervised], timeout=60).returncode == code
