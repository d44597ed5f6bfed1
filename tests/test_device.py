"""Profiles on disk: what comes back, and the one clear line each bad file gets."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from fakes.profiles import entry_of, profile_of

from hwprune import device
from hwprune.device import (
    DeviceProfile,
    ProfileError,
    content_hash,
    for_this_device,
    list_devices,
    load_device,
    read_profile,
)
from hwprune.ops import Op

GELU, LINEAR = Op("gelu", (6, 10), "fp32"), Op("linear", (7, 24, 40), "fp32")
TILES = Op.tiles((7, 40, 70), "fp32", (16, 32), 4)


def some_profile(**given: Any) -> DeviceProfile:
    return profile_of({GELU: 1e-5 / 3, LINEAR: 2e-4 / 7, TILES: 1e-4}, **given)


def written(folder: Path, profile: DeviceProfile, name: str = "fake") -> Path:
    profile.save(folder / f"{name}.json")
    return folder / f"{name}.json"


def rewritten(path: Path, change: Any) -> Path:
    """Change a file's content as its writer might, hash and all."""
    found = json.loads(path.read_text())
    change(found)
    if isinstance(found.get("provenance"), dict):
        found["provenance"]["content_sha256"] = content_hash(found)
    path.write_text(json.dumps(found))
    return path


def refused(path: Path, *pieces: str) -> None:
    with pytest.raises(ProfileError) as said:
        read_profile(path, allow_synthetic=True)
    text = str(said.value)
    assert "\n" not in text and path.name in text, text
    assert not [piece for piece in pieces if piece not in text], text


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return written(tmp_path, some_profile(power_w=100 / 3))


def test_a_profile_comes_back_as_it_was(fake: Path) -> None:
    found = read_profile(fake, allow_synthetic=True)
    assert [e.op for e in found.entries] == [GELU, LINEAR, TILES]
    assert found.entries[1].latency_s == pytest.approx(2e-4 / 7, rel=1e-8)
    assert found.entries[1].energy_j == pytest.approx(2e-4 / 7 * 100 / 3, rel=1e-8)
    assert found.key == "FAKE-CPU, 1 thread(s)" and found.synthetic
    again = written(fake.parent, found, "again")
    assert json.loads(again.read_text()) == json.loads(fake.read_text())  # hash and every digit
    assert read_profile(again, allow_synthetic=True).entries == found.entries


def test_energy_nobody_measured_stays_null(tmp_path: Path) -> None:
    path = written(tmp_path, some_profile())
    raw = json.loads(path.read_text())["entries"]
    assert {(e["energy_uj"], e["power_w"]) for e in raw} == {(None, None)}
    found = read_profile(path, allow_synthetic=True).entries
    assert {(e.energy_j, e.power_w) for e in found} == {(None, None)}


def test_the_modes_and_values_of_an_operation_are_kept_apart(tmp_path: Path) -> None:
    axes = [("eager", "hot", "normal"), ("graph", "hot", "normal"), ("eager", "cold", "normal")]
    axes.append(("eager", "hot", "zeros"))
    entries = tuple(entry_of(GELU, 1e-5, mode=m, l2=c, values=v) for m, c, v in axes)
    profile = DeviceProfile("fake", {}, {}, {}, entries, {}, synthetic=True)
    found = read_profile(written(tmp_path, profile), allow_synthetic=True).entries
    assert [(e.mode, e.l2, e.values) for e in found] == axes


def test_synthetic_numbers_are_refused_unless_asked_for_and_stay_synthetic(fake: Path) -> None:
    with pytest.raises(ProfileError, match=r"fake\.json: its numbers are synthetic"):
        read_profile(fake)
    with pytest.raises(ProfileError, match="synthetic"):
        load_device(fake)
    again = written(fake.parent, read_profile(fake, allow_synthetic=True), "again")
    assert json.loads(again.read_text())["synthetic"] is True
    with pytest.raises(ProfileError, match="synthetic"):  # not saying so is no excuse
        read_profile(rewritten(fake, lambda d: d.pop("synthetic")))


def test_an_edit_by_hand_is_noticed(fake: Path) -> None:
    text = fake.read_text()
    for old, new in (("FAKE-CPU", "FAKE-GPU"), ('"m": 7', '"m": 8'), ("9,", "10,")):
        assert old in text
        fake.write_text(text.replace(old, new))
        refused(fake, "does not fit its hash")
    fake.write_text(json.dumps(json.loads(text)))  # layout is no content
    read_profile(fake, allow_synthetic=True)


def entry(found: dict[str, Any]) -> dict[str, Any]:
    return found["entries"][1]


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf, -1.0, 0, 0.0, "fast", True])
@pytest.mark.parametrize("name", ["median", "lo", "hi", "p95", "power_w", "energy_uj"])
def test_an_impossible_figure_is_refused(fake: Path, name: str, figure: Any) -> None:
    def change(found: dict[str, Any]) -> None:
        told = entry(found)["latency_us"]
        if name in ("lo", "hi"):
            told["ci"][name == "hi"] = figure
        elif name in told:
            told[name] = figure
        else:
            entry(found)[name] = figure

    refused(rewritten(fake, change), "expected")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: entry(d)["latency_us"].update(ci=[1e9, 2e9]),
        lambda d: entry(d)["latency_us"].update(ci=[1.0]),
        lambda d: entry(d)["latency_us"].update(n_rounds=0),
        lambda d: entry(d).pop("latency_us"),
        lambda d: entry(d).pop("energy_uj"),
        lambda d: entry(d).update(op="conv"),
        lambda d: entry(d).update(impl="csr"),
        lambda d: entry(d).update(mode="fast"),
        lambda d: entry(d).update(l2="warm"),
        lambda d: d.update(entries=[3]),
        lambda d: d.update(entries=[]),
        lambda d: d.update(entries={"a": 1}),
        lambda d: d.update(entries=None),
        lambda d: d.pop("device"),
        lambda d: d.update(device=3),
        lambda d: d.update(software="torch"),
    ],
)
def test_a_part_that_is_missing_or_odd_is_refused(fake: Path, change: Any) -> None:
    refused(rewritten(fake, change), "expected")


