"""Imports point downwards: which module of hwprune may know which, and what kernels/ may know."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hwprune"

# Low to high. A module imports from its own row and the rows before it, never from a later one; the
# first row imports nothing of hwprune. `hwprune` is the front door, hwprune/__init__.py. A new
# module gets its place in this table.
LAYERS = (
    ("units", "kernels"),
    (
        "layers",
        "window_attention",
        "transformers_attention",
        "module_ops",
        "obs",
        "ops",
        "profile_ops",
        "device",
        "predict",
        "predict_power",
        "spec",
        "atomic",
        "meter",
        "solvers",
        "denoisers",
        "denoiser_inputs",
        "culprit",
        "residues",
        "pruned_config",
        "coupled",
        "factored",
        "budget",
        "knapsack",
        "lagrange",
    ),
    (
        "families",
        "cost",
        "statistics",
        "rotate",
        "timm_base",
        "transformers_base",
        "trajectory",
        "denoiser_cost",
    ),
    (
        "operations",
        "denoiser_operations",
        "network",
        "profile_state",
        "profile_power",
        "profiling",
        "route",
        "memory_cost",
        "model_ops",
        "pricing",
        "remembered",
        "denoiser_price",
        "denoiser_reach",
    ),
    ("gating", "prices", "gates", "settling"),
    ("criteria", "distortion", "data", "images", "image_preparation", "digits"),
    (
        "option",
        "options",
        "block_options",
        "plan",
        "allocate",
        "stage_stream",
        "repair",
        "realise",
        "densify",
    ),
    (
        "checkpoint",
        "transformers_checkpoint",
        "base_model",
        "denoiser_checkpoint",
        "denoiser_folder",
        "shards",
        "card",
        "diffusion_card",
        "verify",
        "integrations",
        "lpvit",
        "lpvit_calibration",
        "lpvit_plan",
    ),
    (
        "prompt_cache",
        "prompt_inputs",
        "conditions",
        "teacher",
        "learning",
        "trajectory_scores",
        "trajectory_repair",
        "modulation",
        "compensation",
        "selection",
    ),
    ("guards", "budget_price"),
    (
        "tiling",
        "contract",
        "denoiser_contract",
        "denoiser_proof",
        "proof",
        "analysis",
        "cutting",
        "trial",
        "refine",
        "planning",
        "pruning",
        "front",
        "judging",
        "baselines",
        "sweeping",
        "report",
        "report_rows",
        "page",
        "hub",
        "doctor",
        "export",
        "diffusion_report",
        "opening",
        "split",
        "structure",
        "structure_of",
        "workload",
    ),
    ("diffusion", "groundwork", "diffusion_folder", "pictures"),
    ("hwprune",),
    (
        "__main__",
        "cli",
        "cli_diffusion",
        "cli_measure",
        "cli_profile",
        "cli_report",
        "cli_doctor",
        "cli_export",
        "cli_prune",
        "cli_sweep",
        "cli_words",
        "terminal",
        "exits",
    ),
)
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}


def package_files() -> list[Path]:
    """The Python files of hwprune/ without what it links to."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.resolve() == p)


def module_of(path: Path) -> str:
    """The first name under hwprune: units, families, ...; `hwprune` for the front door itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "hwprune" if first == "__init__" else first


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of every import, those inside functions and TYPE_CHECKING too.

    `from hwprune import obs` and `from hwprune.obs import prune` both yield `hwprune.obs...`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def edges(source: str) -> list[tuple[int, str]]:
    """The (line, module) pairs that a source text imports from hwprune."""
    found = []
    for line, name in imported_names(source):
        package, *below = name.split(".")
        if package == "hwprune":
            a_module = bool(below) and (below[0] in RANK or (PACKAGE / f"{below[0]}.py").exists())
            found.append((line, below[0] if a_module else "hwprune"))
    return found


def misplaced(importer: str, source: str) -> list[str]:
    """What a module's imports break, one sentence each; a module without a place breaks nothing."""
    here = RANK.get(importer, len(LAYERS))
    return [
        f"line {line}: {importer} imports {target}, which is not below it"
        for line, target in edges(source)
        if RANK.get(target, 0) > here or (here == 0 and target != importer)
    ]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that lead back to themselves."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    return sorted(node for node in graph if node in reachable(node))


def test_every_module_has_a_place() -> None:
    homeless = {module_of(path) for path in package_files()} - set(RANK)
    assert not homeless, f"give each a row in LAYERS: {sorted(homeless)}"


def test_imports_point_downwards() -> None:
    broken = [
        f"{path.relative_to(ROOT)} {sentence}"
        for path in package_files()
        for sentence in misplaced(module_of(path), path.read_text())
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("obs", "from hwprune.cli import main"),
        ("cost", "def f():\n    import hwprune.allocate"),
        ("units", "from hwprune.layers import SlimAttention"),
        ("criteria", "from hwprune import prune"),
        ("families", "from hwprune import pruning"),
    ],
)
def test_an_upward_import_is_seen(importer: str, source: str) -> None:
    assert len(misplaced(importer, source)) == 1


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in package_files():
        importer = module_of(path)
        targets = {target for _, target in edges(path.read_text())}
        graph.setdefault(importer, set()).update(targets - {importer})
    assert not circles(graph), "each of these imports itself through others"
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]


def test_relative_imports_are_not_used() -> None:
    broken = [
        f"{path.relative_to(ROOT)} line {line}: {name}"
        for path in package_files()
        for line, name in imported_names(path.read_text())
        if name.startswith(".")
    ]
    assert not broken, "\n".join(broken)  # `edges` reads absolute names only


def test_kernels_import_only_torch_triton_and_the_standard_library() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    kernels = sorted((ROOT / "kernels").rglob("*.py"))
    assert len(kernels) > 2
    broken = [
        f"{path.relative_to(ROOT)} line {line}: {name}"
        for path in kernels
        for line, name in imported_names(path.read_text())
        if name.split(".")[0] not in allowed and not name.startswith("hwprune.kernels.")
    ]
    assert not broken, "\n".join(broken)
