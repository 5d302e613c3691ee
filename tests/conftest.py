"""Which step's code a test runs on: all of them, or the reader's own with --step-dir."""

import os
import re
import sys
from pathlib import Path

import milestones
import pytest
from harness import Run, World, run_steps
from small_chain import Chain

ROOT = Path(__file__).parents[1]


def step_number(path):
    found = re.match(r"step(\d+)_", Path(path).name)
    if not found or not Path(path).is_dir():
        raise pytest.UsageError(f"--step-dir {path}: not a directory stepN_…")
    return int(found[1])


def pytest_addoption(parser):
    parser.addoption("--step-dir", type=Path, help="check this version of a step, and only it")
    parser.addoption("--milestone", type=int, help="only the checks up to this one of its lesson")
    parser.addoption("--from-milestone", type=int, default=0, help="and from this one on")


@pytest.hookimpl(tryfirst=True)  # before xdist's own hook, which reads the option
def pytest_cmdline_main(config):
    """The whole run goes in two processes: its tests wait more than they compute."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    own, worker = config.getoption("--step-dir"), "PYTEST_XDIST_WORKER" in os.environ
    if whole and not own and not worker and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    if "gpu" not in config.getoption("-m").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests are about the CPU
    config.addinivalue_line(
        "markers",
        "sampled(*steps, only=False): the first and the last of the chosen steps, and these; with "
        "only=True just these; on others it is slow",
    )
    config.addinivalue_line("markers", "milestone(step, number): a check of a step's milestone")
    config.addinivalue_line(
        "markers",
        "steps(first, last): the steps that a test runs on; with --step-dir any from the first on, "
        "or with only=True none after the last either",
    )


def pytest_generate_tests(metafunc):
    if "step_dir" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("steps")
    first, last = (*marker.args, 99)[:2] if marker else (1, 99)
    if milestone := metafunc.definition.get_closest_marker("milestone"):
        first = last = milestone.args[0]
    own = metafunc.config.getoption("--step-dir")
    if own:  # what an early step shows once, later ones still have to do
        only = milestone or (marker and marker.kwargs.get("only"))
        fits = first <= step_number(own) and not (only and step_number(own) > last)
        chosen = [own.absolute()] if fits else []
    else:
        paths = sorted(ROOT.glob("step[0-9]_*"))
        chosen = [path for path in paths if first <= step_number(path) <= last]
    if sampled := metafunc.definition.get_closest_marker("sampled"):
        ends = () if sampled.kwargs.get("only") or not chosen else (chosen[0], chosen[-1])
        for place, path in enumerate(chosen):
            if not own and path not in ends and step_number(path) not in sampled.args:
                chosen[place] = pytest.param(path, marks=pytest.mark.slow, id=path.name)
    metafunc.parametrize(
        "step_dir", chosen, ids=lambda path: getattr(path, "name", None), scope="session"
    )


# --- a reader's own version -----------------------------------------------------------------------

NEWS = pytest.StashKey()  # what a reader is told at the end, and whether it is good


def pytest_sessionstart(session):
    """Stop at once where nothing can be checked yet; else show less of what fails."""
    config, own = session.config, session.config.getoption("--step-dir")
    if not own:
        return
    step_number(own)
    config.option.maxfail = config.option.maxfail or 1
    config.option.tbstyle = "short" if config.option.tbstyle == "auto" else config.option.tbstyle
    last = config.getoption("--milestone")
    if last and last not in milestones.titles(own):
        known = ", ".join(map(str, milestones.titles(own)))
        raise pytest.UsageError(f"--milestone {last}: the milestones of this step are {known}")
    if last:
        config.args = [str(milestones.checks(own))]
    if config.option.keyword:  # the reader has chosen
        return
    found = milestones.missing(own.absolute())
    if found and found[0] <= (last or 99):
        config.stash[NEWS] = found[1], False
        if found[0] == 1:
            raise pytest.UsageError(found[1])
        config.args = [str(milestones.checks(own))]
        config.option.milestone = found[0] - 1


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--step-dir"):
        return
    first, last = config.getoption("--from-milestone"), config.getoption("--milestone") or 99
    mine = [i for i in items if "step_dir" in i.fixturenames and first <= milestones.of(i) <= last]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = sorted(mine, key=milestones.of)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    own = item.config.getoption("--step-dir")
    if own and report.failed and milestones.of(item) < 99:
        item.config.stash[NEWS] = milestones.not_reached(own, milestones.of(item)), False


def pytest_sessionfinish(session, exitstatus):
    own, last = session.config.getoption("--step-dir"), session.config.getoption("--milestone")
    good = exitstatus == 0 and session.testscollected
    if own and good and NEWS not in session.config.stash and last:
        session.config.stash[NEWS] = f"Milestone {last} is reached.", True
    if good and not session.config.stash.get(NEWS, ("", True))[1]:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if NEWS in config.stash:
        words, good = config.stash[NEWS]
        terminalreporter.write_sep("=", "your step")
        terminalreporter.write_line(words, green=good, red=not good)


@pytest.fixture(scope="session")
def worlds():
    """worlds(step_dir, size): a World that later tests use again, while the step is the same."""
    made = {}

    def get(step_dir, size):
        if (step_dir, size) not in made:
            for other in [key for key in made if key[0] != step_dir]:
                made.pop(other).close()  # ranks that wait still hold memory
            made[step_dir, size] = World(step_dir, size)
        return made[step_dir, size]

    yield get
    for world in made.values():
        world.close()


@pytest.fixture(scope="session")
def train_on(worlds):
    """train_on(step_dir, size, argv, steps): a Run of that step's code on `size` ranks.

    break_it: the name of a mistake in `breaks.py` to make on purpose. What one rank trains is kept
    for the next test that asks for it.
    """
    kept = {}

    def train(step_dir, size, argv, steps, break_it=None):
        if break_it:  # in processes of its own: what it spoils stays spoiled
            with World(step_dir, size) as world:
                return Run(world.run(run_steps, argv.split(), steps, break_it))
        key = step_dir, " ".join(sorted(argv.split("--"))), steps
        if size > 1 or key not in kept:
            run = Run(worlds(step_dir, size).run(run_steps, argv.split(), steps))
            if size > 1:
                return run
            kept[key] = run
        return kept[key]

    return train


@pytest.fixture
def chain(tmp_path):
    """A repository with a chain of four small steps, and chain.py to run on it."""
    return Chain(tmp_path)


# --- the book -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The web book, built once for all tests that look at it."""
    sys.path.append(str(ROOT / "assets"))
    import book

    folder = tmp_path_factory.mktemp("book") / "site"
    book.build(folder, folder.parent / "stage")
    return folder


@pytest.fixture(scope="session")
def chromium():
    """A headless browser."""
    import browser

    with browser.browser() as found:
        yield found
