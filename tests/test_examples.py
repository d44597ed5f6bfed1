"""The examples in the docstrings of the public names run, and each name of the contract has one."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

import hwprune

pytest.importorskip("timm")
pytest.importorskip("sklearn")

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
# What a caller calls. The others are what these return, take or raise.
CALLED = (
    *(
        "Budget",
        "BlockSparseLinear",
        "SlimAttention",
        "ConstantBranch",
        "analyse",
        "load",
        "measure",
    ),
    *("measure_energy", "prune", "prune_diffusion", "push_to_hub", "route_", "save"),
)


def examples(name: str) -> list[doctest.DocTest]:
    """Those of a name and of its methods."""
    found = getattr(hwprune, name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(found, name, globs={})
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", sorted(hwprune._HOMES))
def test_examples_run(name: str) -> None:
    tests = examples(name)
    if not tests:
        assert name not in CALLED, f"{name} is called by users and has no example"
        return
    for test in tests:
        said: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert result.failed == 0, "".join(said)


def test_what_cannot_run_here_is_in_the_readme() -> None:
    for name in CALLED:
        skipped = [
            example
            for test in examples(name)
            for example in test.examples
            if doctest.SKIP in example.options
        ]
        ran = sum(len(test.examples) for test in examples(name)) - len(skipped)
        words = re.sub(r"_", "[-_]", name)
        assert ran or re.search(rf"\b{words}\b", README), f"{name} is never run nor told of"


def test_every_public_name_says_what_it_is() -> None:
    for name in hwprune._HOMES:
        found = getattr(hwprune, name)
        assert (inspect.getdoc(found) or "").split("\n\n")[0].strip().endswith("."), name
