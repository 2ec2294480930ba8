"""A config says what is wrong with it, and where."""

import sys

import numpy as np
import pytest
import yaml

from popmtl.config import Config, load_config
from popmtl.distributed.plan import make_plan
from popmtl.errors import RequestError

MINIMAL = "problem: vlmop2\npopulation: {subproblems: 4}\n"
MACHINE = [{"CPU": 2.0, "GPU": 0.0}]


@pytest.fixture
def load(tmp_path):
    """Loads a text with overrides."""

    def load(text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture
def complaints(load):
    """The lines that a text with overrides is refused with, one for each mistake."""

    def complaints(text, *overrides):
        with pytest.raises(RequestError) as refused:
            load(text, *overrides)
        first, *lines = str(refused.value).splitlines()
        assert first.endswith("config.yaml:")
        return [line.strip() for line in lines]

    return complaints


def test_a_problem_and_a_number_of_subproblems_are_enough(load):
    config = load(MINIMAL)
    assert (config.problem.name, config.problem.parameters) == ("vlmop2", {})
    assert config.population.subproblems == 4
    assert len(make_plan(config, MACHINE).W) == 4


def test_all_other_keys_of_the_problem_are_its_parameters(load):
    config = load("problem: {name: vlmop2, variables: 3}\npopulation: {subproblems: 4}")
    assert config.problem.parameters == {"variables": 3}
    assert make_plan(config, MACHINE).parameters == 3


@pytest.mark.parametrize(
    ("mistake", "key", "says"),
    [
        ("trian: {steps: 3}", "trian", "unknown key: did you mean train?"),
        ("train: {step: 3}", "train.step", "unknown key: did you mean steps?"),
        ("train: {stop: {}}", "train.stop", "give patience, max_hours, or both; leave stop out to take every step"),
        ("train: {stop: {max_hours: 1, min_improvement: 0.1}}", "train.stop", "min_improvement needs patience"),
        ("train: {stop: {patience: 0}}", "train.stop.patience", "greater than or equal to 1"),
        ("train: {stop: {max_hours: .inf}}", "train.stop.max_hours", "finite number"),
        ("transfer: {strenght: 0.5}", "transfer.strenght", "unknown key: did you mean strength?"),
        ("scalarization: {mju: 0.5}", "scalarization.mju", "unknown key: did you mean mu?"),
        ("fine_tune: {varient: ub}", "fine_tune.varient", "unknown key: did you mean variant?"),
        ("front: {reference: [1, 1]}", "front.reference", "unknown key: did you mean reference_point?"),
        ("resources: {max_actor: 1}", "resources.max_actor", "unknown key: did you mean max_actors?"),
        ("tracking: {url: x}", "tracking.url", "unknown key: did you mean uri?"),
        ("quux: 3", "quux", "unknown key"),
        ("train: {steps: many}", "train.steps", "valid integer"),
        ("train: {steps: 1.5}", "train.steps", "not 1.5"),
        ("train: {steps: -1}", "train.steps", "greater than or equal to 0, not -1"),
        ("train: {evaluate_every: 0}", "train.evaluate_every", "greater than or equal to 1, not 0"),
        ("train: {dtype: float16}", "train.dtype", "'float32' or 'float64', not 'float16'"),
        ("train: 100", "train", "not 100"),
        ("train: {optimizer: {name: Adamm}}", "train.optimizer", "did you mean Adam?"),
        ("train: {optimizer: {name: LBFGS}}", "train.optimizer", "'LBFGS'"),
        ("train: {optimizer: {name: Adam, lrr: 0.1}}", "train.optimizer", "'lrr'"),
        ("train: {optimizer: {name: Adam, lr: -1.0}}", "train.optimizer", "learning rate: -1.0"),
        ("fine_tune: {optimizer: {name: Adam, lrr: 0.1}}", "fine_tune.optimizer", "'lrr'"),
        ("train: {gradient: {name: MGDAA}}", "train.gradient", "there are aligned_mtl, AlignedMTL, CAGrad"),
        ("train: {gradient: {name: CAGrad}}", "train.gradient", "'c'"),
        ("train: {gradient: {name: aligned_mtl, scale: max}}", "train.gradient", "min, median, rmse"),
        ("train: {execution: stacked, gradient: {name: MGDA}}", "train", "train.gradient"),
        ("train: {lr_schedule: {name: CosineAnealingLR}}", "train.lr_schedule", "did you mean CosineAnnealingLR?"),
        ("train: {lr_schedule: {name: CosineAnnealingLR, T_mx: 9}}", "train.lr_schedule", "'T_mx'"),
        ("scalarization: {name: tchebychef}", "scalarization.name", "'tchebycheff'"),
        ("scalarization: {mu: 0}", "scalarization.mu", "greater than 0, not 0"),
        ("scalarization: {ideal_point: [0, low]}", "scalarization.ideal_point.1", "not 'low'"),
        ("transfer: {strength: -0.1}", "transfer.strength", "greater than or equal to 0, not -0.1"),
        ("transfer: {strength: 1.5}", "transfer.strength", "less than or equal to 1, not 1.5"),
        ("transfer: {kernel: gausian}", "transfer.kernel", "'gaussian'"),
        ("transfer: {schedule: quadratic}", "transfer.schedule", "'cosine'"),
        ("transfer: {order: combine}", "transfer.order", "'consensus' or 'adapt_then_combine', not 'combine'"),
        ("transfer: {transport: pigeon}", "transfer.transport", "'coordinator', not 'pigeon'"),
        ("transfer: {mix_moments: true}", "transfer", "mix_moments needs order: adapt_then_combine"),
        ("transfer: {wire_dtype: float16}", "transfer.wire_dtype", "'bfloat16', not 'float16'"),
        ("train: {precision: bf16, dtype: float64}", "train", "precision bf16 needs dtype: float32"),
        ("train: {precision: fp16}", "train.precision", "'full' or 'bf16', not 'fp16'"),
        ("train: {execution: vmap}", "train.execution", "'loop' or 'stacked', not 'vmap'"),
        ("transfer: {schedule: geometric}", "transfer", "never reaches 0"),
        ("fine_tune: {scale: max}", "fine_tune.scale", "'min', 'median' or 'rmse', not 'max'"),
        ("front: {reference_point: 3}", "front.reference_point", "valid list, not 3"),
        ("resources: {max_actors: 0}", "resources.max_actors", "greater than or equal to 1, not 0"),
        ("tracking: {models: some}", "tracking.models", "'front', 'all' or 'none', not 'some'"),
        ("seed: -1", "seed", "greater than or equal to 0, not -1"),
        ("seed: true", "seed", "valid integer, not True"),
        ("seed: '7'", "seed", "valid integer, not '7'"),
        ("seed: .nan", "seed", "finite number"),
        ("seed: 1" + "0" * 30, "seed", "less than or equal to 9223372036854775807"),
        ("scalarization: {mu: .inf}", "scalarization.mu", "finite number, not inf"),
        ("scalarization: {rho: true}", "scalarization.rho", "valid number, not True"),
        ("scalarization: {ideal_point: [.nan, 0]}", "scalarization.ideal_point.0", "finite number, not nan"),
        ("front: {reference_point: [true, 1]}", "front.reference_point.0", "valid number, not True"),
        ("transfer: {width: .nan}", "transfer.width", "not nan"),
        ("train: {clip: {norm: .inf}}", "train.clip.norm", "finite number, not inf"),
        ("train: {clip: {value: true}}", "train.clip.value", "valid number, not True"),
        ("train: {accumulate: 1000000}", "train.accumulate", "less than or equal to 10000, not 1000000"),
        ("checkpoint: {keep: 1" + "0" * 30 + "}", "checkpoint.keep", "less than or equal to 1000000000000"),
        ("resources: {chunk_timeout: .inf}", "resources.chunk_timeout", "finite number"),
        ("resources: {gpus_per_actor: 1e-9}", "resources", "gpus_per_actor 1e-09 is less than Ray divides a GPU into"),
        ("train: {optimizer: {name: SGD, lr: .nan}}", "train.optimizer", "lr: must be finite, not nan"),
        ("train: {optimizer: {name: SGD, lr: true}}", "train.optimizer", "lr: must be a number, not true"),
        ("train: {optimizer: {name: Adam, betas: [0.9, .inf]}}", "train.optimizer", "betas: must be finite, not inf"),
        (
            "train: {optimizer: {name: Adam, betas: [true, 0.9]}}",
            "train.optimizer",
            "betas: must be a number, not true",
        ),
        ("train: {optimizer: {name: Adam, betas: []}}", "train.optimizer", "cannot train a row with these arguments"),
        (
            "train: {optimizer: {groups: [{match: x, lr: .nan}]}}",
            "train.optimizer",
            "groups: match 'x': lr: must be finite, not nan",
        ),
        (
            "train: {lr_schedule: {name: StepLR, step_size: true}}",
            "train.lr_schedule",
            "step_size: must be a number, not true",
        ),
        (
            "train: {lr_schedule: {name: StepLR, step_size: 1, gamma: .nan}}",
            "train.lr_schedule",
            "gamma: must be finite",
        ),
        (
            "train: {lr_schedule: {name: MultiStepLR, milestones: [1, .inf]}}",
            "train.lr_schedule",
            "must be finite, not inf",
        ),
        ("train: {gradient: {name: aligned_mtl, scale: true}}", "train.gradient", "scale: must be a finite number"),
        ("'[x': 1", "[x", "unknown key"),
        ("storage: ''", "storage", "at least 1 character"),
        ("storage: 3", "storage", "valid string, not 3"),
    ],
)
def test_a_mistake_is_named_by_its_key(complaints, mistake, key, says):
    (line,) = complaints(MINIMAL + mistake)
    assert line.startswith(f"{key}: ")
    assert says in line


@pytest.mark.parametrize(
    ("population", "says"),
    [
        ("{}", "population: subproblems is missing"),
        ("{subproblems: 0}", "population.subproblems: input should be greater than or equal to 1, not 0"),
        ("{subproblems: 4, wheights: energy}", "population.wheights: unknown key: did you mean weights?"),
        ("{subproblems: 4, min_weight: 0.5}", "population.min_weight: input should be less than 0.5, not 0.5"),
        ("{subproblems: 3, weights: [[0.5, 0.5]]}", "population: subproblems is 3, but 1 weight vectors are listed"),
    ],
)
def test_a_mistaken_population_is_named_by_its_key(complaints, population, says):
    (line,) = complaints(f"problem: vlmop2\npopulation: {population}")
    assert line.startswith(says)


def test_what_must_be_there_is_asked_for(complaints):
    assert complaints("seed: 1") == ["problem: missing", "population: missing"]
    assert complaints("problem: {variables: 3}\npopulation: {subproblems: 4}") == ["problem.name: missing"]


def test_all_mistakes_are_listed_at_once(complaints):
    lines = complaints(MINIMAL + "trian: 1\ntrain: {steps: -1, dtype: half}\ntransfer: {strength: 2}", "seed=x")
    assert {line.split(": ")[0] for line in lines} == {
        "trian",
        "train.steps",
        "train.dtype",
        "transfer.strength",
        "seed",
    }


@pytest.mark.parametrize(
    ("population", "says"),
    [
        ("{weights: [[0.5, 0.5], [0.5, 0.4]]}", r"^population.*: weight vector 1 is \[0.5, 0.4\] and sums to 0.9"),
        ("{weights: [[0.5, 0.3, 0.2]]}", r"^population.*: weight vector 0 has 3 entries; .* 2 objectives"),
        ("{weights: [[1.5, -0.5]]}", r"^population.*: weight vector 0 .* not negative"),
        ("{weights: []}", r"^population.*: no weight vectors"),
    ],
)
def test_weights_that_the_problem_cannot_take_name_the_population(load, population, says):
    config = load(f"problem: vlmop2\npopulation: {population}")
    with pytest.raises(RequestError, match=says):
        make_plan(config, MACHINE)


def test_points_of_a_wrong_length_are_named_by_their_key(load):
    for key in ("front.reference_point", "scalarization.ideal_point"):
        with pytest.raises(RequestError, match=rf"^{key}: \[1.0, 1.0, 1.0\] must be 2 finite numbers"):
            make_plan(load(MINIMAL, f"{key}=[1, 1, 1]"), MACHINE)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E3", 1e3), ("-2e+1", -20.0), ("2.5e-4", 2.5e-4)])
def test_a_number_with_an_exponent_is_a_number(load, text, value):
    # A parameter of the problem, which nothing else would turn from a word into a number.
    assert load(MINIMAL, f"problem.variables={text}").problem.parameters == {"variables": value}


def test_gradient_methods_of_torchjd_say_how_to_get_it(load, complaints, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    (complaint,) = complaints(MINIMAL + "train: {gradient: {name: MGDA}}")
    assert "train.gradient" in complaint
    assert "pip install 'popmtl[rivals]'" in complaint
    assert load(MINIMAL + "train: {gradient: {name: aligned_mtl}}").train.gradient.name == "aligned_mtl"


def test_a_learning_rate_with_an_exponent_reaches_the_optimizer(load):
    optimizer = load(MINIMAL, "train.optimizer.lr=1e-3").train.optimizer.build()
    assert optimizer.keywords == {"lr": 1e-3}


def test_a_word_that_starts_like_a_number_stays_a_word(load):
    assert load(MINIMAL, "storage=1e-3x").storage == "1e-3x"


@pytest.mark.parametrize("nothing", ["none", "null"])
def test_transfer_none_moves_nothing(load, nothing):
    plan = make_plan(load(MINIMAL + f"transfer: {nothing}"), MACHINE)
    assert not plan.transfers
    assert np.array_equal(plan.M, np.eye(4))


def test_the_word_steps_becomes_the_steps_of_each_stage(load):
    schedule = "{name: CosineAnnealingLR, T_max: steps}"
    text = MINIMAL + f"train: {{steps: 70, lr_schedule: {schedule}}}\nfine_tune: {{steps: 9, lr_schedule: {schedule}}}"
    plan = make_plan(load(text), MACHINE)
    assert plan.recipe.lr_schedule.keywords == {"T_max": 70}
    assert plan.aligned.lr_schedule.keywords == {"T_max": 9}


def test_overrides_change_keys_and_make_missing_ones(load):
    overrides = ("train.steps=7", "problem.variables=3", "transfer.strength=0.25", "population.weights=energy")
    config = load(MINIMAL + "train: {steps: 1000, evaluate_every: 20}", *overrides)
    assert (config.train.steps, config.train.evaluate_every) == (7, 20)
    assert (config.problem.name, config.problem.parameters) == ("vlmop2", {"variables": 3})
    assert (config.transfer.strength, config.population.weights) == (0.25, "energy")
    assert load(MINIMAL, "transfer=none").transfer.strength == 0


def test_flags_of_optimizers_and_schedules_are_true_or_false(load):
    load(MINIMAL + "train: {optimizer: {name: Adam, amsgrad: true, foreach: false, capturable: false}}")
    load(MINIMAL + "train: {optimizer: {name: SGD, lr: 1, momentum: 0.9, nesterov: true}}")
    load(MINIMAL + "train: {steps: 9, lr_schedule: {name: OneCycleLR, max_lr: 1, total_steps: 9, three_phase: true}}")


def test_a_schedule_that_ends_after_more_steps_than_are_tried_is_refused(complaints):
    (line,) = complaints(
        MINIMAL + "train: {steps: 300000, lr_schedule: {name: OneCycleLR, max_lr: 1, total_steps: 200000}}"
    )
    assert "OneCycleLR ends after 200000 steps" in line


def test_iterations_without_end_are_refused(complaints):
    (line,) = complaints(MINIMAL + "train: {gradient: {name: MGDA, epsilon: 0, max_iters: 1000000000}}")
    assert "max_iters: 1000000000 is beyond reason" in line


def test_a_message_is_short_however_much_is_wrong(load):
    with pytest.raises(RequestError) as refused:
        load(MINIMAL + "".join(f"{'x' * 900}{i}: {i}\n" for i in range(300)))
    assert len(str(refused.value)) < 10_000
    assert "and 280 more" in str(refused.value)


def test_what_yaml_surprises_with_is_refused_in_files_and_overrides(load):
    for value in ("0100", "10:00", "1_000", "0x64"):
        with pytest.raises(RequestError, match=f"config.yaml: line 3: {value} "):
            load(f"{MINIMAL}train: {{steps: {value}}}")
        with pytest.raises(RequestError, match=f"override 'train.steps={value}': the value line 1: {value} "):
            load(MINIMAL, f"train.steps={value}")
    with pytest.raises(RequestError, match="line 4: the key 'seed' stands there twice"):
        load(MINIMAL + "seed: 1\nseed: 2")


def test_the_last_override_of_a_key_counts(load):
    assert load(MINIMAL, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "override 'train.steps': write key.path=value"),
        ("=3", "override '=3': write key.path=value"),
        ("train.steps=[", r"override 'train.steps=\[': the value is not YAML"),
        ("..=1", "override '..=1': write key.path=value, with words between the dots"),
        (".".join("a" * 9999) + "=1", "write key.path=value, with words"),
        ("problem.\udc80=1", "write key.path=value, with words"),
        ("seed=\udc80", r"override 'seed=.udc80': the value is not UTF-8 text"),
        ("population.weights.0=1", "override 'population.weights.0=1': population.weights holds a value"),
        ("storage.x=1", "override 'storage.x=1': storage holds a value, not keys"),
        ("train.stpes=4", "  train.stpes: unknown key: did you mean steps?"),
        ("train.steps=", "  train.steps: .*integer"),
        ("transfer.strength=none", "  transfer.strength: .*number"),
    ],
)
def test_a_mistaken_override_is_refused(load, override, says):
    with pytest.raises(RequestError, match=says):
        load(MINIMAL + "storage: here", "population.weights=energy", override)


