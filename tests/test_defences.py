import pytest
import torch
from conftest import small_recipe

from mpdsgr_deploy.defences import DEFENCES, build_defended, make_defences, resolved
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe

SHAPE = (1, 8, 8)


def test_a_defence_is_known_by_name_and_its_settings_are_checked() -> None:
    for defence, expected in (
        ({"atx": {}}, "unknown defence 'atx'"),
        ({"at": {"epss": 0.1}}, r"\[defence.at\]: unknown key 'epss'; allowed here: eps, steps, step"),
        ({"at": {"eps": "2"}}, r"\[defence.at\]: eps: .*less than or equal to 1"),
        ({"mpd-sgr": {"estimator": "exact"}}, "unknown estimator 'exact'"),
        ({"mpd-sgr": {}, "dlif": {}}, r"dlif changes them; set defence.mpd-sgr.estimator = 'empirical'"),
    ):
        with pytest.raises(InputError, match=expected):
            make_defences(small_recipe(defence=defence))


def test_a_resolved_recipe_holds_every_default() -> None:
    recipe = resolved(small_recipe(defence={"at": {"eps": "4/255"}, "mpd-sgr": {}}))
    assert recipe.defence["at"] == {"eps": 4 / 255, "steps": 2, "step": 1 / 255}
    assert recipe.defence["mpd-sgr"]["estimator"] == "theorem"
    assert recipe.method == "AT + MPD-SGR"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert set(DEFENCES) >= {"at", "mpd-sgr"}


def test_adversarial_examples_are_made_in_eval_mode_and_leave_the_model_as_it_was() -> None:
    recipe = small_recipe(defence={"at": {"eps": 0.05, "steps": 2, "step": 0.03}})
    model, (defence,) = build_defended(recipe, SHAPE, 3)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.rand(8, *SHAPE), torch.arange(8) % 3
    made = [defence.examples(model, x, y, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*made)
    assert 0 < (made[0] - x).abs().max() <= 0.05 + 1e-6
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("encoding", ["direct", "poisson", "rsc", "frequency"])
@pytest.mark.parametrize("defence", ["feel", "dlif", "stog"])
def test_recipes_are_checked_without_memory_for_their_weights(defence: str, encoding: str) -> None:
    recipe = small_recipe(defence={defence: {}}, encoding={"name": "frequency" if defence == "feel" else encoding})
    with torch.device("meta"):
        model, _ = build_defended(recipe, SHAPE, 10)
    assert all(p.is_meta for p in model.parameters())
