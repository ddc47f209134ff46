from pathlib import Path

import pytest

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import built_in_recipes, find_recipe, title


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_fractions_and_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "r.toml", '[attack]\neps = "8/255"\n[neuron]\ntau = 1\n')
    recipe = load_recipe(
        file, ["neuron.reset=soft", "training.epochs=3", "defence.at.eps='1/8'", "data.root=/some where"]
    )
    assert recipe.attack.eps == 8 / 255
    assert recipe.neuron.tau == 1.0
    assert (recipe.neuron.reset, recipe.training.epochs, recipe.defence) == ("soft", 3, {"at": {"eps": "1/8"}})
    assert recipe.data.root == "/some where"
    assert recipe.portable().data.root == "data"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[neuron]\ntua = 0.5", ["unknown key 'neuron.tua'", "tau", "v_threshold"]),
        ("[nueron]\ntau = 0.5", ["unknown key 'nueron'", "neuron"]),
        ("[neuron]\ntau = 'half'", ["neuron.tau", "'half'"]),
        ("[neuron]\ntau = 1.5", ["neuron.tau", "less than or equal to 1"]),
        ("[neuron]\ntau = nan", ["neuron.tau", "finite"]),
        ("[neuron]\nreset = 'medium'", ["neuron.reset", "'hard' or 'soft'"]),
        ("[training]\nepochs = 2.5", ["training.epochs", "integer"]),
        ("[training]\nepochs = 0", ["training.epochs", "greater than or equal to 1"]),
        ("[training]\nepochs = true", ["training.epochs", "integer"]),
        ("[training]\nbatch_size = 10\naccumulate = 3", ["batch_size 10 must be a multiple"]),
        ("[attack]\neps = '8/0'", ["attack.eps", "'8/0'"]),
        ("[attack]\neps = 0", ["attack.eps", "greater than 0"]),
        ("[attack]\neps = 0.3", ["attack", "cannot reach eps 0.3"]),
        ("[training]\nseed = 99999999999999999999", ["training.seed", "less than"]),
        ("[model]\nwidth = 1e9", ["model.width", "less than or equal to 16"]),
        ("[data]\nvalidation_share = 1.0", ["data.validation_share", "less than 1"]),
        ("model = 'vgg11'", ["model", "Model"]),
        ("[neuron\n", ["not a TOML file"]),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(write(tmp_path / "mine.toml", text))
    message = str(error.value)
    assert "mine.toml" in message
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("override", ["training.epochs", "epochs=3", "=3", "training.=3"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match=r"section\.key=value"):
        load_recipe(write(tmp_path / "r.toml", ""), [override])


def test_wrong_override_names_the_switch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set"):
        load_recipe(write(tmp_path / "r.toml", ""), ["training.epochs=many"])


def test_every_built_in_recipe_loads_and_says_what_it_is() -> None:
    found = built_in_recipes()
    assert {"digits-reg", "digits-mpdsgr"} <= found.keys()
    for path in found.values():
        load_recipe(path)
        assert len(title(path)) > 20


def test_compared_recipes_differ_in_the_defence_alone() -> None:
    for baseline, others in {
        "digits-reg": ["digits-mpdsgr"],
        "cifar10-vgg11-quarter-reg": ["cifar10-vgg11-quarter-mpdsgr-theorem", "cifar10-vgg11-quarter-mpdsgr-empirical"],
    }.items():
        reference = load_recipe(find_recipe(baseline))
        for other in others:
            recipe = load_recipe(find_recipe(other))
            assert recipe.method == "MPD-SGR"
            assert recipe.model_copy(update={"defence": reference.defence}) == reference


def test_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'digits-reg'"):
        find_recipe("digits-rag")
    with pytest.raises(InputError, match="does not exist"):
        find_recipe(str(tmp_path / "no.toml"))
