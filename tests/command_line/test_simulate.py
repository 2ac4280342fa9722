"""`cotune simulate`: a report from a file and a folder, and errors that say what to correct."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from command_line.exit_codes import ExitCode
from tests.command_line.conftest import Cotune
from tests.simulation.tiny_world import World, build


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


def experiment(world: World, *, steps: int = 2, slms: tuple[str, ...] = ("gpt2", "qwen2")) -> str:
    return f"""
name = "two devices"
rounds = 1
llm = "{world.model("llama")}"
slms = {json.dumps([world.model(each) for each in slms])}
probe_rows = 6
measured_length = 96
proxy = {{ source = "prune", layers = 1, steps = 1, batch_size = 4, max_length = 64 }}
evaluation = {{ validation_rows = 4, test_rows = 3, max_new_tokens = 3 }}

[common]
training = {{ steps = {steps}, batch_size = 4, max_length = 64 }}
server = {{ steps = 1, batch_size = 4, max_length = 64 }}

[[strategies]]
name = "co_plms"
kind = "method"
domain_steps = 1

[[strategies]]
name = "standalone"
"""


def test_a_report_that_is_not_computed_twice(world: World, tmp_path: Path, run_cotune: Cotune) -> None:
    config, out = tmp_path / "config.toml", tmp_path / "results" / "two.json"
    config.write_text(experiment(world))
    arguments = ("simulate", str(config), "--data", str(world.data), "--out", str(out), "--cache", str(tmp_path / "c"))
    ended = run_cotune(*arguments, "--seeds", "2")
    assert ended.code == ExitCode.OK, ended.err
    assert "two devices: devices on their own test rows" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[2:5]] == ["before", "co_plms", "standalone"]
    report = json.loads(out.read_text())
    assert report["runs"] == ["seed 0, checkpoint 0", "seed 1, checkpoint 0"]
    gates = ["nothing seen before", "LLM answers", "LLM leads", "proxy keeps the lead"]
    assert [each["name"] for each in report["gates"]] == gates
    assert "LLM leads: lowest: " in ended.err
    assert [each["architecture"] for each in report["devices"]] == ["gpt2", "qwen2"]
    assert out.with_suffix(".md").read_text().startswith("# two devices\n")
    again = run_cotune(*arguments, "--seeds", "2")
    assert again.code == ExitCode.OK
    assert "6 runs, 0 to play, 6 there already" in again.err
    assert json.loads(out.read_text())["strategies"] == report["strategies"]


def test_what_cannot_be_played_is_told_before_anything_trains(world: World, tmp_path: Path, run_cotune: Cotune) -> None:
    config = tmp_path / "config.toml"
    common = ("simulate", str(config), "--data", str(world.data), "--out", str(tmp_path / "r.json"))
    common += ("--cache", str(tmp_path / "c"))
    config.write_text(experiment(world, steps=0))
    ended = run_cotune(*common)
    assert ended.code == ExitCode.BAD_INPUT
    assert "strategies.standalone.training.steps: Input should be greater than or equal to 1, got 0" in ended.err
    config.write_text(experiment(world, slms=("gpt2", "nowhere")))
    ended = run_cotune(*common)
    assert ended.code == ExitCode.BAD_INPUT
    assert "nowhere: expected a model folder, found nothing there" in ended.err
    assert ended.out == ""
    assert list((tmp_path / "c").iterdir()) == []


def test_a_folder_is_no_report(world: World, tmp_path: Path, run_cotune: Cotune) -> None:
    config = tmp_path / "config.toml"
    config.write_text(experiment(world))
    ended = run_cotune("simulate", str(config), "--data", str(world.data), "--out", str(tmp_path))
    assert ended.code == ExitCode.BAD_INPUT
    assert "expected --out to name a file, got the folder" in ended.err


def test_several_processes_write_the_same_report(world: World, tmp_path: Path, run_cotune: Cotune) -> None:
    config = tmp_path / "config.toml"
    config.write_text(experiment(world))
    reports = []
    for processes in ("1", "2"):
        out = tmp_path / f"{processes}.json"
        arguments = ("simulate", str(config), "--data", str(world.data), "--out", str(out), "--seeds", "2")
        ended = run_cotune(*arguments, "--cache", str(tmp_path / processes), "--processes", processes)
        assert ended.code == ExitCode.OK, ended.err
        reports.append(json.loads(out.read_text()))
        assert ("co_plms, seed 1, checkpoint 0: done" in ended.err) == (processes == "2")
    one, two = reports
    measured = ("devices", "by_device", "cloud", "transfer", "runs")
    for ours, theirs in zip(one["strategies"], two["strategies"], strict=True):
        assert {name: ours[name] for name in measured} == {name: theirs[name] for name in measured}
    assert one["gates"] == two["gates"]


def test_ctrl_c_ends_every_process(world: World, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(experiment(world, steps=100_000))
    program = [sys.executable, "-c", "from command_line.main import main; main()", "simulate", str(config)]
    options = ["--data", str(world.data), "--out", str(tmp_path / "r.json"), "--seeds", "2", "--processes", "2"]
    started = subprocess.Popen(
        [*program, *options, "--cache", str(tmp_path / "c")],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert started.stderr is not None
        told = []
        for line in started.stderr:
            told.append(line)
            if "standalone, seed 0" in line or "co_plms, seed 1" in line:
                break  # the runs of the base models are over: both processes play
        children = psutil.Process(started.pid).children(recursive=True)
        assert len(children) >= 2, told
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to all of them
        rest = started.stderr.read()
        assert started.wait(60) == ExitCode.INTERRUPTED, rest
        assert "Traceback" not in rest
        assert [each for each in psutil.wait_procs(children, timeout=10)[1] if each.is_running()] == []
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        assert started.stderr is not None
        started.stderr.close()
