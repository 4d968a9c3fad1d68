"""The configuration tree: unknown keys, files and overrides, and that what is dumped is what is parsed."""

import json
import tomllib
from pathlib import Path

import pytest
from factories import config_tree, fault, put
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config import (
    Config,
    FileTask,
    ReasoningGymTask,
    SftConfig,
    TeacherConfig,
    dump_config,
    load_config,
    nearest,
    parse_config,
)
from opd.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))


def recipe_file(folder: Path, text: str | None = None) -> Path:
    path = folder / "recipe.toml"
    path.write_text(
        text
        if text is not None
        else 'student = "s"\noutput = "o"\n[teachers.even]\nmodel = "m"\n'
        '[tasks.words]\ntype = "file"\npath = "w.jsonl"\nteacher = "even"\n',
        encoding="utf-8",
    )
    return path


# --- recipes and round trips ---


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_parses_and_survives_a_dump(path):
    kind = Config if "teachers" in tomllib.loads(path.read_text(encoding="utf-8")) else SftConfig
    config = load_config(path, kind=kind)
    assert parse_config(json.loads(dump_config(config)), kind=kind) == config


def test_a_dump_holds_every_value_that_differs_from_its_default():
    config = parse_config(
        config_tree(
            seed=7,
            steps=50,
            trainable="full",
            temperature=0.8,
            lora={"rank": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj"]},
            sampling={"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 9, "max_rows": 5},
            objective={"type": "to_go", "discount": 0.5, "loss": "ppo", "epochs": 2, "clip_low": 0.1, "clip_high": 0.3}
            | {"normalizer": "constant", "constant": 12.0, "teacher_logprob_floor": -20.0},
            reward={"coef": 0.25, "baseline": "grpo"},
            optimizer={"lr": 3e-5, "betas": [0.8, 0.99], "schedule": "linear", "final_lr_fraction": 0.1},
            compute={"device": "cpu", "dtype": "float32", "max_tokens": 99, "threads": 1},
            checkpoint={"every": 3, "keep": 1},
            evaluation={"num_prompts": 0, "before_prompts": 0},
            logging={"writers": ["trackio"], "samples_every": 0},
        )
    )
    plain = json.loads(dump_config(config))
    assert plain["optimizer"]["betas"] == [0.8, 0.99]
    assert plain["objective"]["constant"] == 12.0
    assert plain["tasks"]["sums"]["dataset"] == "basic_arithmetic"
    assert parse_config(plain) == config


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**40),
    lr=st.floats(1e-9, 10),
    temperature=st.floats(0.01, 10),
    discount=st.floats(0, 1),
    weight=st.floats(1e-3, 1e3),
    params=st.dictionaries(st.text(min_size=1), st.integers() | st.booleans() | st.text() | st.floats(-9, 9)),
    names=st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True),
)
def test_parsing_a_dump_gives_the_same_configuration(seed, lr, temperature, discount, weight, params, names):
    task = {"type": "reasoning_gym", "dataset": "d", "teacher": names[0], "weight": weight, "params": params}
    config = parse_config(
        config_tree(
            seed=seed,
            temperature=temperature,
            optimizer={"lr": lr},
            objective={"type": "to_go", "discount": discount},
            teachers={name: {"model": name} for name in names},
            tasks=dict.fromkeys(names, task),
        )
    )
    assert parse_config(json.loads(dump_config(config))) == config


def test_a_task_is_of_the_type_that_it_names():
    config = parse_config(config_tree())
    assert isinstance(config.tasks["words"], FileTask)
    assert isinstance(config.tasks["sums"], ReasoningGymTask)
    assert isinstance(config.teachers["odd"], TeacherConfig)


def test_a_configuration_cannot_be_changed():
    config = parse_config(config_tree())
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 3.0


# --- unknown keys ---


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("step", "steps"),
        ("temprature", "temperature"),
        ("lora.rnk", "rank"),
        ("sampling.group_sise", "group_size"),
        ("objective.discont", "discount"),
        ("reward.coeff", "coef"),
        ("optimizer.warm_up_steps", "warmup_steps"),
        ("compute.max_token", "max_tokens"),
        ("checkpoint.evry", "every"),
        ("evaluation.num_prompt", "num_prompts"),
        ("logging.writer", "writers"),
        ("teachers.even.modle", "model"),
        ("tasks.words.held_out", "held_out_path"),
        ("tasks.words.verifer", "verifier"),
        ("tasks.sums.heldout_size", "held_out_size"),
        ("tasks.sums.data_set", "dataset"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, meant):
    assert fault(put(key, 1)).startswith(f"unknown key '{key}'; did you mean '{meant}'?")


def test_an_unknown_key_of_one_task_type_is_not_explained_by_the_other():
    assert "dataset" not in fault(put("tasks.words.datset", "x"))
    assert "did you mean 'path'" not in fault(put("tasks.sums.pth", "x"))


@pytest.mark.parametrize("name", ["file", "tasks", "reasoning_gym"])
def test_a_task_may_be_called_like_a_type(name):
    data = config_tree(tasks={name: {"type": "file", "path": "w", "verifer": "none"}})
    assert fault(data) == f"unknown key 'tasks.{name}.verifer'; did you mean 'verifier'?"


def test_an_unknown_key_that_is_near_to_nothing_gets_no_hint():
    assert fault(put("zzzzzz", 1)) == "unknown key 'zzzzzz'"


def test_an_unknown_key_comes_before_the_missing_one_that_it_was_meant_to_be():
    data = config_tree()
    data["studnt"] = data.pop("student")
    assert fault(data) == "unknown key 'studnt'; did you mean 'student'? (1 more after this one)"


