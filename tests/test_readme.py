"""The READMEs keep their promises: figures that exist, sections in order, commands that run."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme
from conftest import ROOT

SHOTS = ROOT / "assets" / "book_shots.py"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(path):
    text = without_code(path.read_text())
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        there = path.parent / target if target else path
        assert there.exists(), f"{target} is not there"
        if section and there.suffix == ".py":  # lines, which lessons.py has put there
            first, last = map(int, re.fullmatch(r"L(\d+)-L(\d+)", section).groups())
            assert 0 < first <= last <= len(there.read_text().splitlines()), f"{target}#{section}"
        elif section:
            assert section in sections_of(there), f"{target} has no section #{section}"
    for name in re.findall(r"`((?:tests|assets|step\d)[\w/]*\.\w+)`", text):
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


def without_code(text):
    """Or comments of commands would be headings, and calls links."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def sections_of(path):
    """What a link may name behind `#`: headings in small letters, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_a_term_of_the_glossary_is_short_and_names_its_step():
    _, *entries = re.split(r"^### ", (ROOT / "GLOSSARY.md").read_text(), flags=re.MULTILINE)
    assert len(entries) > 60
    terms = [entry.splitlines()[0].lower() for entry in entries]
    assert len(set(terms)) == len(terms)
    for entry in entries:
        said, where = entry.rsplit(" ([", 1)
        assert re.fullmatch(r"step (\d)\]\(step\1_\w+/README\.md\)\)\s*", where), entry
        assert len(re.findall(r"[.!?]\)?(?=\s|$)", said)) <= 3, entry


@pytest.mark.parametrize("path", sorted(ROOT.glob("step*/README.md")), ids=lambda p: p.parent.name)
def test_a_lesson_can_be_run(path):
    assert len(readme.blocks(path)) >= 3, "by hand, the run, the library"


LESSONS = sorted(path for path in ROOT.glob("step*/*.md") if path.name != "COSTS.md")
COSTS = sorted(ROOT.glob("step*/COSTS.md"))


@pytest.mark.slow
@pytest.mark.parametrize("path", COSTS, ids=lambda path: path.parent.name)
def test_what_a_page_of_costs_shows_is_printed(path):
    assert readme.run(path) == 0


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_answers_are_folded_away(path):
    """Of a question or an exercise none stands without its answer, and no answer in the open."""
    text = without_code(path.read_text())
    found = re.search(r"^## Check yourself\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    folded = re.compile(r"<details><summary>.*?</summary>.*?</details>", re.S)
    parts = re.split(r"\n\n+", folded.sub("\0", found[1]) if found else "")
    asked = ""
    for part in map(str.strip, parts):
        if re.match(r"\d+\. |\*\*", part) or part.endswith("?"):
            assert not asked, f"no folded answer to: {asked}"
            asked = part
        asked = "" if "\0" in part else asked
        assert "details>" not in part, f"not folded well: {part}"
    assert not asked, f"no folded answer to: {asked}"
    assert "\0" in "".join(parts) or path.name != "README.md"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_exercise_copies_over_a_readers_own_step(path):
    """A reader's step lies in my_steps/; what an exercise breaks lies beside it."""
    commands = re.findall(r"cp -r (step\d_\w+) (my_steps[\w/]*)", path.read_text())
    for step, target in commands:
        own = target.rstrip("/") in ("my_steps", f"my_steps/{step}")
        assert not own, f"cp -r {step} {target}"


