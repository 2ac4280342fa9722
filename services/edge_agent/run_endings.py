"""The step after the last round: what a device still learns when a run is completed, where the strategy says so.

Nothing is sent but the question. It is asked between two cycles, from the last round's submission until the run has
ended. The state that it leads to follows that of the last round, so a kill at any point repeats the step or has it.
"""

from functools import partial

import structlog

from edge_agent.cycle import Agent, about, check_assignment, fetch, told
from edge_agent.errors import CannotTrain, CloudRefused, CloudUnavailable, NotAuthorised, Stopped, UnknownStrategy
from edge_agent.local_state import LocalState, WriteState
from protocol.assignments import Assignment

log = structlog.get_logger(__name__)


def end_runs(agent: Agent) -> None:
    """Ask for the last step of every run that this device has played to the end, and take it where it has come.

    Raises:
        Stopped: the process shall stop.
        NotAuthorised: the server does not accept this device.
    """
    for state in agent.states.newest():
        if not state.record.last_step_due:
            continue
        try:
            came, write_state = _last_step(agent, state)
        except NotAuthorised:
            raise
        except CloudUnavailable as error:
            log.warning("last_step_put_off", reason=str(error))
            continue
        except (CannotTrain, CloudRefused, UnknownStrategy) as error:
            log.warning("last_step_left_out", reason=str(error))
            came, write_state = True, None
        if came:
            agent.states.settle(state, write_state)
            agent.states.end_training(state.record.run_id)


def _last_step(agent: Agent, state: LocalState) -> tuple[bool, WriteState | None]:
    """Whether the run has ended, and what is to be written then."""
    assignment = agent.client.last_step(state.record.assignment_id)
    if assignment is None:
        return False, None
    with about(assignment, "last_step"):
        _require_same_run(assignment, state)
        check_assignment(assignment)
        files = fetch(agent, assignment)
        write_state = told(partial(agent.trainer().last_step, assignment, files, state, partial(_go_on, agent)))
        log.info("last_step_done", changed=write_state is not None)
    return True, write_state


def _require_same_run(assignment: Assignment, state: LocalState) -> None:
    """What is written takes the place after the state that it was learnt from, and ends the asking."""
    record = state.record
    expected = (record.run_id, record.assignment_id, record.round_number + 1)
    received = (assignment.run_id, assignment.assignment_id, assignment.round_number)
    if received != expected:
        raise CannotTrain("other_assignment", f"expected the step after {expected}, got {received}")


def _go_on(agent: Agent, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    del stage, step, steps, losses  # there is nobody to tell
    if agent.stop.is_set():
        raise Stopped
