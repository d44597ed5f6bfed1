"""What the command line writes: JSON whole or not at all, and figures a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwprune.terminal import check_json, figure, show, write_json


def test_json_replaces_a_file_whole(tmp_path: Path) -> None:
    target, link = tmp_path / "x.json", tmp_path / "link.json"
    write_json(str(target), {"top1": 0.5})
    link.symlink_to(target)
    write_json(str(link), {"top1": 0.6})
    assert link.is_symlink() and json.loads(target.read_text()) == {"top1": 0.6}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "x.json"]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_full_disk_leaves_the_old_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "x.json"
    write_json(str(target), {"old": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(Path, step, full)
        write_json(str(target), {"new": 2})
    assert str(error.value) == f"--json {target} could not be written: No space left on device"
    assert json.loads(target.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_figure_that_is_none_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(str(tmp_path / "x.json"), {"top1": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_device_is_written_to_and_not_replaced() -> None:
    null = Path("/dev/null")
    if not null.is_char_device():
        pytest.skip("no /dev/null on this system")
    write_json(str(null), {"top1": 0.5})
    assert null.is_char_device()


def test_a_place_for_json_is_checked(tmp_path: Path) -> None:
    for good in (None, "-", str(tmp_path / "x.json"), "x.json"):
        check_json(good)
    with pytest.raises(IsADirectoryError, match="name a file"):
        check_json(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_json(str(tmp_path / "no" / "x.json"))


def test_figures_are_in_the_unit_a_person_reads() -> None:
    assert [figure(v) for v in (7, 1500, 5_717_416, 1.2537e9)] == [
        "7",
        "1.500 K",
        "5.717 M",
        "1.254 G",
    ]
    assert figure(877_457_328, like=1.2537e9) == "0.877 G"


def test_long_and_odd_cells_are_folded_and_not_read_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "[bold]" + "blocks." * 30
    show(name, ("layer", "kept"), [[name, "0.5"]], name)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("[bold]") == 3 and "\x1b" not in out
