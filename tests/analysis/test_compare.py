"""`moma compare` end to end: a page that stands alone and names its modes, every number as JSON, clear figures."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma.analysis import compare_figures, compare_report, figures
from moma.analysis.comparison import Experts, ablation, experts_of, finals, throughputs
from moma.analysis.efficiency import efficiencies
from moma.analysis.study import read_study
from moma.compare import CompareConfig, main
from moma.config import Composed, compose


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of one pixel, for tests of words and numbers."""

    def save(figure: object, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(path)

    monkeypatch.setattr(compare_report, "save", save)


@pytest.fixture(scope="module")
def counts(sweep: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One size and seed, five families, one of them unfinished and one evaluated."""
    root = tmp_path_factory.mktemp("counts")
    sweep["write"](root, seeds=(0,), sizes=((192, 4),), lines=24)
    shutil.rmtree(root / "192x4-moe_2t2i-s0/checkpoints")
    for name, experts in (("dense", None), ("moe_8x", {"all": 8})):
        folder = root / f"192x4-{name}-s0"
        sweep["write_eval"](folder, folder, experts, 1)
    return root


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.S))


def test_the_whole_comparison_on_disk(
    sweep: dict, tmp_path: Path, capsys: pytest.CaptureFixture, undrawn: None
) -> None:
    assert main(Composed(CompareConfig((str(sweep["root"] / "*"),), tmp_path), {}, {})) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"eta.png", "scaling.png", "loss-128x4.png", "loss-192x4.png", "loss-256x6.png"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == len(names) == page.count("src='data:image/png;base64,")
    assert page.count("<img") == page.count("<figcaption>")  # every figure says how to read it
    assert "http:" not in page and "https:" not in page and "<script" not in page
    text = text_of(tmp_path / "report.html")
    for words in (
        "Mode train, as in the paper", "Causal, tracked while training", "moving cut-offs", "less compute than dense",
        "At least 3 pairs of seeds", "nothing tests the law", "−12%", "−17%",
    ):  # fmt: skip
        assert words in text, words
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert len(found["runs"]) == 18 and found["left_out"] == [] and found["smoothing"] == 0.05
    assert {(one["mode"], one["what"]) for one in found["eta"]} == {
        (mode, what) for mode in ("train", "causal") for what in ("overall", "text", "image")
    }
    assert found["eta"][0]["pairs"][0]["eta"]["value"] == pytest.approx(2.0, rel=0.25)
    assert found["scaling"][0]["law"]["b"] > 0 and len(found["scaling"][0]["ranges"]["b"]) == 2
    printed = capsys.readouterr().out
    assert "eta of moe_4t4i, 256×6 (causal): overall " in printed and "wrote " in printed


def test_what_is_missing_is_said(counts: Path, tmp_path: Path, undrawn: None) -> None:
    found = compare_report.compare(read_study([str(counts / "*")]))
    text = text_of(compare_report.write(found, tmp_path))
    assert "no checkpoint: it stopped before its first one" in text
    assert "Down to 1 pair of seeds: a verdict needs 3." in text and "one seed: no verdict" in text
    assert "less compute than dense" not in text.replace("it needs less compute than dense", "")  # the caption
    assert "1 of 3 sizes: 192×4" in text and "Expert counts" in text
    assert any(line.startswith("left out: ") for line in compare_report.summary_lines(found))
    again = compare_report.write(compare_report.compare(read_study([str(counts / "*")])), tmp_path / "again")
    for name in ("report.html", "comparison.json"):  # the same bytes for the same runs
        assert (tmp_path / name).read_bytes() == (again.parent / name).read_bytes()
    alone = compare_report.compare(read_study([counts / "192x4-dense-s0"]))
    assert "No pair: eta needs a dense and a sparse run" in text_of(compare_report.write(alone, tmp_path / "alone"))


def test_data_are_escaped(sweep: dict, tmp_path: Path, undrawn: None) -> None:
    folder = tmp_path / "<b>run"
    shutil.copytree(sweep["root"] / "128x4-dense-s0", folder)
    page = compare_report.write(compare_report.compare(read_study([folder])), tmp_path / "out").read_text()
    assert "<b>run" not in page and "&lt;b&gt;run" in page


def test_final_losses_and_throughput(counts: Path) -> None:
    study = read_study([str(counts / "*")])
    rows = finals(study)
    assert {(row.source, row.mode) for row in rows if row.variant == "moe_8x"} == {
        ("training", "train"), ("tracked", "causal"), ("evaluated", "train"), ("evaluated", "aux"),
        ("evaluated", "aux_calibrated"), ("evaluated", "threshold"),
    }  # fmt: skip
    aux = next(row for row in rows if row.mode == "aux")
    assert aux.losses["text"].mean == pytest.approx(3.36)
    assert aux.difference["text"].mean == pytest.approx(3.36 - 3.5)  # dense's causal one
    dense = next(row for row in rows if row.variant == "dense")
    assert dense.difference == {} and dense.losses["overall"].n == 1
    speeds = {one.variant: one for one in throughputs(study)}
    assert speeds["dense"].relative is None and speeds["dense"].tokens_per_second.mean == 4000
    assert speeds["moe_8x"].relative.mean == pytest.approx(3500 / 4000) and speeds["moe_8x"].paper == 0.907  # type: ignore[union-attr]


def test_expert_counts_are_read_from_plain_mixtures_alone(counts: Path) -> None:
    assert experts_of("moe_6t2i") == Experts(6, 2, 0) and experts_of("moe_8x") == Experts(0, 0, 8)
    assert experts_of("moe_8x").total == 8 == experts_of("moe_7t1i").total  # type: ignore[union-attr]
    for other in ("dense", "mod_moe_4t4i", "moe_4t4i_shared", "moe_4t4i_upcycled"):
        assert experts_of(other) is None
    found = ablation(finals(read_study([str(counts / "*")])))
    assert list(dict.fromkeys(row.variant for _, row in found)) == ["moe_1t1i", "moe_4t4i", "moe_8x"]
    assert ablation([row for _, row in found if row.variant == "moe_8x"]) == []  # nothing to compare it with


def test_figures_draw_at_readme_width_within_their_edges(counts: Path, tmp_path: Path) -> None:
    study = read_study([str(counts / "*")])
    (size, runs), etas = next(iter(study.sizes.items())), efficiencies(study)
    found = compare_report.compare(study)
    drawn = {
        "loss": compare_figures.loss_over_flops(size, runs, etas),
        "eta": compare_figures.speed_ups(etas, study.variants),
        "scaling": compare_figures.scaling_fits(found.fits),
        "experts": compare_figures.expert_counts(size, found.counts),
    }
    for name, figure in drawn.items():
        figures.save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            drawing = np.asarray(image.convert("RGB"))
        assert drawing.shape[1] == 1800, name
        for edge in (drawing[0], drawing[-1], drawing[:, 0], drawing[:, -1]):
            assert (edge == 255).all(), name
        assert (drawing < 200).any(), name


def test_a_family_looks_the_same_whatever_stands_beside_it() -> None:
    alone = compare_figures.looks(["dense", "moe_4t4i"])
    names = ["dense", "moe_1t1i", "moe_2t2i", "moe_4t4i", "moe_6t2i", "moe_7t1i", "moe_8x", "mod_moe_4t4i"]
    many = compare_figures.looks(names)
    assert alone.items() <= many.items()
    assert len({look.colour for look in many.values()}) == len({look.marker for look in many.values()}) == len(names)
    derived = compare_figures.looks(["moe_4t4i", "moe_4t4i_shared", "mine", "other"])
    assert derived["moe_4t4i_shared"].colour == derived["moe_4t4i"].colour
    assert derived["moe_4t4i_shared"].dash != derived["moe_4t4i"].dash
    assert len({look.colour for look in derived.values()}) == 3


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="got no runs, need a dense and a sparse run folder"):
        CompareConfig(())


def test_the_command_line_composes(tmp_path: Path) -> None:
    config = compose("compare", ["runs=['a/*',b]", f"out={tmp_path}"]).config
    assert config == CompareConfig(("a/*", "b"), tmp_path)
