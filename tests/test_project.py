"""What a visitor meets first holds: links lead somewhere, commands exist, locks are whole and free of addresses."""

import pathlib
import re
import subprocess
import tomllib

import pytest

import jaxrec

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
LOCKS = sorted(REPOSITORY.glob("requirements/py*.txt"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def relative(path):
    return str(path.relative_to(REPOSITORY))


def names_of(requirements):
    """Package names, in the form that indexes compare them in."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for module in set(re.findall(r"-m jaxrec\.(\w+)", text)):
        places = (REPOSITORY / "jaxrec" / f"{module}.py", REPOSITORY / "jaxrec" / module / "__main__.py")
        assert any(place.is_file() for place in places), module
    for script in set(re.findall(r"\b((?:launch|benchmarks)/\w+\.(?:sh|py))", text)):
        assert (REPOSITORY / script).is_file(), script


@pytest.mark.parametrize("lock", LOCKS, ids=relative)
def test_locks_pin_every_dependency_and_hold_no_address(lock):
    lines = lock.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.match(r"[\w.-]+==[\w.]+(; .*)?$", line)] == []
    wanted = names_of(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert wanted <= names_of(lines)


def test_both_pythons_have_a_lock():
    assert {lock.stem for lock in LOCKS} == {"py311", "py312"}


def test_the_version_is_said_once():
    assert PROJECT["version"] == jaxrec.__version__


def test_the_licences_are_said():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "non-commercial" in readme
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")


def test_make_says_what_it_can_do():
    result = subprocess.run(
        ["make", "-C", str(REPOSITORY), "help"], capture_output=True, text=True, check=True
    )
    for target in ("quickstart", "test", "lint", "typecheck", "bench"):
        assert re.search(rf"^  {target} +\S", result.stdout, flags=re.M), target
