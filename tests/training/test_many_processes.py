"""torchrun: two hosts, and a process that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import ROOT, command, differences, environment, logged, train

from resdet.training.checkpoint import newest_whole

RUN = ("train.steps=12", "train.save_every=1", "train.eval_every=6", "resume=auto")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def start(
    folder: Path, *torchrun: str, num_processes: int = 1, overrides: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *RUN, *overrides, num_processes=num_processes, torchrun=torchrun),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_host")
    train(folder, *RUN, num_processes=2)
    return folder


@pytest.mark.slow
def test_two_hosts_are_the_same_run(on_one_host: Path, tmp_path: Path) -> None:
    """Two agents of torchrun that know nothing of each other but one address, one process each."""
    where = f"127.0.0.1:{free_port()}"
    torchrun = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", where)
    hosts = [start(tmp_path / "run", *torchrun) for _ in range(2)]
    for host in hosts:
        _, told = host.communicate(timeout=300)
        assert host.returncode == 0, told
    assert differences(on_one_host / "last.pt", tmp_path / "run" / "last.pt") == []


def workers_of(agent: int) -> list[int]:
    """Give the training processes of torchrun's agent, without their own children."""
    children = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    return [pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_restarted_and_the_run_ends_right(rank: int, on_one_host: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agent = start(folder, "--standalone", "--max-restarts", "2", num_processes=2)
    while not (folder / "previous.pt").exists():
        assert agent.poll() is None
        time.sleep(0.05)
    os.kill(workers_of(agent.pid)[rank], signal.SIGKILL)
    _, told = agent.communicate(timeout=300)
    assert agent.returncode == 0, told
    assert "resumed from" in told
    assert "another process of this run died or cannot be reached any more" in told
    assert "Traceback" not in told
    assert differences(on_one_host / "last.pt", folder / "last.pt") == []
    assert logged(folder, "loss") == logged(on_one_host, "loss")


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_them_in_good_order(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    agent = start(folder, "--standalone", num_processes=2)
    while not (folder / "last.pt").exists():
        assert agent.poll() is None
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    _, told = agent.communicate(timeout=120)
    assert told.count("stopped by SIGTERM after step ") == 1, told
    done = train(folder, *RUN, num_processes=2)
    assert "resumed from" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_all_processes_while_a_data_worker_of_one_hangs(rank: int, tmp_path: Path) -> None:
    """By themselves, before torchrun kills them."""
    folder = tmp_path / "run"
    agent = start(folder, "--standalone", num_processes=2, overrides=("train.steps=2000", "loader.num_workers=1"))
    while not (folder / "previous.pt").exists():
        assert agent.poll() is None
        time.sleep(0.05)
    processes = workers_of(agent.pid)
    os.kill(workers_of(processes[rank])[0], signal.SIGSTOP)
    time.sleep(5)
    agent.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    _, told = agent.communicate(timeout=120)
    assert time.monotonic() - begun < 25, "torchrun kills after 30 s"
    assert f"process {rank}: ended while it waited for images or evaluated" in told
    assert rank or "ended at once by SIGTERM: what was saved before is whole" in told
    assert newest_whole(folder) == folder / "last.pt"
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
