"""The documentation: its examples learn, its links lead somewhere, its pages build."""

import re
import shlex
import subprocess

import pytest

from tests.support.launch import PYTHON, ROOT, environment, run

PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
# What each prints at its end, and between which bounds. On the digits chance is 0.1; SGD with the
# same rate and number of updates gets 0.81 in fit.py. A PINN that learned nothing has error 1.
RESULTS = {
    "custom_loop": (r"accuracy on held-out digits: ([\d.]+)", 0.94, 1.0),
    "fit": (r"accuracy on held-out digits: ([\d.]+)", 0.93, 1.0),
    "jax_devices": (r"2 devices, accuracy: ([\d.]+)", 0.9, 1.0),
    "learning_curves": (r"SGD, rate \S+: test accuracy ([\d.]+)", 0.93, 1.0),
    "mixed_precision": (r"accuracy on held-out digits: ([\d.]+) \(0 updates skipped", 0.93, 1.0),
    "pinn": (r"relative error of the solution: (\S+)", 0.0, 1e-3),
    "two_workers": (r"2 workers, accuracy on held-out digits: ([\d.]+)", 0.93, 1.0),
}


def commands(example):
    """The lines of shell in the pages that run an example."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(map(_text, PAGES)), re.DOTALL))
    name = f"docs/examples/{example}.py"
    return sorted({line for line in blocks.splitlines() if line.split() and name in line.split()})


def _text(path):
    return path.read_text(encoding="utf-8")


def _links(page):
    """The targets of links and images of a page, without those to other sites."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", _text(page), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target]


def _anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them of plain words."""
    text = re.sub(r"```.*?```", "", _text(page), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("example", [path.stem for path in EXAMPLES])
def test_example_learns(example):
    (command,) = commands(example)  # one, wherever it stands
    pattern, least, most = RESULTS[example]
    if example.startswith("jax"):
        pytest.importorskip("jax")
    if "launch_horovodrun" in command:
        pytest.importorskip("horovod")
    variables = environment()
    variables.pop("KERAS_BACKEND", None)
    words = shlex.split(command)
    if example not in ("fit", "jax_devices", "two_workers"):
        words = [part for word in words for part in (PYTHON if word == "python" else [word])]
    done = subprocess.run(
        words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    found = re.search(pattern, last)
    assert found, last
    assert least <= float(found[1]) <= most


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_stands_in_a_page(path):
    assert len(_text(path).splitlines()) < 40
    line = f'--8<-- "docs/examples/{path.name}"'
    assert sum(_text(page).count(line) for page in PAGES) == 1


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_commands_name_files_that_are_there(page):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", _text(page), re.DOTALL))
    for word in re.findall(r"(?:scripts|configs|results|docs)/[\w./-]+\.\w+", blocks):
        assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page):
    for target in _links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{page.name}: {target}"


def test_site_builds_without_a_warning(tmp_path):
    for name in ("material", "mkdocs", "mkdocstrings_handlers.python"):
        pytest.importorskip(name)
    done = run(["scripts/docs.sh", tmp_path / "site"], PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    index = tmp_path / "site" / "index.html"
    assert done.stdout.strip() == str(index)
    assert "nlcg_tf.NLCG(learning_rate=0.1)" in re.sub("<[^>]+>", "", _text(index))
    # The figures, and an API page whose example is code, not a quotation.
    assert (tmp_path / "site" / "results" / "curvature" / "win_loss.png").is_file()
    api = _text(tmp_path / "site" / "api" / "nlcg.html")
    assert "observe_loss" in api and "<blockquote>" not in api
