"""What every test gets: a fixed seed, poisoned memory, a backend; and the count of what ran."""

import ctypes
import json
from pathlib import Path

import hypothesis
import pytest
import torch

import fast_transformer as ft
from fast_transformer import _library

COUNT_FILE = Path(__file__).parent / "executed_cases.json"

# the same examples at every run; a kernel's first call on a busy machine may be slow
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("suite")


def pytest_report_header():
    """Say on what the suite runs."""
    status = _library.status()
    isa = status.isa or status.reason
    return f"fast_transformer: {isa}; torch {torch.__version__}, {torch.get_num_threads()} threads"


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Fill what malloc hands out with 0x7f: 3.4e38 in float32 and bfloat16, NaN in float16.

    torch.utils.deterministic.fill_uninitialized_memory would reach neither the kernels' scratch nor
    outputs that are allocated below torch.empty. glibc only; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_perturb, complement = -6, 0x80
        mallopt(m_perturb, complement)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of torch's generator, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernels():
    """Skip where the CPU kernels are not built."""
    reason = _library.status().reason
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cpu(kernels):
    """Run the test's ops on the CPU kernels, or not at all."""
    with ft.backend("cpu"):
        yield


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Run the test on the CPU kernels, and again on the reference."""
    if request.param == "cpu":
        request.getfixturevalue("cpu")
        yield "cpu"
    else:
        with ft.backend("reference"):
            yield "reference"


@pytest.fixture
def threads():
    """A function that sets torch's thread count until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_addoption(parser):
    """Add --accept-count."""
    parser.addoption(
        "--accept-count",
        action="store_true",
        help=f"write the number of tests that passed to {COUNT_FILE.name}",
    )


def pytest_sessionfinish(session):
    """Fail when the whole suite ran fewer tests than the committed count says."""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    part = config.option.keyword or getattr(config.option, "lf", False)
    chosen = part or config.args != config.getini("testpaths")
    if reporter is None or hasattr(config, "workerinput") or chosen or session.testsfailed:
        return
    selection = config.option.markexpr or "all"
    counts = json.loads(COUNT_FILE.read_text()) if COUNT_FILE.exists() else {}
    # a test for each instruction set of the machine is the machine's business
    own = tuple(f"[{isa}]" for isa in _library.status().available)
    reports = [r for r in reporter.stats.get("passed", []) if not r.nodeid.endswith(own)]
    passed, expected = len(reports), counts.get(selection, 0)
    if config.option.accept_count:
        COUNT_FILE.write_text(json.dumps(counts | {selection: passed}, indent=2) + "\n")
    elif passed < expected:
        reporter.write_line(
            f"only {passed} tests passed where {COUNT_FILE.name} counts {expected} for "
            f"'{selection}'; if that is meant, run again with --accept-count",
            red=True,
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
