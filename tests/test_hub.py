"""`push_to_hub`: what opens is uploaded whole, what does not is not, and no pickle ever."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hwprune
from hwprune.digits import digits_model
from hwprune.spec import CheckpointError

pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")


class FakeApi:
    """A hub that notes what it is asked."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        FakeApi.calls = [("token", {"token": token})]

    def create_repo(self, repo_id: str, **given: Any) -> None:
        FakeApi.calls.append(("create_repo", {"repo_id": repo_id, **given}))

    def upload_folder(self, **given: Any) -> SimpleNamespace:
        names = sorted(p.name for p in Path(given["folder_path"]).iterdir())
        FakeApi.calls.append(("upload_folder", {**given, "names": names}))
        return SimpleNamespace(commit_url="hub/jane/m/commit/1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.calls = []
    hwprune.save(digits_model(pretrained=False), tmp_path / "m")
    return tmp_path / "m"


def test_a_folder_that_opens_is_uploaded(folder: Path) -> None:
    assert hwprune.push_to_hub(folder, "jane/m", private=True, token="t").endswith("commit/1")
    (_, asked), (made, repo), (sent, files) = FakeApi.calls
    assert (made, sent) == ("create_repo", "upload_folder") and asked == {"token": "t"}
    assert repo["repo_id"] == files["repo_id"] == "jane/m" and repo["private"] is True
    assert {"config.json", "model.safetensors", "README.md"} <= set(files["names"])


@pytest.mark.parametrize("name", ["m", "a/b/c", "../m", "jane/", "jane/m m", "https://x/y", ""])
def test_a_name_of_another_form_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="NAME/MODEL"):
        hwprune.push_to_hub(folder, name)
    assert not FakeApi.calls


def test_what_does_not_open_is_not_uploaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        hwprune.push_to_hub(tmp_path / "none", "jane/m")
    (folder / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        hwprune.push_to_hub(folder, "jane/m")
    (folder / "optimizer.pt").unlink()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        hwprune.push_to_hub(folder, "jane/m")
    assert not FakeApi.calls
