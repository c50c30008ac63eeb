"""The page stands alone, escapes data, names routing modes and claims no more than the seeds allow."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from moma.analysis import report
from moma.analysis.fairness import unfair
from moma.analysis.generations import Generations, read_generations
from moma.analysis.runs import collect


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of one pixel, for tests of the words."""

    def save(figure: object, path: Path, palette: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(path)

    monkeypatch.setattr(report.figures, "save", save)


class Checker(HTMLParser):
    """Collects tags, addresses and text; complains about tags that do not close."""

    VOID = {"meta", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def page(study: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    runs = collect(study["runs"])
    generations = [read_generations(folder, runs) for folder in study["generations"]]
    record = {
        "stages": {"prepare <x>": {"cpu_s": 90.0, "wall_s": 50.0, "command": "moma prepare name='<emoji>'"}},
        "machine": {"cpu": "two & more"},
    }
    return report.write_report(runs, generations, out, record)


def test_the_page_stands_alone(page: Path) -> None:
    found = check(page.read_text())
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert found.tags.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert page.stat().st_size < report.MOST_BYTES
    names = {path.name for path in (page.parent / "figures").iterdir()}
    drawn = {"loss", "differences", "pictures", "shares-moe_4t4i", "places-moe_4t4i", "routers-moe_4t4i"}
    assert names == {f"{name}.png" for name in drawn}


def test_data_are_escaped(page: Path) -> None:
    text = page.read_text()
    for planted in ("<b>not bold</b>", "<script>", "<emoji>", "prepare <x>"):
        assert planted not in text
        assert planted in check(text).text


def test_numbers_name_their_routing_mode(page: Path) -> None:
    text = check(page.read_text()).text
    for words in (
        "dense (causal)",
        "moe_4t4i (aux, aux_calibrated, threshold)",
        "train: routed over the micro-batch, sees the future",
        "aux_calibrated: causal, auxiliary routers with moving cut-offs",
        "routed as in training (train)",
    ):
        assert words in text
    assert "dense: causal, moe_4t4i: aux" in text  # the pictures
    assert "a full moon by dense" in text and "moma prepare" in text and "two & more" in text


def test_every_causal_mode_has_its_gap_and_its_verdict(page: Path) -> None:
    text = page.read_text()
    gaps = text.split("What causal routing costs")[1].split("</table>")[0]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", gaps)][1:]
    assert [row[2].split(":")[0] for row in rows] == ["aux", "aux_calibrated", "threshold"]
    assert [row[3:] for row in rows][2] == ["+0.0200", "+0.0100", "+0.0300"]
    verdict = text.split("<h2>Verdict</h2>")[1].split("</table>")[0]
    modes = [re.findall(r"<td.*?>(.*?)</td>", row)[0] for row in re.findall(r"<tr>(.*?)</tr>", verdict)[1:]]
    assert modes == ["aux"] * 4 + ["aux_calibrated"] * 4 + ["threshold"] * 4
    assert "moe_4t4i (aux)" in text.split("<h2>Pictures from names</h2>")[1]


def test_routers_are_named_experts_and_depth(page: Path) -> None:
    text = page.read_text()
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["0.depth", "threshold", "free-running"] in [row[:3] for row in rows]
    (row,) = [row for row in rows if row[:2] == ["1", "text"]]
    assert row[2:] == ["31.0%", "44.0%", "25.0%", "0.998", "", "0.310", "0.420 (0.010)"]
    assert ["moe_4t4i", "0", "depth", "0.50%", "0.50%"] in [row[:5] for row in rows]  # planted errors


def test_models_whose_rules_are_causal_have_words_of_their_own(study: dict, undrawn: None, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    losses = runs[1].eval["loss"]  # type: ignore[index]
    runs[1].eval["loss"] = {"train": losses["train"], "causal": losses["aux"]}  # type: ignore[index]
    del runs[1].eval["routing"], runs[1].eval["diagnostics"], runs[1].eval["pictures"]  # type: ignore[union-attr, attr-defined]
    text = check(report.write_report(runs, [], tmp_path).read_text()).text
    assert "causal: its own rule, dropless" in text and "train: its own rule, with its capacity" in text
    assert "causal: no routers" in text and "moe_4t4i (causal)" in text


def test_costs_come_from_the_metrics(page: Path) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text())
    (row,) = [row for row in rows if row.startswith("<td>dense</td>") and "4,000" in row]
    # 300 steps of 2,048 tokens at 4,000 tokens/s
    assert re.findall(r"<td.*?>(.*?)</td>", row)[6:] == ["0.61", "18.4", "4,000", "154"]


def test_one_seed_gives_no_verdict(page: Path) -> None:
    text = check(page.read_text()).text
    assert "One seed: no verdict on quality." in text and "moe_4t4i is better" not in text
    found = json.loads((page.parent / "summary.json").read_text())
    assert {row["verdict"] for row in found["held_out"]} == {"one seed: no verdict"}
    assert [row["targets"] for row in found["eta"]] == ["overall", "text", "image"]


def test_the_same_study_gives_the_same_page(study: dict, undrawn: None, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    first = report.write_report(runs, [], tmp_path / "a").read_bytes()
    assert first == report.write_report(runs, [], tmp_path / "b").read_bytes()


def test_a_lone_run_has_a_page_without_a_verdict(study: dict, undrawn: None, tmp_path: Path) -> None:
    text = check(report.write_report(collect(study["runs"][:1]), [], tmp_path).read_text()).text
    assert "No verdict: it needs a dense and a sparse run" in text
    assert not re.search(r"\b(nan|None)\b", text.split("configuration of")[0])


def test_unequal_conditions_are_said(study: dict, undrawn: None, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    runs[1].metrics["flops"][:] *= 1.5
    runs[1].eval["micro_batches"] = 3  # type: ignore[index]
    text = check(report.write_report(runs, [], tmp_path).read_text()).text
    assert "Training FLOPs differ: moe_4t4i had 1.50 times those of dense" in text
    assert "Held-out sets differ: [24, 3] micro-batches" in text


WARNINGS = ("was evaluated at step", "routers start from step", "Settings differ")


def test_equal_conditions_are_not_warned_of(page: Path) -> None:
    assert "class=warn" not in page.read_text()


def test_a_stale_evaluation_is_said(study: dict, undrawn: None, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    runs[0].eval["step"] = 150  # type: ignore[index]
    runs[1].evaluated.eval["step"] = 60  # type: ignore[index]
    text = check(report.write_report(runs, [], tmp_path).read_text()).text
    assert (
        "tiny-dense-s0 (seed 0) was evaluated at step 150, its newest checkpoint is step 300: run moma evaluate again."
    ) in text
    assert "tiny-moe_4t4i-aux_routers-s0 (seed 0) was evaluated at step 60, its newest checkpoint is step 120:" in text
    assert WARNINGS[1] not in text and WARNINGS[2] not in text
    alone = check(report.write_report(runs[:1], [], tmp_path).read_text()).text
    assert "No verdict" in alone and "was evaluated at step 150" in alone


def test_an_unfinished_run_is_said(study: dict) -> None:
    runs = collect(study["runs"])
    runs[1].meta["total_steps"] = 400
    assert list(unfair(runs)) == [
        "tiny-moe_4t4i-s0 (seed 0) is no finished run: stopped at step 300 of 400: run its command again."
    ]


def test_routers_of_another_step_are_said(study: dict, undrawn: None, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    runs[1].meta["step"] = 400  # the base went on
    text = check(report.write_report(runs, [], tmp_path).read_text()).text
    assert (
        "tiny-moe_4t4i-aux_routers-s0 (seed 0): routers start from step 300 of the base, whose newest checkpoint is "
        "step 400: train them again in a new folder."
    ) in text
    assert WARNINGS[0] not in text and WARNINGS[2] not in text


def test_settings_that_differ_are_named(study: dict, undrawn: None, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    config = runs[1].config
    config["data"]["corpus"] = "/elsewhere/corpora/emoji"  # the same plan: the same micro-batches
    assert not any("Settings differ" in note for note in unfair(runs))
    config["model"]["dim"] = 512
    config["data"]["accumulation"] = 2
    text = check(report.write_report(runs, [], tmp_path).read_text()).text
    assert "Settings differ beside the feed-forward: model, data (moe_4t4i, seed 0)." in text
    config["optim"]["lr"], config["precision"], config["vocab_hash"] = 1e-4, "fp32", "other"
    notes = [note for note in unfair(runs) if "Settings" in note]
    assert notes == [
        "Settings differ beside the feed-forward: model, data, optim, precision, vocab_hash (moe_4t4i, seed 0)."
    ]


def test_another_plan_is_other_data(study: dict) -> None:
    runs = collect(study["runs"])
    runs[1].config["plan"] = "another"
    assert list(unfair(runs)) == ["Settings differ beside the feed-forward: data (moe_4t4i, seed 0)."]


def test_runs_of_older_versions_are_not_warned_of(study: dict) -> None:
    runs = collect(study["runs"])
    for name in ("optim", "vocab_hash", "plan"):
        del runs[1].config[name]
    for eval in (runs[0].eval, runs[1].eval):
        del eval["step"]  # type: ignore[union-attr, attr-defined]
    del runs[1].routers.meta["init_step"]  # type: ignore[union-attr]
    assert list(unfair(runs)) == []


def test_generations_are_labelled_by_the_path_of_their_run(
    study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, run in (("dense/s0", study["runs"][0]), ("moe/s0", study["runs"][1])):
        shutil.copytree(run, tmp_path / folder)
    runs = collect([tmp_path / "dense/s0", tmp_path / "moe/s0"])

    def label(run: object, among: list = runs) -> str:
        (tmp_path / "made").mkdir(exist_ok=True)
        record = {"run": str(run), "mode": "causal", "generations": []}
        (tmp_path / "made/generations.json").write_text(json.dumps(record))
        return read_generations(tmp_path / "made", among).label

    monkeypatch.chdir(tmp_path)
    assert label("moe/s0") == label(tmp_path / "moe/../moe/s0") == "moe_4t4i"
    assert label("dense/s0") == "dense"
    assert label("gone/s0") == "made"  # either of two
    assert label("gone/s0", runs[1:]) == "moe_4t4i"
    assert label("gone/tiny-moe_4t4i-aux_routers-s0", collect(study["runs"])) == "moe_4t4i"
    assert label(study["runs"][2], collect(study["runs"])) == "moe_4t4i"


def test_bad_generations_are_refused(study: dict, undrawn: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no .*generations.json, need a folder that `moma generate` wrote"):
        read_generations(tmp_path, [])
    folder = tmp_path / "made"
    shutil.copytree(study["generations"][0], folder)
    record = json.loads((folder / "generations.json").read_text())

    def write(entries: list) -> Generations:
        (folder / "generations.json").write_text(json.dumps(record | {"generations": entries}))
        return read_generations(folder, [])

    assert write([]).label == "dense"
    with pytest.raises(ValueError, match=r"got a damaged .*generations.json .*need generations with prompt and kind"):
        write([{"prompt": "x"}])
    shutil.copy(folder / "generations.json", folder / "broken.png")
    runs = collect(study["runs"])
    for name, message in (
        ("../../secret.png", r"got the file ../../secret.png of .*, need one inside that folder"),
        ("missing.png", r"got an unreadable .*missing.png .*, need a PNG: run moma generate again"),
        ("broken.png", "got an unreadable .*broken.png"),
    ):
        made = write([{"kind": "picture", "prompt": "x", "file": name, "real": None}])
        with pytest.raises(ValueError, match=message):
            report.write_report(runs, [made], tmp_path / "out")


def test_no_runs_and_huge_pages_are_refused(
    study: dict, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="got no runs, need at least one: add run folders to runs="):
        report.write_report([], [], tmp_path)
    monkeypatch.setattr(report, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"got a page of .* MB, need at most 0 MB: name fewer runs or generations"):
        report.write_report(collect(study["runs"]), [], tmp_path)