@pytest.mark.parametrize(
    ("text", "says"),
    [("train: [1", "is not YAML"), ("- train\n- transfer", "found list"), ("", "found NoneType"), ("7", "found int")],
)
def test_a_file_that_holds_no_keys_is_refused(load, text, says):
    with pytest.raises(RequestError, match=rf"config .*config\.yaml.*{says}"):
        load(text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(RequestError, match="is a folder, and must be a file"):
        load_config(tmp_path)


def test_a_resolved_config_makes_the_same_config_again(load):
    config = load(
        "problem: {name: vlmop2, variables: 3}\n"
        "population: {weights: [[0.25, 0.75], [1.0, 0.0]]}\n"
        "train: {optimizer: {name: SGD, lr: 1e-3, momentum: 0.9}, lr_schedule: {name: StepLR, step_size: 2}}\n"
        "transfer: none\n"
        "front: {reference_point: [2, 3]}\n"
    )
    resolved = config.resolved()
    assert Config.model_validate(resolved) == config
    assert resolved["train"]["optimizer"] == {"name": "SGD", "lr": 1e-3, "momentum": 0.9}
    text = yaml.safe_dump(resolved)
    assert load(text) == config
    assert Config.model_validate(yaml.safe_load(text)) == config


def test_a_schedule_may_have_a_rate_for_each_group(load):
    lists = "lr_schedule: {name: OneCycleLR, max_lr: [0.1, 0.2], total_steps: 30}"
    load(
        "problem: {name: vlmop2}\n"
        "population: {weights: [[0.25, 0.75], [1.0, 0.0]]}\n"
        f"train: {{steps: 30, optimizer: {{name: Adam, lr: 0.1, groups: [{{match: x, lr: 0.2}}]}}, {lists}}}\n"
    )
