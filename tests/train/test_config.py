"""Stage files: recipes are valid, mistakes are named, and no field is without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from sana_sprint.train import config, loop
from sana_sprint.train.config import load_config
from sana_sprint.train.sections import Section
from tests.helpers.toy_stage import Toy, toy_run
from tests.helpers.training import (
    FIELDS_READ,
    adaptation_run,
    chain,
    control_student_run,
    full_run,
    parse,
    reads,
    silent,
    student_run,
    train,
    weighed_run,
)

RECIPES = Path(__file__).parents[2] / "recipes"


def test_recipes_are_valid_and_overrides_apply() -> None:
    recipes = sorted(RECIPES.glob("*/*.toml"))
    assert len(recipes) >= 6
    for recipe in recipes:
        load_config(recipe)
    run = load_config(recipes[0], ["schedule.steps=7", "output=elsewhere"])
    assert run.schedule.steps == 7
    assert run.output == Path("elsewhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.stepz=3", "stepz"),
        ("schedule.steps=0", "greater than or equal to 1"),
        ("nonsense", "KEY=VALUE"),
        ("seed.x=1", "is a value, not a section"),
        ("data.num_samples=3", "num_samples"),  # of the stages that cache latents, which this is not
        ("optimizer.betas=[0.9, 1.0]", "less than 1"),
        ("distribution=fsdp", "'replicate' or 'shard'"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(RECIPES / "emoji/autoencoder.toml", ["seed=0", override])


def sections(model: type[Section]) -> dict[str, type[Section]]:
    """A run's own section and all below it, by name."""
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= sections(kind)
    return found


def test_every_field_has_an_effect(tmp_path: Path) -> None:
    """Reads are noted while all stages train: a field that none of a stage's code reads cannot matter to it."""
    folder = chain()  # its reads count
    student: dict[str, Any] = student_run(tmp_path / "alone", folder / "teacher" / "final", steps=1)
    train(student)
    train(adaptation_run(tmp_path / "adapted", folder / "teacher" / "final", steps=1))
    # In place of [matching], which both runs of the chain have.
    full = full_run(tmp_path / "weighed", folder / "teacher" / "final", steps=3)
    control = control_student_run(tmp_path / "control-weighed", folder, steps=3)
    for values in (full, control):
        train(weighed_run(values))
    for optimizer in (
        "muon",
        "came",
    ):  # the optimisers' own fields; what reads them is the same for every stage
        run = parse(toy_run(tmp_path / optimizer, **{"optimizer.name": optimizer}))
        with reads("any"):
            loop.run(Toy(run), run, report=silent)
    for model in get_args(config.AnyRun):
        stage = get_args(model.model_fields["stage"].annotation)[0]
        fields = {
            (name, field) for name, section in sections(model).items() for field in section.model_fields
        }
        seen = {(section, field) for where, section, field in FIELDS_READ if where in (stage, "any")}
        assert not sorted(fields - seen), f"fields of {stage} that nothing reads"


def test_the_resolved_config_is_saved_and_read_back(tmp_path: Path) -> None:
    run = parse(toy_run(tmp_path, steps=1))  # has a limit that is infinite, which JSON proper cannot say
    loop.run(Toy(run), run, report=silent)
    assert parse(json.loads((tmp_path / "config.json").read_text())) == run


def test_fields_that_may_change_are_fields() -> None:
    names = set()
    for model in get_args(config.AnyRun):
        for name, field in model.model_fields.items():
            names.add(name)
            inner = field.annotation
            for kind in (inner, *get_args(inner)):  # a section may be optional
                if isinstance(kind, type) and issubclass(kind, Section):
                    names |= {f"{name}.{each}" for each in kind.model_fields}
    assert names >= config.MAY_CHANGE
