"""The ablations: every variant is a valid run that differs in what it says, and the page holds every table's rows."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from recipes.emoji import ablated_teachers, ablation_tables, ablations, evaluate, plots
from recipes.emoji.ablation_runs import Run, folder_of, kept, run_all, to_toml, train
from recipes.emoji.scenes import render
from sana_sprint.models.transformer import TransformerConfig
from sana_sprint.train.config import StudentRun, TeacherRun, load_config
from sana_sprint.train.models.text_encoder import save_text
from sana_sprint.weights import save_model
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.models import tiny_transformer
from tests.helpers.text import tiny_text_encoder, tiny_tokenizer


def run_of(name: str, folder: Path) -> StudentRun:
    arguments = Namespace(output=folder / "out", steps=400, batch_size=64)
    values = ablations.run_values(Run(name, 1), Path("teacher"), arguments)
    (folder / "stage.toml").write_text(to_toml(values))
    run = load_config(folder / "stage.toml")
    assert isinstance(run, StudentRun)
    return run


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_variants_differ_from_the_recipe_in_what_they_say(name: str, tmp_path: Path) -> None:
    run, baseline = run_of(name, tmp_path), run_of(ablation_tables.BASELINE, tmp_path)
    assert run.seed == 1
    changed = {field for field in StudentRun.model_fields if getattr(run, field) != getattr(baseline, field)}
    changed.discard("output")
    expected = {
        ablation_tables.BASELINE: set(),
        ablation_tables.START: {"schedule"},
        "consistency loss only": {"discriminator", "schedule", "tangent_warmup_steps"},
        "adversarial loss only": {"scm_weight"},
        "one guidance scale": {"guidance_scales"},
        "max-time 0%": {"max_time_rate"},
        "max-time 70%": {"max_time_rate"},
    }
    assert changed == expected.get(name, {"discriminator"})
    # As many steps of the student, whoever else learns.
    assert run.schedule.steps == (200 if name != ablation_tables.START else 1) * len(run.optimizers)


def test_every_row_has_a_variant_and_every_variant_a_row() -> None:
    rows = {name for table in ablation_tables.TABLES for name in table.rows}
    assert rows == set(ablations.VARIANTS)


def test_the_page_shows_means_and_spreads() -> None:
    scores = [{key: value for key in ablation_tables.HEADINGS} for value in (0.5, 0.6)]
    results = dict.fromkeys(ablations.VARIANTS, scores)
    page = ablation_tables.document(results, steps=400, batch_size=64, count=600)
    rows = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| ")}
    shown = "55.0% ± 5.0 | 55.0% ± 5.0 | 0.55 ± 0.05 | 0.55 ± 0.05 | 0.55 ± 0.05"
    assert rows["max-time 70%"] == f"| max-time 70% | {shown} | 8.11 / 28.02 |"
    # Only this table asks for a guidance scale that is not the trained one.
    assert rows["one guidance scale"].startswith(
        f"| one guidance scale | {shown} | 55.0% ± 5.0 | 0.55 ± 0.05 | 9.23"
    )
    assert page.count("| both losses |") == len(ablation_tables.TABLES)


def test_one_seed_has_no_spread() -> None:
    assert ablation_tables.entry([0.615], "judge1") == "61.5%"


def test_words_above_the_mark_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Words\n\n")
    for tables in ("first\n", "second\n"):
        ablation_tables.write(page, tables)
        assert page.read_text() == f"# Words\n\n{ablation_tables.MARK}\n{tables}"


def test_the_gradient_norm_of_each_loss_is_drawn(tmp_path: Path) -> None:
    scores = [{"curves": {"grad_norm": [(20, 1.0), (40, 3.0)]}}]
    ablation_tables.plot(dict.fromkeys(ablations.VARIANTS, scores), tmp_path)
    with Image.open(tmp_path / ablation_tables.PLOT) as picture:
        assert picture.size == (plots.WIDTH, plots.HEIGHT)


@pytest.mark.parametrize("name", ablated_teachers.VARIANTS)
def test_teachers_differ_in_their_model(name: str, tmp_path: Path) -> None:
    def run_of(name: str) -> TeacherRun:
        values = ablated_teachers.run_values(name, 1, Path("vae"), tmp_path, 200, 64)
        (tmp_path / "stage.toml").write_text(to_toml(values))
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


def test_folders_of_teachers_keep_their_names() -> None:
    """Whatever is done to the code: finished runs are found again by them. A changed recipe has other names."""
    output = Path("runs/emoji/ablations")
    values = ablated_teachers.run_values("dense time, QK norm", 0, Path("vae"), output, 300, 64)
    assert folder_of(values) == output / "teacher-dense-time--QK-norm-0-75f4515b"


def test_one_failure_takes_no_other_run_down() -> None:
    assert run_all(["1", "2"], 2, int) == {"1": 1, "2": 2}
    with pytest.raises(RuntimeError, match=r"^1 of 3 failed: x \(invalid literal"):
        run_all(["x", "1", "2"], 1, int)
    assert str(Run("max-time 0%", 1)) == "max-time 0%, seed 1"


def test_what_a_training_says_goes_to_its_log(tmp_path: Path) -> None:
    """Alone and failing at once, for the stage file says nothing."""
    with pytest.raises(RuntimeError, match=r"code 2: .*train\.log"):
        train({"stage": "student"}, tmp_path, processes=1, is_logged=True)
    assert "stage.toml" in (tmp_path / "train.log").read_text()


def test_teachers_are_measured_tabled_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablated_teachers, "NUM_MEASURED", 6)
    monkeypatch.setattr(ablated_teachers, "NUM_JUDGED", 6)
    # The judge takes no pictures of so small a model.
    monkeypatch.setattr(evaluate, "teacher_pictures", lambda folder, scenes, *_: [*map(render, scenes)])

    def train(name: str) -> Path:
        """Random weights for the variant's config."""
        values = ablated_teachers.run_values(name, 0, Path("vae"), tmp_path, 8, 64)
        folder = folder_of(values)
        fields = {name: values["model"].get(name) for name in ("timestep_scale", "qk_norm")}
        model = tiny_transformer("teacher", caption_channels=32, **fields)
        for part, module in (("transformer", model), ("vae", tiny_autoencoder("published"))):
            save_model(module, folder / "final" / part)
        save_text(tiny_tokenizer(), tiny_text_encoder(), folder / "final")
        log = [{"step": step, "loss": 2 / step, "grad_norm": step} for step in range(1, 9)]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, [*log, {"step": 8, "latent_rms": 1}])))
        return folder

    found = {name: [ablated_teachers.score(train(name))] for name in ablated_teachers.VARIANTS}
    plain, thousandths = (found[name][0] for name in ("dense time, QK norm", "time in thousandths"))
    assert (plain["judge"], plain["loss"], plain["grad_norm"], plain["grad_norm_max"]) == (
        1,
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
