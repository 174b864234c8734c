"""The report's figures: claims are decided by their rule, variants run, and the page holds the verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.files import write_rows

FOLDER = Path(__file__).parents[2] / "benchmarks" / "report"
RECIPES = FOLDER.parents[1] / "recipes"
NAMES = ("claims", "curves", "figures", "outcomes", "page", "ppo", "real_text", "run", "runs")


@pytest.fixture(scope="module")
def report():
    """The benchmark's modules, imported as its script imports them."""
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {name: __import__(name) for name in NAMES}
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("says", "values", "verdict"),
    [
        ("positive", [0.9, 1.0, 1.1], "agrees"),
        ("positive", [-0.9, -1.0, -1.1], "disagrees"),
        ("positive", [-1.0, 0.1, 1.0], "unclear"),
        ("negative", [-0.9, -1.0, -1.1], "agrees"),
        ("negative", [0.9, 1.0, 1.1], "disagrees"),
        ("small", [-0.1, 0.0, 0.1], "agrees"),
        ("small", [0.9, 1.0, 1.1], "disagrees"),
        ("small", [-0.9, -1.0, -1.1], "disagrees"),
        ("small", [0.1, 0.3, 0.2], "unclear"),
        ("positive", [0.0, 0.0, 0.0], "disagrees"),  # nothing differs: not above 0
        ("positive", [1.0, 1.0], "unclear"),  # too few seeds
        ("positive", [1.0, math.nan, 1.0], "unclear"),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(report, says, values, verdict):
    claim = report.claims.Claim("it rises", lambda value: value, says)
    decided = claim.decide(values)
    assert decided["verdict"] == verdict
    assert decided["values"] == pytest.approx(values, nan_ok=True)
    json.dumps(decided)  # kept beside the picture


def test_the_interval_is_the_percentile_bootstrap_of_the_mean(report):
    values = [0.0, 1.0, 2.0, 5.0]
    # All 256 resamples of four values: the interval's ends are quantiles of their means.
    means = [np.mean([values[i] for i in index]) for index in np.ndindex(4, 4, 4, 4)]
    low, high = report.claims.interval(values)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.1)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.1)


def write_run(folder: Path, gold: list[float], **metrics: list[float]) -> Path:
    """A finished run whose SFT model has gold reward 1."""
    folder.mkdir(parents=True)
    columns = {"gold_score": gold, **metrics}
    rows = [{"step": step + 1, **{k: v[step] for k, v in columns.items()}} for step in range(len(gold))]
    write_rows(folder / "metrics.jsonl", rows)
    before = dict.fromkeys(columns, 1.0)
    (folder / "summary.json").write_text(json.dumps({"before": before, "interrupted": False}))
    return folder


def test_moments_of_a_run(report, tmp_path):
    rising, falling = list(np.linspace(1.0, 3.0, 40)), list(np.linspace(3.0, -1.0, 40))
    run = report.curves.Curves(write_run(tmp_path / "a", rising + falling), 0)
    assert run.peak_step in (39, 40, 41, 42)
    assert run.collapse_step == 61  # falls below 1, the SFT model's, in the middle of the second half
    assert run.end("gold_score") == pytest.approx(np.mean(falling[-8:]))
    assert run.gain("gold_score") == run.end("gold_score") - 1
    assert run.known_end("kl") is None
    assert run.roughness("gold_score", slice(10, 30)) == pytest.approx(0, abs=1e-9)

    steady = report.curves.Curves(write_run(tmp_path / "b", [2.0] * 20), 0)
    assert steady.collapse_step == 21  # never
    lost = report.curves.Curves(write_run(tmp_path / "c", [0.0] * 20), 0)
    assert lost.collapse_step == 1


def test_the_tail_of_a_normal_distribution(report, tmp_path):
    quantiles = {"01": -2.326, "25": -0.6745, "75": 0.6745, "99": 2.326}
    columns = {f"score_quantile_{q}": [value] * 5 for q, value in quantiles.items()}
    run = report.curves.Curves(write_run(tmp_path / "a", [1.0] * 5, **columns), 0)
    assert run.tail(slice(None)) == pytest.approx(3.45, abs=0.01)


def test_every_figure_of_the_report_that_is_a_run_is_declared(report):
    numbers = [figure.number for figure in report.figures.FIGURES]
    assert numbers == [2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19]
    for figure in report.figures.FIGURES:
        assert figure.claims, figure.number
        assert len(figure.variants) <= 6, "a picture tells six lines apart"


def test_every_variant_has_settings_of_its_recipe(report):
    from ppo_kit.cli.recipe import settings_class
    from ppo_kit.cli.recipe_file import recipe_main

    for figure in report.figures.FIGURES:
        for settings in figure.variants.values():
            own = dict(settings)
            recipe = own.pop("recipe", None)
            file = FOLDER / "ppo.py" if recipe is None else RECIPES / f"{recipe}.py"
            cfg: Any = settings_class(recipe_main(file))(**own)
            assert dataclasses.is_dataclass(cfg)
            if recipe is None:
                assert report.ppo.shaping(cfg)
                assert report.ppo.policy_losses(cfg)
                report.ppo.on_minibatches(cfg)