def test_keys_of_training_are_unknown_to_fine_tuning():
    data = {k: v for k, v in config_tree().items() if k != "teachers"}
    assert isinstance(parse_config(data, kind=SftConfig), SftConfig)
    assert fault(data | {"batch_siz": 3}, SftConfig) == "unknown key 'batch_siz'; did you mean 'batch_size'?"
    assert fault(data | {"sampling": {}}, SftConfig).startswith("unknown key 'sampling'")


def test_a_missing_key_says_what_to_pass():
    data = config_tree()
    del data["student"]
    assert fault(data) == "key 'student' is missing; add it to the recipe or pass student=..."
    del (data := config_tree())["tasks"]["sums"]["dataset"]
    assert fault(data) == "key 'tasks.sums.dataset' is missing; add it to the recipe or pass tasks.sums.dataset=..."


def test_nearest_finds_close_words_only():
    assert nearest("evem", ["even", "odd"]) == "; did you mean 'even'?"
    assert nearest("qqqq", ["even", "odd"]) == ""


# --- files and overrides ---


def test_overrides_reach_every_depth(tmp_path):
    config = load_config(
        recipe_file(tmp_path),
        [
            "steps=12",
            "optimizer.lr=1e-5",
            "optimizer.betas=[0.5, 0.6]",
            "tasks.words.weight=2.5",
            "evaluation.before_prompts=0",
            'lora.target_modules=["q_proj"]',
            "teachers.odd.adapter=runs/a",
        ],
    )
    assert config.steps == 12
    assert config.optimizer.lr == 1e-5
    assert config.optimizer.betas == (0.5, 0.6)
    assert config.tasks["words"].weight == 2.5
    assert config.evaluation.before_prompts == 0
    assert config.lora.target_modules == ["q_proj"]
    assert config.teachers["odd"].adapter == "runs/a"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
        ("./models/a b", "./models/a b"),
        ("a=b", "a=b"),
        ('"quoted"', "quoted"),
        ("run#2", "run#2"),
        ("", ""),
    ],
)
def test_bare_words_need_no_quotes(tmp_path, text, value):
    assert load_config(recipe_file(tmp_path), [f"student={text}"]).student == value


@pytest.mark.parametrize("key", ["output", "compute.device", "lora.start", "teachers.even.model", "tasks.words.path"])
def test_a_text_that_toml_reads_as_something_else_stays_a_text(tmp_path, key):
    config = load_config(recipe_file(tmp_path), [f"{key}=2026-11-21"]).model_dump(mode="json")
    for part in key.split("."):
        config = config[part]
    assert config == "2026-11-21"


def test_dashes_in_a_key_are_underscores_and_names_keep_theirs(tmp_path):
    overrides = ["sampling.max-new-tokens=7", "teachers.even-2.served-model=m", "teachers.even-2.url=http://a:1"]
    config = load_config(recipe_file(tmp_path), [*overrides, "objective.type=immediate"])
    assert config.sampling.max_new_tokens == 7
    assert config.teachers["even-2"].served_model == "m"


def test_a_wrong_type_of_an_address_is_reported_under_the_key_of_the_recipe():
    assert fault(put("teachers.even", {"url": 3})).startswith("teachers.even.url = 3: ")


def test_the_last_override_wins(tmp_path):
    assert load_config(recipe_file(tmp_path), ["steps=10", "steps=20"]).steps == 20


def test_an_override_of_a_teachers_source_replaces_the_other_source(tmp_path):
    config = load_config(recipe_file(tmp_path), ["teachers.even.adapter=runs/a"])
    assert config.teachers["even"].model is None
    assert config.teachers["even"].adapter == "runs/a"
    back = load_config(recipe_file(tmp_path), ["teachers.even.adapter=runs/a", "teachers.even.model=m2"])
    assert back.teachers["even"].model == "m2"
    assert back.teachers["even"].adapter is None


@pytest.mark.parametrize("override", ["steps", "=3", " =3", ""])
def test_an_override_that_is_no_pair_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match=r"is not of the form key=value, such as optimizer\.lr=1e-5"):
        load_config(recipe_file(tmp_path), [override])


def test_an_override_below_a_value_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"override 'student\.x=1': 'student' is a value in the recipe, not a table"):
        load_config(recipe_file(tmp_path), ["student.x=1"])


def test_an_override_of_an_unknown_key_names_the_file_and_the_nearest_key(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe_file(tmp_path), ["optimizer.lrr=1"])
    assert str(caught.value) == f"{tmp_path / 'recipe.toml'}: unknown key 'optimizer.lrr'; did you mean 'lr'?"


def test_an_override_out_of_range_is_refused(tmp_path):
    for override in ("steps=-1", "optimizer.lr=inf", "optimizer.lr=nan", "steps=many"):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            load_config(recipe_file(tmp_path), [override])


def test_a_missing_recipe_says_where_recipes_are(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml' does not exist; recipes/ holds the ones that come with opd"):
        load_config(tmp_path / "nowhere.toml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder; name a \.toml file"):
        load_config(tmp_path)


def test_a_recipe_that_is_not_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe\.toml' is not valid TOML: .*line 2"):
        load_config(recipe_file(tmp_path, 'student = "s"\nsteps = = 3\n'))


def test_a_recipe_that_is_not_utf8_is_named(tmp_path):
    path = recipe_file(tmp_path)
    path.write_bytes(b'student = "\xff"\n')
    with pytest.raises(ConfigError, match=r"recipe\.toml' is not valid TOML"):
        load_config(path)
