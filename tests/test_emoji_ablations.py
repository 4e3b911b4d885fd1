"""The ablations: every variant is a valid run that differs in what it says, and the page holds every table's rows."""

from pathlib import Path

import pytest

from recipes.emoji import ablation_tables, ablations
from sana_sprint.train.config import StudentRun, load_config


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
    }
    assert set(changed) == expected.get(variant.name, {"discriminator"})
    # As many steps of the student, whoever else learns.
    assert run.schedule.steps == (200 if run.discriminator is None else 400)


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
    assert page.count("both losses") == 4
