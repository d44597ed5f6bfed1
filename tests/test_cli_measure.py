"""`hwprune measure`: what it prints and writes, and the one line each bad input gets; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fakes.work import virtual_bench
from torch import nn

import hwprune
from hwprune import checkpoint, cli_measure, opening, split
from hwprune.cli import main
from hwprune.digits import INPUT_SIZE, digits_model
from hwprune.meter import arms, compare, timing
from hwprune.meter.estimate import Unavailable
from hwprune.meter.modes import Mode

pytest.importorskip("timm")
pytest.importorskip("sklearn")

QUICK = ("--rounds", "2", "--no-energy")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model without its training, short blocks, and no warm-up of half a second."""
    monkeypatch.setattr(
        opening, "digits_model", lambda progress=None: digits_model(pretrained=False)
    )
    monkeypatch.setattr(arms, "calls_per_block", lambda *given: 5)
    monkeypatch.setattr(arms, "warm_up", lambda timer, call, count: (0.001, ()))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned digits model; its dense.safetensors lies beside."""
    out = tmp_path_factory.mktemp("measure") / "pruned"
    torch.manual_seed(0)
    model = digits_model(pretrained=False)
    hwprune.save(model, out.parent / "dense")
    batches = [torch.randn(16, *INPUT_SIZE)]
    hwprune.prune(model, batches, hwprune.Budget(macs=0.6), kinds=("head", "neuron"), repair=False)
    hwprune.save(model, out)
    return out


class Ran:
    """What a command did: its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["measure", *(str(word) for word in words)])
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


def refused(ran: Ran, *pieces: str) -> None:
    """Exit 2, and one line that says all of `pieces`."""
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.startswith("hwprune: ") and ran.err.count("\n") == 1, ran.err
    assert not [piece for piece in pieces if piece not in ran.err], ran.err


# --- what it does --------------------------------------------------------------------------------


def test_a_folder_against_its_dense_model(capsys: pytest.CaptureFixture[str], pruned: Path) -> None:
    ran = Ran(capsys, pruned, "--against", pruned.parent / "dense", *QUICK, "--json", "-")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)  # nothing but JSON on stdout
    assert told["latency_s"]["value"] > 0
    assert told["energy_j"]["value"] is None and told["energy_j"]["reason"]
    assert told["ratio"]["against"] == "dense"
    assert told["ratio"]["latency"]["value"] > 0 and told["ratio"]["latency"]["verdict"]
    assert told["model"] == str(pruned) and told["against"] == str(pruned.parent / "dense")
    assert told["settings"]["batch"] == cli_measure.CPU_BATCH
    small, dense = (told["arms"][name]["peak_memory_bytes"] for name in ("model", "dense"))
    assert small["weight_bytes"] < dense["weight_bytes"]


def test_the_table_is_plain_and_within_100_columns_when_piped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    ran = Ran(capsys, "digits", "--batch", "4", *QUICK, "--json", file)
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out and max(map(len, ran.out.splitlines())) <= 100
    for piece in ("latency, p50", "peak memory", "A/A", "batch 4, float32, eager, hot caches, cpu"):
        assert piece in ran.out
    assert "inputs: normally distributed; give real images with --data" in ran.out
    assert json.loads(file.read_text())["settings"]["batch"] == 4


