from pathlib import Path

import pytest

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe, load_recipe
from mpdsgr_deploy.recipes import built_in_recipes, find_recipe, flattened, published, title
from mpdsgr_deploy.schema import read_toml, to_toml


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
    ("defence", "encoding", "method"),
    [
        ({}, "direct", "REG"),
        ({}, "frames", "REG"),
        ({"at": {}, "sr": {}}, "direct", "AT + SR"),
        ({}, "poisson", "REG + POISSON"),
        ({"at": {}}, "sqe", "AT + SQE"),
    ],
)
def test_a_method_is_named_by_its_defences_and_by_an_encoding_that_changes_images(
    defence: dict[str, object], encoding: str, method: str
) -> None:
    assert Recipe.model_validate({"defence": defence, "encoding": {"name": encoding}}).method == method


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
        ("[attack]\nsurrogates = 3", ["attack.surrogates", "must be a list", "3"]),
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


BUILT_IN = built_in_recipes()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_recipe_loads_says_what_it_is_and_can_be_copied(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(BUILT_IN[name])
    assert len(title(BUILT_IN[name])) > 20
    copy = write(tmp_path / "copy.toml", flattened(BUILT_IN[name]))
    assert load_recipe(copy) == recipe
    assert title(copy) == title(BUILT_IN[name])
    assert not {"extends", "published"} & read_toml(copy).keys()


def test_a_copy_keeps_every_kind_of_value(tmp_path: Path) -> None:
    values = {
        "text": 'a "b"\n\\ ü',
        "on": True,
        "n": 3,
        "small": 1e-05,
        "list": [1, 2],
        "tables": [{"n": 1, "s": "x"}, {"n": 2}],
        "t": {"x": {}, "y": {"z-z": 1.0}},
    }
    assert read_toml(write(tmp_path / "all.toml", to_toml(values))) == values


@pytest.mark.parametrize("name", BUILT_IN)
def test_published_figures_are_percentages_with_their_source_and_fall_with_the_attack(name: str) -> None:
    found = published(BUILT_IN[name])
    if found is None:
        return
    figures = [v for v in (found.clean, found.fgsm, found.pgd, found.bim) if v is not None]
    assert figures == sorted(figures, reverse=True)
    assert any(data in found.table for data in ("CIFAR-10,", "CIFAR-100,", "Tiny-ImageNet,"))


def test_wrong_published_figures_are_refused(tmp_path: Path) -> None:
    for text, expected in (("table = 'T'\nclean = 101", "clean"), ("clean = 1", "table"), ("table='T'\npdg=1", "pdg")):
        with pytest.raises(InputError, match=expected):
            published(write(tmp_path / "r.toml", f"[published]\n{text}\n"))


def test_extends_merges_table_by_table_and_inherits_no_published_figures(tmp_path: Path) -> None:
    write(
        tmp_path / "a.toml",
        "[published]\ntable = 'T'\n[training]\nlr = 0.2\nepochs = 9\n[defence.at]\neps = 0.1\nsteps = 3\n",
    )
    write(tmp_path / "b.toml", "extends = 'a'\n[training]\nepochs = 5\n[defence.at]\nsteps = 1\n")
    last = write(tmp_path / "c.toml", "extends = 'b'\n[defence.rat]\n")
    recipe = load_recipe(last)
    assert (recipe.training.lr, recipe.training.epochs) == (0.2, 5)
    assert recipe.defence == {"at": {"eps": 0.1, "steps": 1}, "rat": {}}
    assert published(last) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends = 'gone'", "cannot read .*gone.toml"),
        ("extends = 'r'", "extends itself"),
        ("extends = '../r'", "in the same folder"),
        ("extends = 3", "in the same folder"),
    ],
)
def test_unsound_extends(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_recipe(write(tmp_path / "r.toml", text))


ADDED_BY = {  # the last word of a recipe's name -> the sections in which it differs from its neighbour
    "mpdsgr": {"defence"},
    "sr": {"defence"},
    "stog": {"defence"},
    "dlif": {"defence"},
    "at": {"defence"},
    "rat": {"defence", "training"},
    "feel": {"defence", "encoding"},
}


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name.rpartition("-")[2] in ADDED_BY])
def test_compared_recipes_differ_in_what_the_paper_changes_alone(name: str) -> None:
    family, _, method = name.rpartition("-")
    recipe = load_recipe(BUILT_IN[name])
    neighbour = load_recipe(BUILT_IN[family if family in BUILT_IN else f"{family}-reg"])
    assert {section for section in Recipe.model_fields if getattr(recipe, section) != getattr(neighbour, section)} == (
        ADDED_BY[method]
    )
    (added,) = recipe.defence.keys() - neighbour.defence.keys()
    assert added.replace("-", "") == method
    assert {key: recipe.defence[key] for key in neighbour.defence} == neighbour.defence
    if method == "rat":
        assert recipe.training == neighbour.training.model_copy(update={"weight_decay": 0.0})
    if method == "feel":
        assert recipe.encoding == neighbour.encoding.model_copy(update={"name": "frequency"})


def test_compared_settings_differ_in_what_their_names_say_alone() -> None:
    base = load_recipe(BUILT_IN["cifar10-vgg11-reg"])
    for name in ("rectangular", "sigmoid", "superspike"):
        neuron = base.neuron.model_copy(update={"surrogate": name})
        assert load_recipe(BUILT_IN[f"cifar10-vgg11-{name}-reg"]) == base.model_copy(update={"neuron": neuron})
    tiny = load_recipe(BUILT_IN["tiny-imagenet-vgg16-direct-reg"])
    for name in ("poisson", "rsc"):
        encoding = tiny.encoding.model_copy(update={"name": name})
        assert load_recipe(BUILT_IN[f"tiny-imagenet-vgg16-{name}-reg"]) == tiny.model_copy(
            update={"encoding": encoding}
        )
    for name in ("cifar100-vgg11-reg", "cifar10-wrn16-4-reg", "cifar100-wrn16-4-reg", "tiny-imagenet-vgg16-direct-reg"):
        recipe = load_recipe(BUILT_IN[name])
        assert (recipe.training, recipe.attack, recipe.encoding) == (base.training, base.attack, base.encoding)
    quarter = load_recipe(BUILT_IN["cifar10-vgg11-quarter-reg"])
    for estimator in ("theorem", "empirical"):
        recipe = load_recipe(BUILT_IN[f"cifar10-vgg11-quarter-mpdsgr-{estimator}"])
        assert recipe.defence["mpd-sgr"]["estimator"] == estimator
        assert recipe.model_copy(update={"defence": {}}) == quarter


def test_the_base_is_the_setting_of_the_published_figures() -> None:
    base = load_recipe(BUILT_IN["cifar10-vgg11-reg"])
    training, attack = base.training, base.attack
    assert (training.lr, training.momentum, training.weight_decay) == (0.1, 0.9, 5e-4)
    assert (training.epochs, training.batch_size, base.encoding.T, base.data.augment) == (300, 64, 8, "crop-flip")
    assert (attack.eps, attack.steps, attack.step) == (8 / 255, 7, 0.01)


def test_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'digits-reg'"):
        find_recipe("digits-rag")
    with pytest.raises(InputError, match="does not exist"):
        find_recipe(str(tmp_path / "no.toml"))
