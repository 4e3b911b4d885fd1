"""The ablations: every variant is a valid run that differs in what it says, and the page holds every table's rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from recipes.emoji import ablated_teachers, ablation_tables, ablations, plots
from recipes.emoji.ablation_runs import kept
from sana_sprint.models.transformer import TransformerConfig
from sana_sprint.train.config import StudentRun, TeacherRun, load_config
from sana_sprint.train.text import save_text
from sana_sprint.weights import save_model
from tests._autoencoders import tiny_autoencoder
from tests._models import tiny_transformer
from tests._text import tiny_text_encoder, tiny_tokenizer


def run_of(variant: ablations.Variant, folder: Path) -> StudentRun:
    values = ablations.run_values(variant, 1, Path("teacher"), folder / "out", 400)
    (folder / "stage.toml").write_text(ablations.to_toml(values))
    run = load_config(folder / "stage.toml")
    assert isinstance(run, StudentRun)
    return run


@pytest.mark.parametrize("variant", ablations.VARIANTS, ids=lambda variant: variant.name)
def test_variants_differ_from_the_recipe_in_what_they_say(variant: ablations.Variant, tmp_path: Path) -> None:
    run, baseline = run_of(variant, tmp_path), run_of(ablations.VARIANTS[0], tmp_path)
    assert run.seed == 1
    changed = {
        name: getattr(run, name)
        for name in StudentRun.model_fields
        if getattr(run, name) != getattr(baseline, name)
    }
    expected = {
        ablations.BASELINE: set(),
        "consistency loss only": {"discriminator", "schedule", "tangent_warmup_steps"},
        "adversarial loss only": {"scm_weight"},
        "one guidance scale": {"guidance_scales"},
        "with matching": {"matching", "schedule", "tangent_warmup_steps"},
        "matching for the adversarial loss": {"matching", "discriminator"},
        "max-time 0%": {"max_time_rate"},
        "max-time 70%": {"max_time_rate"},
    }
    assert set(changed) == expected.get(variant.name, {"discriminator"})
    # As many steps of the student, whoever else learns.
    assert run.schedule.steps == 200 * len(run.optimizers)


def test_every_row_has_a_variant_and_every_variant_a_row() -> None:
    rows = {name for table in ablation_tables.TABLES for name in table.rows}
    assert rows == {variant.name for variant in ablations.VARIANTS}


def test_the_page_shows_means_and_spreads() -> None:
    scores = [{key: value for key in ablation_tables.COLUMNS} for value in (0.5, 0.6)]
    results = {variant.name: scores for variant in ablations.VARIANTS}
    page = ablation_tables.document(results, steps=400, count=600)
    row = next(line for line in page.splitlines() if line.startswith("| max-time 70%"))
    assert (
        row
        == "| max-time 70% | 55.0% ± 5.0 | 55.0% ± 5.0 | 0.55 ± 0.05 | 0.55 ± 0.05 | 0.55 ± 0.05 | 8.11 / 28.02 |"
    )
    assert page.count("| both losses |") == len(ablation_tables.TABLES)


@pytest.mark.parametrize("name", ablated_teachers.VARIANTS)
def test_teachers_differ_in_their_model(name: str, tmp_path: Path) -> None:
    def run_of(name: str) -> TeacherRun:
        values = ablated_teachers.run_values(name, 1, Path("vae"), tmp_path, 200)
        (tmp_path / "stage.toml").write_text(ablations.to_toml(values))
        run = load_config(tmp_path / "stage.toml")
        assert isinstance(run, TeacherRun)
        return run

    run, recipe = run_of(name), run_of("dense time, QK norm")
    assert run.model_copy(update={"model": None, "output": None}) == recipe.model_copy(
        update={"model": None, "output": None}
    )
    config = TransformerConfig.from_dict(run.model or {})
    assert (config.time_scale == 1) == (name in ("dense time, QK norm", "no QK norm"))
    assert (config.qk_norm is not None) == (name in ("dense time, QK norm", "time in thousandths"))


def test_scores_are_kept_and_a_stopped_run_continues(tmp_path: Path) -> None:
    trained: list[Path] = []

    def train(values: dict[str, Any], folder: Path) -> None:
        trained.append(folder)
        assert values["output"] == str(folder)
        folder.mkdir(exist_ok=True)
        if len(trained) == 1:
            raise KeyboardInterrupt

    def scores(seed: int) -> dict[str, Any]:
        return kept({"output": str(tmp_path / "run"), "seed": seed}, train, lambda folder: {"seed": seed})

    with pytest.raises(KeyboardInterrupt):
        scores(1)
    assert [scores(1), scores(1), scores(2)] == [{"seed": 1}, {"seed": 1}, {"seed": 2}]
    assert trained[0] == trained[1] != trained[2]
    assert len(trained) == 3


def test_teachers_are_measured_tabled_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablated_teachers, "NUM_MEASURED", 6)

    def train(values: dict[str, Any], folder: Path) -> None:
        """Random weights for the variant's config."""
        fields = {name: values["model"].get(name) for name in ("timestep_scale", "qk_norm")}
        model = tiny_transformer("teacher", caption_channels=32, **fields)
        for part, module in (("transformer", model), ("vae", tiny_autoencoder("published"))):
            save_model(module, folder / "final" / part)
        save_text(tiny_tokenizer(), tiny_text_encoder(), folder / "final")
        log = [{"step": step, "loss": 2 / step, "grad_norm": step} for step in range(1, 9)]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, [*log, {"step": 8, "latent_rms": 1}])))

    found = ablated_teachers.results(tmp_path, tmp_path / "runs", 8, 1, train=train)
    plain, thousandths = (found[name][0] for name in ("dense time, QK norm", "time in thousandths"))
    assert (plain["loss"], plain["grad_norm"], plain["grad_norm_max"]) == (
        pytest.approx((2 / 7 + 2 / 8) / 2),
        4.5,
        8,
    )
    # The same weights, told a time that runs a thousand times as fast.
    assert thousandths["tangent"] > 5 * plain["tangent"] > 0
    assert thousandths["tangent_max"] >= thousandths["tangent"]
    page = ablated_teachers.section(found, 8)
    assert [line.split(" | ")[0][2:] for line in page.splitlines() if line.startswith("| ")][1:] == list(
        found
    )
    ablated_teachers.plot(found, tmp_path / "images" / "curves.png")
    with Image.open(tmp_path / "images" / "curves.png") as picture:
        assert picture.size == (2 * plots.WIDTH, plots.HEIGHT)
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or ()}
    # All curves are one here, and the last one lies on top; beside the names are all colours.
    assert {ImageColor.getrgb(color) for color in plots.COLORS[:4]} <= colors


def test_curves_leave_out_what_cannot_be_drawn(tmp_path: Path) -> None:
    plots.draw_curves({"x": {"a": [(0, 1.0), (1, 0.0), (2, float("inf")), (3, 2.0)]}}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="x: there is nothing"):
        plots.draw_curves({"x": {"a": [(0, 0.0)]}}, tmp_path / "b.png")
