"""Ops called from many threads at once, and in a process that was forked."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fast_transformer as ft
from fast_transformer import testing

CASES = [testing.cases("attention", "test")[8], testing.cases("mlp", "test")[4]]
CASES += [case for case in testing.CASES if case.name in ("everything", "add-dropout-sum")]


def results(case):
    with ft.backend("cpu"):
        return testing.evaluate(case.op, case.inputs(torch.float32), case.wrt)


def agrees(case, expected):
    return all(torch.equal(x, expected[name]) for name, x in results(case).items())


def test_many_threads(kernels):
    expected = [results(case) for case in CASES]
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(agrees, case, x)
            for _ in range(20)
            for case, x in zip(CASES, expected, strict=True)
        ]
        assert all(job.result() for job in jobs)


def in_child(expected):
    torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads did not come along
    raise SystemExit(not all(agrees(*pair) for pair in zip(CASES, expected, strict=True)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_fork(kernels):
    expected = [results(case) for case in CASES]
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(expected,))
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive and child.exitcode == 0
