"""Local states: adopted in one step, found by round, pruned."""

from pathlib import Path

from edge_agent.local_state import SLM_ADAPTER, LocalStates, StateRecord, write_record


def stage(folder: Path, number: int, run_id: str = "run_1") -> Path:
    staged = folder / "staged" / str(number)
    (staged / SLM_ADAPTER).mkdir(parents=True)
    (staged / SLM_ADAPTER / "psi").write_text(f"psi {number}")
    write_record(
        staged,
        StateRecord(
            run_id=run_id,
            run_name="a run",
            round_number=number,
            assignment_id=f"asg_{number}",
            adapter_sha256=f"{number:064d}",
            num_examples=3,
        ),
    )
    return staged


def test_a_round_starts_from_the_newest_earlier_state(tmp_path: Path) -> None:
    states = LocalStates(tmp_path / "runs")
    assert states.before("run_1", 1) is None
    assert states.newest() == []
    for number in (1, 2):
        states.adopt(stage(tmp_path, number))
    assert states.before("run_1", 1) is None
    for number, expected in ((2, 1), (3, 2), (9, 2)):
        state = states.before("run_1", number)
        assert state is not None
        assert state.record.round_number == expected
        assert (state.slm_adapter / "psi").read_text() == f"psi {expected}"
        assert state.domain_adapter is None
    assert states.before("run_2", 3) is None


def test_only_the_last_two_rounds_are_kept(tmp_path: Path) -> None:
    states = LocalStates(tmp_path / "runs")
    replaced = [states.adopt(stage(tmp_path, number)) for number in (1, 2, 3, 11)]
    assert [[one.round_number for one in records] for records in replaced] == [[], [], [1], [2]]
    assert [state.record.round_number for state in states.newest()] == [11]
    assert len(list((tmp_path / "runs" / "run_1" / "rounds").iterdir())) == 2


def test_adopting_again_after_a_crash_is_harmless(tmp_path: Path) -> None:
    states = LocalStates(tmp_path / "runs")
    staged = stage(tmp_path, 1)
    states.adopt(staged)
    assert states.adopt(staged) == []
    states.adopt(stage(tmp_path, 1))
    assert [state.record.round_number for state in states.newest()] == [1]


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    states = LocalStates(tmp_path / "runs")
    states.adopt(stage(tmp_path, 4, "run_a"))
    states.adopt(stage(tmp_path, 2, "../run_b"))
    assert {state.record.run_id for state in states.newest()} == {"run_a", "../run_b"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "staged"}
