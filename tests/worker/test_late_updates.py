"""A late update in a real aggregation: its weight, once, also when the worker is killed before it has written."""

import dataclasses
from typing import Any

import numpy as np

from assets.tensors import read_tensors
from persistence import jobs
from persistence.clock import utc_now
from protocol.runs import RoundMetrics
from protocol.statuses import AssignmentStatus, PartKind, RunStatus
from tests.worker.cloud import Cloud
from worker.aggregation import aggregate
from worker.leases import Lease
from worker.stage import Work


def test_it_weighs_less_and_counts_once(cloud: Cloud, llm: str) -> None:
    """theta_bar = theta_1 + (n_a d_a + n_b (1+1)^-a d_b) / (n_a + n_b (1+1)^-a), with d_b trained from theta_0."""
    quick, slow = cloud.enrol("quick", "slow")
    strategy = {"server": {"steps": 0}}
    settings = {"late_updates": "next_round", "staleness_exponent": 0.7, "rounds": 3, "min_updates": 1}
    tolerant = {"validation_rows": 4, "test_rows": 0, "max_new_tokens": 4, "tolerance_bits_per_byte": 100}
    run = cloud.create_run(llm, strategy=strategy, evaluation=tolerant, **settings)
    cloud.work()
    late = cloud.take(slow)
    cloud.deliver_untrained(quick, seed=1)
    cloud.work()
    assert cloud.version(run.run_id, 1).promoted
    old = cloud.untrained_update(late, seed=2, scale=0.1)
    cloud.deliver(late, slow, cloud.as_parts(old), num_examples=6)
    assert cloud.statuses(run.run_id) == [AssignmentStatus.COUNTED, AssignmentStatus.LATE]

    fresh = cloud.take(quick)
    new = cloud.untrained_update(fresh, seed=3, scale=0.1)
    cloud.deliver(fresh, quick, cloud.as_parts(new), num_examples=8)
    _killed_before_it_writes(cloud)
    cloud.work()

    assert cloud.statuses(run.run_id) == [AssignmentStatus.COUNTED] * 2
    metrics = RoundMetrics.model_validate(cloud.round(run.run_id, 2).metrics)
    assert (metrics.num_updates, metrics.num_examples) == (2, 14)
    assert metrics.late_updates == {late.assignment_id: 1}
    assert set(metrics.teacher_rows.get("proxy", {})) <= {quick}
    before, after = (_theta(cloud, run.run_id, number) for number in (1, 2))
    weights = {"new": 8.0, "old": 6 * 2**-0.7}
    for name, theta in before.items():
        mean = sum(
            weights[key] * each[PartKind.ADAPTER_DELTA][name].double().numpy()
            for key, each in (("new", new), ("old", old))
        ) / sum(weights.values())
        np.testing.assert_allclose(after[name].numpy(), theta.numpy() + mean, rtol=1e-5, atol=1e-7)

    cloud.deliver_untrained(quick, seed=4)
    cloud.work()
    assert [cloud.version(run.run_id, number).num_updates for number in (1, 2, 3)] == [1, 2, 1]
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED


def _killed_before_it_writes(cloud: Cloud) -> None:
    """Do the whole aggregation and write nothing, as a worker that is killed; then its lease runs out."""
    runner = cloud.make_runner("killed")
    job = cloud.call(jobs.claim, cloud.sent[0], "killed", -1.0, utc_now())
    assert job is not None
    with Lease(lambda: True, 60, runner.stop) as lease:
        assert aggregate(_work(cloud, job, lease)) is not None


def _work(cloud: Cloud, job: jobs.JobRecord, lease: Lease) -> Work:
    return dataclasses.replace(cloud.runner._work(job, lease), owner="killed")


def _theta(cloud: Cloud, run_id: str, number: int) -> dict[str, Any]:
    sha256 = cloud.version(run_id, number).proxy_adapter_sha256
    assert sha256 is not None
    return dict(read_tensors(cloud.blobs.path(sha256))[0])
