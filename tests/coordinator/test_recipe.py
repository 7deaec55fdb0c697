"""Recipes: presets by name, single overrides that leave the rest alone, and refusals that name what is wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from clip_lora.errors import ModelError
from coordinator.config import load
from coordinator.defence import Defence
from coordinator.recipe import PRESETS, FederationRecipe, Personalisation, TextTraining, parse_recipe
from protocol.messages import Privacy, Recipe
from protocol.settings import SettingsError

MINIMAL = 'federation = "lab"\nclasses = ["cat", "dog"]\n'

# docs/method.md, "Baselines", written out: text training, query, orthogonal loss, features, aggregation, first block, steps.
BASELINES = {
    "fedalign": (True, "R1", 0.1, True, "mean_of_factors", 0, True),
    "fedlora": (False, "none", 0.0, False, "mean_of_factors", 0, True),
    "local": (False, "identity", 0.0, False, "none", 0, True),
    "zero-shot": (False, "none", None, False, "none", 0, False),
    "feddtl": (True, "none", 0.0, True, "mean_of_factors", -3, True),
}


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "coordinator.toml"
        file.write_text(MINIMAL + text)
        return file

    return write


def named(name):
    return FederationRecipe.model_validate(name)


def changed(recipe, base):
    """The fields, by path, in which two recipes differ."""
    ours, theirs = recipe.model_dump(), base.model_dump()
    found = {}
    for key, value in ours.items():
        if isinstance(value, dict):
            found |= {f"{key}.{k}": v for k, v in value.items() if v != theirs[key][k]}
        elif value != theirs[key]:
            found[key] = value
    return found


@pytest.mark.parametrize("name", BASELINES)
def test_a_preset_turns_on_what_the_method_says_of_it(name):
    text, query, mu, features, aggregation, first_block, steps = BASELINES[name]
    recipe = named(name)
    assert recipe.name == name
    assert (recipe.text.steps > 0, recipe.personal.query) == (text, query)
    assert mu is None or recipe.mu == mu
    assert (recipe.features_per_class > 0, recipe.aggregation, recipe.first_block) == (features, aggregation, first_block)
    assert (recipe.local_steps > 0) == steps


def test_there_is_a_baseline_for_every_preset_and_only_feddtl_goes_without_prototypes():
    assert set(PRESETS) == set(BASELINES)
    assert [name for name in PRESETS if not named(name).text.prototypes_for_missing] == ["feddtl"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_by_string_by_table_and_by_the_command_line(name):
    recipe = named(name)
    assert recipe == named({"name": name}) == parse_recipe(name) == FederationRecipe(name=name)


def test_without_a_name_it_is_fedalign():
    assert FederationRecipe() == named({}) == named("fedalign")
    assert named({"mu": 0.0}) == named({"name": "fedalign", "mu": 0.0})


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_comes_back_from_its_own_fields(name):
    recipe = named({"name": name, "mu": 0.25, "text": {"steps": 7}})
    assert named(recipe.model_dump()) == recipe
    assert named(recipe) == recipe


OVERRIDES = {
    "mu": 0.2,
    "rank": 9,
    "local_steps": 1,
    "aggregation": "mean_of_products",
    "first_block": -1,
    "text.steps": 50,
    "text.rank": 2,
    "text.balance_classes": False,
    "personal.query": "R2",
    "personal.tau_q": math.inf,
    "personal.cut": 3,
    "personal.own_share": 0.5,
    "personal.clusters": 8,
}


def nested(path, value):
    *parents, key = path.split(".")
    return {parents[0]: {key: value}} if parents else {key: value}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("path", OVERRIDES)
def test_a_single_override_changes_itself_alone(name, path):
    value = OVERRIDES[path]
    recipe = named({"name": name, **nested(path, value)})
    assert changed(recipe, named(name)) == {path: value}
    assert parse_recipe(f"{name}+{path}={value}") == recipe


@settings(deadline=None)
@given(paths=st.lists(st.sampled_from(sorted(OVERRIDES)), unique=True), name=st.sampled_from(sorted(PRESETS)))
def test_overrides_come_together_in_any_order(paths, name):
    text = "+".join([name, *(f"{path}={OVERRIDES[path]}" for path in paths)])
    assert changed(parse_recipe(text), named(name)) == {path: OVERRIDES[path] for path in paths}


def test_a_part_may_be_given_as_a_record_too():
    recipe = FederationRecipe(text=TextTraining(steps=5), personal=Personalisation(query="R3"))
    assert (recipe.text.steps, recipe.personal.query) == (5, "R3")


def test_the_command_line_of_the_papers_ablation():
    recipe = parse_recipe("fedalign+mu=0+personal.tau_q=inf")
    assert changed(recipe, named("fedalign")) == {"mu": 0.0, "personal.tau_q": math.inf}
    assert (recipe.text.steps, recipe.personal.query) == (20, "R1")


REFUSED = {
    "unknown-name": ("fedmagic", "no recipe 'fedmagic': choose one of fedalign, fedlora, local, zero-shot, feddtl"),
    "empty": ("", "no recipe ''"),
    "unknown-key": ("fedalign+muu=0", "muu"),
    "unknown-part": ("fedalign+txt.steps=0", "txt"),
    "unknown-key-of-a-part": ("fedalign+personal.tau=inf", "personal.tau"),
    "without-a-value": ("fedalign+mu", "'mu' in recipe 'fedalign+mu': write KEY=VALUE"),
    "not-a-number": ("fedalign+mu=much", "mu"),
    "not-a-query": ("fedalign+personal.query=R9", "personal.query"),
    "no-temperature": ("fedalign+personal.tau_q=0", "personal.tau_q"),
    "nan-temperature": ("fedalign+personal.tau_q=nan", "personal.tau_q"),
    "share-above-one": ("fedalign+personal.own_share=1.5", "personal.own_share"),
    "negative-cut": ("fedalign+personal.cut=-1", "personal.cut"),
    "negative-steps": ("fedalign+text.steps=-1", "text.steps"),
    "part-as-a-value": ("fedalign+text=3", "text"),
    "key-of-a-value": ("fedalign+mu=0+mu.x=1", "mu"),
    "key-of-a-part-as-a-value": ("fedalign+text=3+text.steps=2", "text"),
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_recipe_is_refused_naming_it(text, sentence):
    with pytest.raises(ValueError) as caught:
        parse_recipe(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("given", [3, None, ["fedalign"], {"name": None}, {"name": ["fedalign"]}, {"text": "much"}], ids=str)
def test_what_is_neither_a_name_nor_a_table_is_refused(given):
    with pytest.raises(ValidationError):
        FederationRecipe.model_validate(given)


def test_a_recipe_does_not_change_the_presets():
    before = str(PRESETS)
    for name in PRESETS:
        named({"name": name, "text": {"steps": 1}, "personal": {"query": "R3"}})
    assert str(PRESETS) == before


@pytest.mark.parametrize(
    ("first", "depth", "expected"), [(-3, 12, 9), (-3, 6, 3), (-3, 3, 0), (-3, 2, 0), (0, 6, 0), (4, 6, 4)]
)
def test_a_negative_first_block_counts_from_the_last(first, depth, expected):
    assert named({"name": "feddtl", "first_block": first}).training(depth).first_block == expected


def test_a_cut_above_the_model_is_refused():
    recipe = named({"name": "fedalign", "personal": {"cut": 7}})
    assert recipe.training(7)
    with pytest.raises(ModelError, match=r"personal\.cut is 7, the model's image tower has 6 blocks"):
        recipe.training(6)


def test_projections_are_separated_by_strokes_in_a_recipe_written_as_one_word():
    assert parse_recipe("fedlora+projections=q_proj/v_proj").projections == ("q_proj", "v_proj")


@pytest.mark.parametrize("name", PRESETS)
def test_what_travels_has_the_wires_fields_only_with_the_recipes_values(name):
    recipe = named({"name": name, "rank": 3, "learning_rate": 0.5, "projections": ["v_proj"], "text": {"rank": 17}})
    travels = recipe.training(6)
    assert type(travels) is Recipe
    assert set(travels.model_dump()) == set(Recipe.model_fields)
    assert not {"name", "aggregation", "text", "personal"} & set(travels.model_dump())
    for key in set(Recipe.model_fields) - {"first_block"}:
        assert getattr(travels, key) == getattr(recipe, key)
    assert Recipe.model_validate_json(travels.model_dump_json()) == travels


@pytest.mark.parametrize("name", PRESETS)
def test_a_federations_file_names_a_recipe(write, name):
    assert load(write(f'recipe = "{name}"\n')).recipe == named(name)


def test_a_federations_file_without_a_recipe_is_fedalign(write):
    assert load(write("")).recipe == named("fedalign")


@pytest.mark.parametrize(
    "text",
    [
        'recipe = { name = "feddtl", rank = 2, text = { steps = 50 }, personal = { tau_q = inf } }\n',
        '[recipe]\nname = "feddtl"\nrank = 2\n[recipe.text]\nsteps = 50\n[recipe.personal]\ntau_q = inf\n',
    ],
    ids=["inline", "tables"],
)
def test_a_federations_file_overrides_single_fields_of_a_recipe(write, text):
    recipe = load(write(text)).recipe
    assert changed(recipe, named("feddtl")) == {"rank": 2, "text.steps": 50, "personal.tau_q": math.inf}
    assert not recipe.text.prototypes_for_missing


BAD_FILES = {
    "unknown-recipe": ('recipe = "fedmagic"\n', "no recipe 'fedmagic': choose one of fedalign, fedlora"),
    "unknown-recipe-in-a-table": ('[recipe]\nname = "fedmagic"\n', "no recipe 'fedmagic'"),
    "unknown-key": ("[recipe]\ntau = 1\n", "unknown key 'recipe.tau'"),
    "unknown-key-of-the-text": ("[recipe.text]\nstep = 1\n", "unknown key 'recipe.text.step'"),
    "unknown-key-of-the-query": ("[recipe.personal]\ntau = 1\n", "unknown key 'recipe.personal.tau'"),
    "unknown-aggregation": ('[recipe]\naggregation = "mode"\n', "recipe.aggregation"),
    "median-of-factors-that-differ": (
        '[recipe]\naggregation = "median"\n',
        "aggregation median needs freeze_a = true: (c B, A",
    ),
    "trim-of-factors-that-differ": ('[recipe]\naggregation = "trimmed_mean"\n', "trimmed_mean needs freeze_a = true"),
    "frozen-a-made-anew": ('[recipe]\naggregation = "mean_of_products"\nfreeze_a = true\n', "choose mean_of_factors"),
    "a-limit-below-the-median": ("[recipe.defence]\nnorm_limit = 0.5\n", "recipe.defence.norm_limit"),
    "a-limit-that-is-no-number": ("[recipe.defence]\nnorm_limit = nan\n", "recipe.defence.norm_limit"),
    "half-of-them-malicious": ("[recipe.defence]\nmalicious_share = 0.5\n", "recipe.defence.malicious_share"),
    "unknown-key-of-the-defence": ("[recipe.defence]\nlimit = 1\n", "unknown key 'recipe.defence.limit'"),
    "a-number": ("recipe = 3\n", "recipe"),
    "a-name-that-is-a-list": ('[recipe]\nname = ["fedalign"]\n', "recipe"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_federations_file_with_a_bad_recipe_is_refused_naming_it(write, text, sentence):
    with pytest.raises(SettingsError) as caught:
        load(write(text))
    assert sentence in str(caught.value)


PRIVACY = {"clip": 0.5, "noise_multiplier": 1.5, "delta": 1e-5, "epsilon": 8.0}


def test_privacy_is_off_by_default_and_travels_when_it_is_on(write):
    assert all(named(name).privacy is None for name in PRESETS)
    table = "".join(f"{key} = {value}\n" for key, value in PRIVACY.items())
    recipe = load(write(f"[recipe]\nfeatures_per_class = 0\n[recipe.privacy]\n{table}")).recipe
    spelled = "+".join(f"privacy.{key}={value}" for key, value in PRIVACY.items())
    assert recipe == parse_recipe(f"fedalign+features_per_class=0+{spelled}")
    assert recipe.training(6).privacy == Privacy(**PRIVACY)
    assert Recipe.model_validate_json(recipe.training(6).at_rank(2).model_dump_json()).privacy == Privacy(**PRIVACY)


def test_privacy_with_features_is_refused_and_told_why(write):
    table = "".join(f"{key} = {value}\n" for key, value in PRIVACY.items())
    with pytest.raises(SettingsError, match=r"recipe: privacy needs features_per_class = 0: a feature is one picture's"):
        load(write(f"[recipe.privacy]\n{table}"))


@pytest.mark.parametrize("key", PRIVACY)
@pytest.mark.parametrize("value", [None, 0, -1.0, math.nan, math.inf])
def test_a_promise_has_no_default_and_takes_no_nonsense(write, key, value):
    fields = {**PRIVACY, key: value}
    table = "".join(f"{name} = {number}\n" for name, number in fields.items() if number is not None)
    with pytest.raises(SettingsError, match=f"recipe.privacy.{key}"):
        load(write(f"[recipe]\nfeatures_per_class = 0\n[recipe.privacy]\n{table}"))


def test_a_delta_that_promises_nothing_is_refused():
    with pytest.raises(ValidationError, match="delta"):
        Privacy(**{**PRIVACY, "delta": 0.01})


def test_the_defence_can_be_switched_off_and_robust_averages_chosen():
    off = parse_recipe("fedalign+defence.norm_limit=inf+defence.sample_cap=inf")
    assert (off.defence.norm_limit, off.defence.sample_cap) == (math.inf, math.inf)
    assert (named("fedalign").defence.norm_limit, named("fedalign").defence.over_limit) == (4.0, "reject")
    for aggregation in ("median", "trimmed_mean"):
        assert parse_recipe(f"fedlora+aggregation={aggregation}+freeze_a=true").training(6).freeze_a
    assert not parse_recipe("fedlora+aggregation=multi_krum").freeze_a


@pytest.mark.parametrize(
    ("share", "clients", "malicious"), [(0.2, 10, 2), (0.2, 4, 0), (0.2, 5, 1), (0.0, 99, 0), (0.3, 9, 2)]
)
def test_how_many_of_so_many_may_be_malicious(share, clients, malicious):
    assert Defence(malicious_share=share).malicious(clients) == malicious