def test_a_run_with_all_details_logs_what_the_figures_read(report, brought, tmp_path):
    cfg = report.ppo.ReportPPO(
        **{**brought, "out": tmp_path / "run", "steps": 2},
        score_normalize=True, score_clip=0.8, kl_coef=0.1, entropy_coef=0.01, entropy_region=0.5,
        advantage_normalize=True, advantage_clip=0.5, value_clip=0.2, critic_start="policy",
        critic_pretrain_steps=1, surrogate_clip=False, max_grad_norm=1.0,
    )  # fmt: skip
    assert report.ppo.main(cfg) == 0
    run = report.curves.Curves(tmp_path / "run", 0)
    assert run.steps == cfg.steps
    logged = set(run.rows[-1])
    wanted = {panel for figure in report.figures.FIGURES for panel in figure.panels}
    assert wanted - logged <= {"gold_score", "accuracy", "eval/accuracy", "pairwise_loss"}
    assert (run.values("score_quantile_01") <= run.values("score_quantile_99")).all()


def test_a_figure_becomes_a_picture_numbers_and_verdicts(report, tmp_path, capsys):
    cfg = report.run.Reproduction(figure=(15,), seeds=3, out=tmp_path / "runs", pages=tmp_path / "pages")
    figure = next(each for each in report.figures.FIGURES if each.number == 15)
    for name, level in (("η 0.05", 3.0), ("η 0.1", 2.0), ("η 0.2", 1.0)):
        for seed, folder in enumerate(report.runs.folders(figure, name, cfg)):
            curve = [level + 0.01 * seed] * 20
            write_run(folder, curve, score=curve, kl=curve[::-1], perplexity=curve, response_length=curve,
                      entropy=curve)  # fmt: skip
    report.run.main(cfg)
    assert capsys.readouterr().out.count("figure 15: agrees") == 4
    page = (cfg.pages / "index.md").read_text()
    assert page.count("**agrees**") >= 8, "in the table and below the picture"
    assert "![Figure 15" in page
    assert (cfg.pages / "figure_15.png").stat().st_size < 200_000
    numbers = json.loads((cfg.pages / "figure_15.json").read_text())
    assert numbers["seeds"] == [10, 11, 12]
    assert numbers["ends"]["η 0.1"]["kl"] == pytest.approx([2.0, 2.01, 2.02])


def test_a_figure_that_is_not_declared_is_refused(report):
    with pytest.raises(SystemExit, match=r"--figure: got \[5\]"):
        report.run.main(report.run.Reproduction(figure=(5,)))


def real_text(report, brought, dialogues_file, folder: Path) -> Any:
    return report.real_text.RealText(
        pairs=dialogues_file, held_out_pairs=dialogues_file, policy=brought["policy"], seeds=3, steps=2,
        train_layers=-1, rollout_size=4, minibatch_size=4, max_new_tokens=4, bf16=False,
        out=folder / "runs", pages=folder / "pages",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["vanilla", "PPO-max"])
def test_runs_on_real_text_take_the_settings(report, brought, dialogues_file, tmp_path, name):
    cfg = real_text(report, brought, dialogues_file, tmp_path)
    _, nine = report.real_text.ppo_figures(cfg, Path(brought["reward"][0]))
    settings = dict(nine.variants[name])
    recipe = settings.pop("recipe")
    settings |= {"held_out": 8} | ({"critic_pretrain_steps": 1} if recipe == "ppo_max" else {})
    report.runs.Job(RECIPES / f"{recipe}.py", {**settings, "steps": 2, "seed": 10}).run(tmp_path)
    (file,) = tmp_path.glob("*/metrics.jsonl")
    run = report.curves.Curves(file.parent, 10)
    assert set(nine.panels) <= set(run.rows[-1])
    assert np.isfinite([claim.measure({"vanilla": run, "PPO-max": run}) for claim in nine.claims]).all()


def test_real_text_gets_its_own_page(report, brought, dialogues_file, tmp_path, monkeypatch):
    cfg = real_text(report, brought, dialogues_file, tmp_path)

    def write(jobs, root, *, processes=1):
        for job in jobs:
            if not job.folder(root).exists():
                curve = [2.0 + 0.01 * job.settings["seed"]] * 10
                names = {*report.real_text.PANELS, "accuracy", "eval/accuracy", "pairwise_loss"}
                write_run(job.folder(root), curve, **dict.fromkeys(names, curve))
                rows = [{"chosen_score": 1.0 + 0.1 * i, "rejected_score": 1.5} for i in range(20)]
                (job.folder(root) / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    monkeypatch.setattr(report.runs, "run_jobs", write)
    monkeypatch.setattr(report.real_text, "run_jobs", write)
    report.real_text.main(cfg)
    page = (cfg.pages / "index.md").read_text()
    assert page.count("## Figure ") == 4
    assert "KL rises sharply | **agrees**" in page
    assert "the middle of the histogram | **agrees** | 0.450" in page
    assert "more than one in ten | **agrees** | 0.150" in page, "five of twenty differences are below 0"
    assert "the policy stays near the SFT model: KL | **disagrees**" in page
    texts = [page, *(file.read_text() for file in cfg.pages.glob("*.json"))]
    assert len(texts) == 5
    folders = {dialogues_file.parent.as_posix(), cfg.out.as_posix()}
    assert not any(folder in text for folder in folders for text in texts), "paths of the machine that ran it"