def test_real_images_are_the_inputs_where_data_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "digits", "--data", "digits", *QUICK, "--json", "-")
    drawn = Ran(capsys, "digits", *QUICK, "--json", "-")
    given, other = json.loads(ran.out), json.loads(drawn.out)
    assert given["settings"]["inputs"] != other["settings"]["inputs"]
    assert not [note for note in given["notes"] if "normally" in note]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_types_modes_and_caches_are_passed_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    modes: list[Mode] = []
    real = arms.make_runnable

    def make_runnable(forward: object, inputs: object, mode: Mode, device: object) -> object:
        modes.append(mode)
        return real(forward, inputs, "eager", device)  # type: ignore[arg-type]

    monkeypatch.setattr(arms, "make_runnable", make_runnable)
    words = ("--dtype", dtype, "--mode", "compile", "--l2", "cold", "--seed", "3")
    told = json.loads(Ran(capsys, "digits", *words, *QUICK, "--json", "-").out)
    asked = {"dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype], "l2": "cold", "seed": 3}
    assert asked | {"mode": "compile"} == {k: told["settings"][k] for k in (*asked, "mode")}
    assert modes == ["compile"]


def test_split_measures_four_arms_of_which_two_are_equal(
    capsys: pytest.CaptureFixture[str], pruned: Path
) -> None:
    words = (pruned, "--against", pruned.parent / "dense", "--split", *QUICK)
    told = json.loads(Ran(capsys, *words, "--json", "-").out)
    assert list(told["arms"]) == ["model", "dense", "masked", "random"]
    assert not [arm["error"] for arm in told["arms"].values() if arm["error"]]
    value, structure = (told["split"][k]["latency"]["value"] for k in ("value", "structure"))
    dense = told["ratios"]["dense"]["latency"]["value"]
    assert value > 0 and structure > 0 and dense > 0
    assert "split of the latency: value (masked / dense)" in Ran(capsys, *words).out


def test_timm_names_need_no_hub_with_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "vit_tiny_patch16_224", "--random-weights", "--batch", "1", *QUICK)
    assert ran.code == 0, ran.err
    assert "vit_tiny_patch16_224: random weights" in ran.out


def test_an_arm_that_fails_is_told_and_the_model_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pruned: Path
) -> None:
    real = cli_measure._open

    def raising(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    def broken(name: str, *given: object) -> opening.Opened:
        found = real(name.replace("broken", "digits"), *given)  # type: ignore[arg-type]
        if name == "broken":
            found.model.forward = raising
        return found

    monkeypatch.setattr(cli_measure, "_open", broken)
    ran = Ran(capsys, "digits", "--against", "broken", *QUICK)
    assert ran.code == 0
    assert "dense has no figures: RuntimeError: no kernel image is available" in ran.out
    refused(Ran(capsys, "broken", *QUICK), "broken was not measured: RuntimeError: no kernel")


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (("digits", "--rounds", "1"), ("--rounds", "at least 2", "one round gives no interval")),
        (("digits", "--batch", "0"), ("--batch", "at least 1")),
        (("digits", "--seconds", "0"), ("--seconds", "positive")),
        (("digits", "--seconds", "nan"), ("--seconds", "positive")),
        (("digits", "--mode", "graph"), ("mode graph", "CUDA", "cpu")),
        (("digits", "--mode", "fast"), ("fast", "eager")),
        (("digits", "--dtype", "int8"), ("int8", "bf16")),
        (("digits", "--device", "tpu"), ("--device", "expected cuda:0 or cpu", "tpu")),
        (("digits", "--device", "mps"), ("--device", "expected cuda:0 or cpu")),
        (("digits", "--device", "cuda:99"), ("cuda:99", "CUDA devices here")),
        (("digits", "--split"), ("--against",)),
        (("digits", "--split", "--against", "digits"), ("not pruned by hwprune",)),
        (("digits", "--against-weights", "x.pth"), ("--against",)),
        (("digits", "--data", "no/such/folder"), ("no/such/folder",)),
        (("digits", "--data", "digits", "--batch", "100000"), ("100000",)),
        (("digits", "--json", "no/such/place.json"), ("no/such",)),
        (("vit_tinny_patch16_224", "--random-weights"), ("vit_tinny", "did you mean")),
        (("./nowhere",), ("nowhere", "is no folder")),
        (("digits", "--against", "./nowhere"), ("nowhere", "is no folder")),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], pieces: tuple[str, ...]
) -> None:
    refused(Ran(capsys, *words), *pieces)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_with_a_file_missing_is_one_line(
    capsys: pytest.CaptureFixture[str], pruned: Path, tmp_path: Path, missing: str
) -> None:
    for file in pruned.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    refused(Ran(capsys, tmp_path, *QUICK), str(tmp_path))
    refused(Ran(capsys, "digits", "--against", tmp_path, *QUICK), str(tmp_path))


def test_a_folder_cut_short_is_one_line(
    capsys: pytest.CaptureFixture[str], pruned: Path, tmp_path: Path
) -> None:
    for file in pruned.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content[:-100] if "safetensors" in file.name else content
        )
    refused(Ran(capsys, tmp_path, *QUICK), str(tmp_path))


