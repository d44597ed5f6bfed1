"""The card of a pruned diffusion model: what it says, and the licence it carries over."""

from __future__ import annotations

from pathlib import Path

from hwprune.card import results
from hwprune.diffusion_card import denoiser_card, licence_files, licence_of

SHAPE = {"a": {"type": "units", "kept": 2}, "b": {"type": "removed"}}
PRUNED = {"_class_name": "FluxTransformer2DModel", "quantization_config": {"shape": SHAPE}}


def head_of(card: str) -> list[str]:
    assert card.startswith("---\n")
    return card.split("---\n")[1].splitlines()


def test_the_licence_goes_with_the_model(tmp_path: Path) -> None:
    base = tmp_path / "models--black-forest--flux" / "snapshots" / "0"
    base.mkdir(parents=True)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\n"
        "pipeline_tag: text-to-image\ntags:\n- x\nextra: 'quoted: evil'\n---\nlicense: not-this\n"
    )
    (base / "LICENSE.md").write_text("terms")
    (base / "NOTICE").write_text("n")
    (base / "model_index.json").write_text("{}")
    (base / "licenses").mkdir()
    found = licence_of(base)
    assert found == {
        "license": "other",
        "license_name": "flux-1-dev",
        "license_link": "LICENSE.md",
        "pipeline_tag": "text-to-image",
        "base_model": "black-forest/flux",
    }
    assert sorted(p.name for p in licence_files(base)) == ["LICENSE.md", "NOTICE"]
    card = denoiser_card(PRUNED, {"budget": {"params": 0.8}}, head=found, form="pipeline")
    head = head_of(card)
    assert "license: other" in head and "base_model: black-forest/flux" in head
    assert "library_name: diffusers" in head and "extra" not in "".join(head)
    assert "1 layers are narrower" in card and "1 blocks are gone" in card
    assert "DiffusionPipeline.from_pretrained" in card and "budget: params | 0.8" in card


def test_a_hostile_card_leaves_nothing_behind(tmp_path: Path) -> None:
    for text in (
        "---\nlicense: mit\\nx\nlicense: [a]\nbase_model: 'x'\npipeline_tag: a b\n---\n",
        "license: mit\n",
        "---\nlicense: mit",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").unlink()
    assert licence_of(tmp_path) == {}
    assert "its card does not name it" in denoiser_card(PRUNED, {}, head={})


def test_a_denoiser_alone_says_how_it_opens() -> None:
    card = denoiser_card({"_class_name": "DiTTransformer2DModel"}, {})
    assert 'DiTTransformer2DModel.from_pretrained("FOLDER")' in card and "pruned with" not in card
    card = denoiser_card(PRUNED, {}, head={"license": "mit"}, form="parts", name="transformer")
    assert 'from_pretrained("FOLDER/transformer")' in card


def test_a_card_does_not_tell_where_things_lay() -> None:
    private, home = "/ho" + "me/jane/secret project", "~/data/x"
    command = f"hwprune prune '{private}/model' --data {home} --out=/tmp/a/out --budget macs=0.6"
    text = "\n".join(results({"environment": {"command": command, "torch": "2.11"}}))
    assert "jane" not in text and "tmp" not in text and "macs=0.6" in text
    assert "--out=out" in text and "hwprune prune" in text and "2.11" in text