def script(name):
    """A script of assets/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "assets" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_idle_time_counts_from_the_first_pass_to_the_last():
    first = [("wait", 0, 5), ("forward", 5, 6), ("wait", 6, 9), ("backward", 9, 15)]
    last = [("wait", 3, 6), ("forward", 6, 7), ("backward", 7, 9)]
    assert script("timeline").idle_share([first, last]) == 1 - 10 / (2 * 10)


def test_figures_are_drawn_by_code(tmp_path):
    figures = script("figures")
    drawn = {path.name for path in figures.draw_all(tmp_path)}
    pages = "".join(without_code(path.read_text()) for path in PAGES)
    shown = set(re.findall(r"assets/(\w+\.png)", pages))
    assert drawn <= shown, "a figure that no page shows"
    # These show what was measured; convergence.py, ring_work.py and timeline.py draw them.
    measured = {"convergence.png", "tinyllama.png", "ring_work.png", "afab.png"}
    shots = {f"{name}.png" for name in re.findall(r'^    "(\w+)": \(', SHOTS.read_text(), re.M)}
    assert len(shots) == 5 and shots <= shown, "of the book, by book_shots.py"
    assert shown - drawn <= measured | shots


@pytest.mark.parametrize("command, code", [("true", 0), ("false", 1), ("false | true", 1)])
def test_a_block_that_fails_is_noticed(tmp_path, command, code):
    page = tmp_path / "README.md"
    page.write_text(f"<!-- runnable -->\n```bash\n{command}\n```\n\n```bash\nfalse\n```\n")
    script = Path(readme.__file__)
    done = subprocess.run([sys.executable, script, page], capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert "1 runnable blocks" in done.stdout


LEDGER = "tp       all_gather             1         8,192                  1         8,192"
STEP = "step     1 | loss  5.5919 | grad norm   8.0324 | lr 1.50e-05 |       950 tokens/s"
OTHER = STEP.replace("5.5919", "1.9660")


@pytest.mark.parametrize(
    "shown, printed, words",
    [
        (f"{LEDGER}\n{STEP}", f"{LEDGER}\nmore\n{STEP.replace('950', '1,204')}", None),
        (STEP, STEP.replace("5.5919", "5.5920"), None),
        (LEDGER, LEDGER.replace("8,192", "8,196"), "not printed: tp"),
        (LEDGER, STEP, "not printed: tp"),
        (STEP, STEP.replace("8.0324", "8.0524"), "step 1: "),
        (STEP, LEDGER, "step 1: "),
        (STEP, STEP.replace("5.5919", "nan"), "step 1: "),
        (f"{STEP}\n{OTHER}", f"{STEP}\nmore\n{OTHER}", None),  # a block that trains twice
        (f"{STEP}\n{OTHER}", STEP, "step 1: "),
        (STEP, OTHER, "step 1: "),
    ],
)
def test_what_a_readme_shows_is_what_is_printed(tmp_path, monkeypatch, shown, printed, words):
    monkeypatch.setattr(readme, "PYTHON", platform.python_version())
    page = tmp_path / "README.md"
    block = f"<!-- runnable -->\n```bash\ncat <<END\n{printed}\nEND\n```\n"
    page.write_text(f"{block}\n```\n{shown}\n```\n{block}\nThis is shown:\n```\n{shown}\n```\n")
    found = [list(readme.unlike(shown, printed)) for _, shown in readme.blocks(page)]
    assert len(found) == 2 and not found[1]
    assert bool(words) == bool(found[0]) == (readme.run(page) == 1)
    assert words is None or found[0][0].startswith(words)


@pytest.mark.parametrize("folder, losses", [("step2_x", 1), ("step3_x", 0), (".", 0)])
def test_another_library_has_other_losses(tmp_path, monkeypatch, capfd, folder, losses):
    """The step is not compared, the ledger is, and where it is so a line says it."""
    monkeypatch.setattr(readme, "PYTHON", "2.7.18")
    page = tmp_path / folder / "README.md"
    page.parent.mkdir(exist_ok=True)
    block = "<!-- runnable -->\n```bash\necho\n```\n\n```\n{}\n```\n"
    page.write_text(block.format(STEP) + block.format(LEDGER))
    assert readme.run(page) == 1 + losses
    assert ("losses not compared: Python is 3" in capfd.readouterr().out) == (not losses)


def test_folders_run_side_by_side(tmp_path, monkeypatch, capfd):
    """Two pages of a folder in turn, beside another folder; a page that fails is named."""
    text = "<!-- runnable -->\n```bash\n{}\n```\n"
    meet = "touch here; for i in $(seq 99); do [ -e ../{}/here ] && exit 0; sleep 0.1; done; exit 1"
    pages = {
        "a/README.md": meet.format("b"),
        "a/MORE.md": "exit 3",
        "b/README.md": meet.format("a"),
    }
    for name, commands in pages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.format(commands))
    paths = [str(tmp_path / name) for name in pages]
    monkeypatch.setattr(sys, "argv", ["readme.py", "--jobs", "2", *paths])
    with pytest.raises(SystemExit, match="True"):
        readme.main()
    said = capfd.readouterr().out
    for path in paths:
        assert f"{path}: 1 runnable blocks, {path == paths[1]:d} failed" in said
    assert "FAILED: exit code 3" in said


def test_the_checks_that_the_table_of_mistakes_names_are_there():
    text = (ROOT / "tests" / "README.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    named = set(
        re.findall(r"`(test_\w+|\w+_\w+)`", text.split("## Mistakes")[1].split("## Conv")[0])
    )
    assert len(named) > 10
    for name in named:
        assert f"def {name}(" in code, name


def test_the_command_for_own_versions_is_understood(tmp_path):
    """`pytest --step-dir=…`, inside the repository and outside."""
    shutil.copytree(ROOT / "step1_model", tmp_path / "step1_model")
    for path in ("step1_model", tmp_path / "step1_model"):
        command = [sys.executable, "-m", "pytest", f"--step-dir={path}", "--collect-only", "-q"]
        command.append("tests/test_model.py")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "test_model.py::test_rotary_frequencies[step1_model" in done.stdout