def test_ctrl_c_ends_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "latency_rounds", interrupted)
    ran = Ran(capsys, "digits", *QUICK)
    assert (ran.code, ran.out, ran.err) == (130, "", "hwprune: interrupted\n")


def test_nothing_draws_while_it_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[set[str]] = []
    real = timing.CpuTimer.block

    def block(self: timing.CpuTimer, call: object, calls: int) -> timing.Block:
        threads.append({type(thread).__name__ for thread in threading.enumerate()})
        return real(self, call, calls)  # type: ignore[arg-type]

    monkeypatch.setattr(timing.CpuTimer, "block", block)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    ran = Ran(capsys, "digits", *QUICK)
    assert ran.code == 0 and "warm up" in ran.err, "progress was drawn"
    assert threads and not [found for found in threads if "_RefreshThread" in found]


def test_help_answers_without_torch() -> None:
    script = (
        "import sys\nfrom hwprune.cli import main\n"
        "try:\n    main(['measure', '--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--against", "--batch", "--dtype", "--rounds", "--mode", "--l2", "--split"):
        assert option in done.stdout


# --- the arms of a split -------------------------------------------------------------------------


def test_split_arms_are_what_they_are_called(pruned: Path) -> None:
    small, dense = checkpoint.load(pruned), checkpoint.load(pruned.parent / "dense")
    before = {k: v.clone() for k, v in small.state_dict().items()}
    found = split.split_arms(small, dense)
    x = torch.randn(4, *INPUT_SIZE)
    with torch.no_grad():
        torch.testing.assert_close(found["masked"](x), small(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found["random"](x), small(x), atol=1e-2)
        assert found["dense"] is dense
    shapes = {k: v.shape for k, v in dense.state_dict().items()}
    assert {k: v.shape for k, v in found["masked"].state_dict().items()} == shapes
    zeros = sum(int((p == 0).sum()) for p in found["masked"].parameters())
    assert zeros > 0.2 * sum(p.numel() for p in dense.parameters())
    for (name, drawn), old in zip(
        found["random"].named_parameters(), small.parameters(), strict=True
    ):
        assert drawn.shape == old.shape, name
        if drawn.numel() > 200:
            assert float(drawn.detach().std()) == pytest.approx(float(old.detach().std()), rel=0.3)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_split_refuses_what_it_cannot_split(pruned: Path, tmp_path: Path) -> None:
    small, dense = checkpoint.load(pruned), checkpoint.load(pruned.parent / "dense")
    with pytest.raises(ValueError, match="no layer of the model is smaller"):
        split.split_arms(dense, dense)
    with pytest.raises(ValueError, match="was not pruned by hwprune"):
        split.split_arms(nn.Linear(2, 2), dense)
    with pytest.raises(ValueError, match="give the model it was pruned from"):
        split.split_arms(small, nn.Linear(2, 2))
    hwprune.save(small, tmp_path / "widened", format="dense")
    with pytest.raises(ValueError, match="saved in dense form"):
        split.split_arms(checkpoint.load(tmp_path / "widened"), dense)


def test_split_effects_multiply_to_the_whole(monkeypatch: pytest.MonkeyPatch, pruned: Path) -> None:
    clock = virtual_bench(monkeypatch)
    seconds = {"model": 0.012, "dense": 0.02, "masked": 0.018, "random": 0.013}
    small, dense = checkpoint.load(pruned), checkpoint.load(pruned.parent / "dense")
    timed = {"model": small, **split.split_arms(small, dense)}
    for name, model in timed.items():
        model.register_forward_hook(lambda *given, s=seconds[name]: clock.sleep(s))
    main_arm = timed.pop("model")
    found = hwprune.measure(
        main_arm, torch.randn(4, *INPUT_SIZE), against=timed, equivalent=split.EQUIVALENT
    )
    effects = found.split()
    assert not isinstance(effects, Unavailable)
    assert effects.value.latency.value == pytest.approx(0.9)  # type: ignore[union-attr]
    assert effects.structure.latency.value == pytest.approx(12 / 18)  # type: ignore[union-attr]
    assert found.ratio("model", "dense").latency.value == pytest.approx(0.9 * 12 / 18)  # type: ignore[union-attr]
    alone = hwprune.measure(main_arm, torch.randn(4, *INPUT_SIZE)).split()
    assert isinstance(alone, Unavailable) and "dense, masked, random" in alone.reason