def test_an_operation_listed_twice_is_refused_and_never_written(fake: Path) -> None:
    before = fake.read_bytes()
    twice = some_profile()
    twice = DeviceProfile("fake", {}, {}, {}, twice.entries + twice.entries[:1], {}, True)
    with pytest.raises(ProfileError, match=r"twice.*gelu"):
        twice.save(fake)
    assert fake.read_bytes() == before and [p.name for p in fake.parent.iterdir()] == ["fake.json"]
    refused(rewritten(fake, lambda d: d["entries"].append(copy.deepcopy(entry(d)))), "twice")


@pytest.mark.parametrize("schema", ["hwprofile/2", None, 3, ["hwprofile/1"]])
def test_another_schema_is_refused(fake: Path, schema: Any) -> None:
    refused(rewritten(fake, lambda d: d.update(schema=schema)), "hwprofile/1", "measure it again")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"schema": "hwprofile/1"}',
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"odd\.json") as said:
        read_profile(path)
    assert "\n" not in str(said.value)


def test_a_file_cut_short_anywhere_is_refused(fake: Path) -> None:
    content = fake.read_bytes().rstrip()
    for end in range(1, len(content), 97):
        fake.write_bytes(content[:end])
        refused(fake)


# --- names and devices ---------------------------------------------------------------------------


def test_ones_own_profiles_go_before_those_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        written(folder, some_profile(), "same")
    written(theirs, some_profile(), "shipped")
    (ours / ".same.partial.json").write_text("{}")  # of a run under way
    monkeypatch.setattr(device, "FOLDER", theirs)
    monkeypatch.setenv("HWPRUNE_PROFILES", str(ours))
    assert list_devices() == {"same": ours / "same.json", "shipped": theirs / "shipped.json"}
    monkeypatch.setenv("HWPRUNE_PROFILES", str(tmp_path / "none"))
    assert list_devices()["same"] == theirs / "same.json"


def test_an_unknown_name_says_which_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "FOLDER", tmp_path)
    with pytest.raises(ProfileError, match=r"expected a device of: none; got 'h100'"):
        load_device("h100")
    written(tmp_path, some_profile(), "a-cpu")
    with pytest.raises(ProfileError, match=r"expected a device of: a-cpu; got 'h100'"):
        load_device("h100")
    with pytest.raises(ProfileError, match=r"found no file .*gone\.json"):
        load_device(tmp_path / "gone.json")


def test_another_devices_profile_is_refused_unless_forced() -> None:
    profile = some_profile()
    assert for_this_device(profile, profile.key) is profile
    with pytest.raises(ProfileError, match=r"measured on FAKE-CPU, 1 thread\(s\), this is H200"):
        for_this_device(profile, "H200")
    with pytest.raises(ProfileError):  # threads are part of what a CPU is
        for_this_device(profile, "FAKE-CPU, 2 thread(s)")
    with pytest.warns(UserWarning, match="not on H200"):
        assert "H200" in for_this_device(profile, "H200", force=True).transferred


@pytest.mark.parametrize("name", ["torch", "triton", "driver"])
def test_other_software_warns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch": "2.15.0", "triton": "3.9.0", "driver": "570.1"}
    monkeypatch.setattr(device, "software_here", lambda: here)
    same = some_profile()
    profile = DeviceProfile("fake", same.device, {**here, "numpy": "1"}, {}, same.entries, {}, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert for_this_device(profile, profile.key).transferred == ""
    here[name] = "9.9"
    with pytest.warns(UserWarning, match=rf"{name} \d.*, here 9\.9"):
        assert name in for_this_device(profile, profile.key).transferred


def test_a_profile_is_loaded_for_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, some_profile())
    monkeypatch.setattr(device, "read_profile", lambda p: read_profile(p, allow_synthetic=True))
    assert load_device(path, for_device="FAKE-CPU, 1 thread(s)").transferred == ""
    with pytest.raises(ProfileError, match="this is H200"):
        load_device(path, for_device="H200")
    with pytest.warns(UserWarning):
        assert load_device(path, for_device="H200", force=True).transferred


def test_the_driver_is_read_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
    assert device.software_here()["driver"] is None
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    )
    assert device.software_here()["driver"] == "570.86.15"


def test_every_profile_that_ships_was_measured_and_is_sound() -> None:
    for path in device.FOLDER.glob("*.json"):
        profile = read_profile(path)  # refuses synthetic ones, and whatever was edited
        assert profile.provenance["command"] and profile.provenance["rounds"] >= 5
        assert profile.sensor.get("source") or profile.sensor.get("reason")
        assert all(e.energy_j is None for e in profile.entries) or profile.sensor["source"]
