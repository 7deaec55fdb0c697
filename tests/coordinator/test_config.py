"""One TOML describes a federation; what cannot work is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import TEMPLATE, CoordinatorConfig, load
from coordinator.recipe import FederationRecipe
from protocol.settings import SettingsError

MINIMAL = 'federation = "lab"\nclasses = ["cat", "dog"]\n'


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "coordinator.toml"
        file.write_text(text)
        return file

    return write


def test_the_template_loads_and_says_what_the_defaults_are(write, tmp_path):
    file = write(TEMPLATE.format(file="c.toml", federation="lab", classes='"cat", "dog"', broker="mqtt://localhost:1883"))
    defaults = CoordinatorConfig(federation="lab", classes=("cat", "dog"), state=tmp_path / "state")
    assert load(file) == defaults
    assert defaults.recipe == FederationRecipe(name="fedalign")


def test_the_commented_lines_of_the_recipe_are_settings_that_load_and_the_defaults(write, tmp_path):
    text = TEMPLATE.format(file="c.toml", federation="lab", classes='"cat", "dog"', broker="mqtt://localhost:1883")
    lines = text.splitlines()
    start, end = lines.index("[recipe]"), lines.index("[broker]")
    settings = [line.removeprefix("# ") for line in lines[start:end]]
    private = next(number for number, line in enumerate(settings) if line.startswith("[recipe.privacy]"))
    privacy = settings[private : settings.index("", private)]
    assert sum(line.startswith("[recipe") for line in settings) == 5
    assert len(settings) > 20
    plain = [*settings[:private], *settings[private + len(privacy) :]]
    assert load(write("\n".join([*lines[:start], *plain, *lines[end:]]))).recipe == FederationRecipe(name="fedalign")
    zero = "features_per_class = 0"
    given = load(write("\n".join([*lines[:start], "[recipe]", zero, *privacy, *lines[end:]]))).recipe
    assert given.privacy is not None  # a promise has no default
    assert given == FederationRecipe(features_per_class=0, privacy=given.privacy)


def test_a_recipe_is_a_name_or_a_table_of_overrides(write):
    assert load(write(MINIMAL + 'recipe = "fedlora"\n')).recipe == FederationRecipe(name="fedlora")
    changed = load(write(MINIMAL + '[recipe]\naggregation = "mean_of_products"\nmu = 0.5\ntext = { steps = 3 }\n')).recipe
    assert (changed.name, changed.aggregation, changed.mu, changed.text.steps) == ("fedalign", "mean_of_products", 0.5, 3)
    assert changed.personal == FederationRecipe(name="fedalign").personal


def test_a_minimal_file_is_enough(write):
    config = load(write(MINIMAL))
    assert (config.classes, config.model, config.templates) == (("cat", "dog"), "tiny-clip", ("a photo of a {}",))


def test_the_default_state_folder_is_relative_to_the_file_too(write, tmp_path):
    assert load(write(MINIMAL)).state == tmp_path / "state"


def test_the_state_folder_is_relative_to_the_file_unless_it_is_absolute(write, tmp_path):
    assert load(write(MINIMAL + 'state = "deep/er"\n')).state == tmp_path / "deep" / "er"
    assert load(write(MINIMAL + 'state = "/var/lib/lab"\n')).state == Path("/var/lib/lab")


def test_the_brokers_files_are_relative_to_the_file(write, tmp_path):
    config = load(write(MINIMAL + '[broker]\nurl = "mqtts://h"\npassword_file = "password.txt"\nca_file = "ca.pem"\n'))
    assert config.broker.password_file == tmp_path / "password.txt"
    assert config.broker.ca_file == tmp_path / "ca.pem"


BAD = {
    "quorum-above-the-clients": (MINIMAL + "quorum = 3\n", "quorum 3 can never be reached with clients_per_round 2"),
    "duplicate-classes": ('federation = "lab"\nclasses = ["cat", "cat"]\n', "classes must differ"),
    "one-class": ('federation = "lab"\nclasses = ["cat"]\n', "classes"),
    "no-classes": ('federation = "lab"\n', "key 'classes' is missing"),
    "template-without-a-place": (MINIMAL + 'templates = ["a photo"]\n', "'a photo' needs exactly one {}"),
    "template-with-two-places": (MINIMAL + 'templates = ["{} and {}"]\n', "needs exactly one {}"),
    "no-templates": (MINIMAL + "templates = []\n", "templates"),
    "unknown-key": (MINIMAL + "round = 5\n", "unknown key 'round'"),
    "unknown-key-in-the-recipe": (MINIMAL + "[recipe]\nlr = 0.1\n", "unknown key 'recipe.lr'"),
    "unknown-aggregation": (MINIMAL + '[recipe]\naggregation = "mode"\n', "recipe.aggregation"),
    "aggregation-outside-the-recipe": (MINIMAL + 'aggregation = "none"\n', "unknown key 'aggregation'"),
    "unknown-recipe": (MINIMAL + 'recipe = "fedmagic"\n', "no recipe 'fedmagic': choose one of fedalign, fedlora"),
    "unknown-projection": (MINIMAL + '[recipe]\nprojections = ["fc1"]\n', "recipe.projections"),
    "projection-named-twice": (MINIMAL + '[recipe]\nprojections = ["q_proj", "q_proj"]\n', "each once"),
    "federation-with-a-slash": (MINIMAL.replace("lab", "a/b"), "federation"),
    "no-rounds": (MINIMAL + "rounds = 0\n", "rounds"),
    "negative-seed": (MINIMAL + "seed = -1\n", "seed"),
    "endless-rate": (MINIMAL + "[recipe]\nlearning_rate = inf\n", "recipe.learning_rate"),
    "not-toml": ("federation = ", "cannot be read as TOML"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused_naming_file_and_key(write, text, sentence):
    file = write(text)
    with pytest.raises(SettingsError) as caught:
        load(file)
    assert sentence in str(caught.value)
    assert str(file) in str(caught.value)


def test_every_problem_of_a_file_is_reported_at_once(write):
    with pytest.raises(SettingsError) as caught:
        load(write(MINIMAL + "rounds = 0\nsede = 1\ndeadline_s = -1\n"))
    assert all(key in str(caught.value) for key in ("rounds", "sede", "deadline_s"))


@pytest.mark.parametrize("template", ["a {} of {style}", "{} in a {", "{} }"], ids=["named", "open", "closed"])
def test_a_template_that_cannot_be_filled_is_refused(write, template):
    with pytest.raises(SettingsError, match="template"):
        load(write(MINIMAL + f'templates = ["{template}"]\n'))


def test_a_missing_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(SettingsError, match="clipcast coordinator init"):
        load(tmp_path / "absent.toml")
