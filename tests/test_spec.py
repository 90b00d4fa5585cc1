"""Which settings make a trial or an evaluation another one, and which values a setting takes."""

import pytest
from pydantic import ValidationError

from sweep.spec import (
    BaseModelSpec,
    BenchmarkSpec,
    DatasetSpec,
    EvalSpec,
    ExecutionSpec,
    LoraSpec,
    PlannedMeasure,
    TrainSpec,
    TrialSpec,
)

OTHER = {
    "method": "lora",
    "trained_layers": "0-1",
    "num_examples": 7,
    "held_out_examples": 9,
    "template": "{prompt} {completion}",
    "max_length": 77,
    "overlong": "drop",
    "learning_rate": 3e-4,
    "lr_schedule": "constant",
    "warmup_steps": 5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "global_batch_size": 24,
    "epochs": 11,
    "precision": "bf16",
    "seed": 1,
    "data_seed": 2,
    "train_seed": 3,
}
"""A value for every setting of `train` that is not its default."""

OTHER_LORA = {
    "rank": 4,
    "alpha": 5.0,
    "dropout": 0.1,
    "rslora": True,
    "dora": True,
    "target_modules": ("q_proj",),
}

ONLY_ONE_VALUE = {"optimizer"}


def trial(train: TrainSpec | None = None, **changes) -> TrialSpec:
    settings = {
        "base_model": BaseModelSpec(path="models/a"),
        "base_digest": "base",
        "datasets": {"d": DatasetSpec(path="d.jsonl")},
        "data_digests": {"d": "data"},
        "train": train or TrainSpec(),
    }
    return TrialSpec(**settings | changes)


def evaluation(benchmark: BenchmarkSpec | None = None, **changes) -> EvalSpec:
    settings = {
        "name": "facts",
        "benchmark": benchmark or BenchmarkSpec(path="facts.yaml"),
        "digest": "items",
        "template": "{prompt} {completion}",
        "backend": "lm_eval 0",
    }
    return EvalSpec(**settings | changes)


# ---------------------------------------------------------------------- what a trial id depends on


def test_every_training_setting_is_in_the_lists_of_this_file():
    assert set(OTHER) | {"lora"} | ONLY_ONE_VALUE == set(TrainSpec.model_fields)
    assert set(OTHER_LORA) == set(LoraSpec.model_fields)


@pytest.mark.parametrize("setting", OTHER)
def test_every_training_setting_changes_the_trial_id(setting):
    changed = TrainSpec(**{setting: OTHER[setting]})
    assert changed.value(setting) != TrainSpec().value(setting)
    assert trial(changed).trial_id != trial().trial_id


@pytest.mark.parametrize("setting", OTHER_LORA)
def test_adapter_settings_change_the_trial_id_under_lora_alone(setting):
    lora = LoraSpec(**{setting: OTHER_LORA[setting]})
    assert trial(TrainSpec(method="lora", lora=lora)).trial_id != trial(TrainSpec(method="lora")).trial_id
    assert trial(TrainSpec(method="full", lora=lora)).trial_id == trial(TrainSpec(method="full")).trial_id


def test_every_setting_gives_its_own_trial_id():
    ids = {trial(TrainSpec(**{name: value})).trial_id for name, value in OTHER.items()}
    assert len(ids) == len(OTHER)


def test_the_number_of_epochs_is_identity_under_cosine_alone():
    ids = {
        schedule: {trial(TrainSpec(lr_schedule=schedule, epochs=epochs)).trial_id for epochs in (3, 10)}
        for schedule in ("cosine", "constant")
    }
    assert len(ids["cosine"]) == 2
    assert len(ids["constant"]) == 1


def test_one_seed_is_the_same_as_both_seeds():
    both = trial(TrainSpec(data_seed=5, train_seed=5))
    assert trial(TrainSpec(seed=5)).trial_id == both.trial_id
    assert trial(TrainSpec(seed=5)).trial_id == trial(TrainSpec(seed=9, data_seed=5, train_seed=5)).trial_id
    assert trial(TrainSpec(seed=5, data_seed=6)).trial_id == trial(TrainSpec(data_seed=6, train_seed=5)).trial_id
    assert trial(TrainSpec(data_seed=5)).trial_id != trial(TrainSpec(train_seed=5)).trial_id


@pytest.mark.parametrize(
    "changes",
    [
        {"base_digest": "other"},
        {"base_model": BaseModelSpec(path="models/a", dtype="bfloat16")},
        {"data_digests": {"d": "other"}},
        {"datasets": {"d": DatasetSpec(path="d.jsonl", format="instruction")}},
        {"datasets": {"d": DatasetSpec(path="d.jsonl", columns={"prompt": "text"})}},
        {"datasets": {"d": DatasetSpec(path="d.jsonl", split="test")}},
        {"datasets": {"d": DatasetSpec(path="d.jsonl", subset="python")}},
        {"weights": {"d": 1.0}},
        {"recipe_version": 999},
    ],
    ids=str,
)
def test_other_content_is_another_trial(changes):
    assert trial(**changes).trial_id != trial().trial_id


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": BaseModelSpec(path="elsewhere/b")},
        {"base_model": BaseModelSpec(hub="org/a", revision="v2")},
        {"base_model": BaseModelSpec(path="models/a", trust_remote_code=True)},
        {"datasets": {"d": DatasetSpec(path="elsewhere/e.jsonl", kind="maths")}},
        {"datasets": {"renamed": DatasetSpec(path="d.jsonl")}, "data_digests": {"renamed": "data"}},
    ],
    ids=str,
)
def test_names_and_places_do_not_change_the_trial_id(changes):
    assert trial(**changes).trial_id == trial().trial_id


def test_the_order_of_a_mixture_does_not_matter_and_its_weights_do():
    def mixture(names: tuple[str, ...], weights: dict[str, float]) -> str:
        datasets = {name: DatasetSpec(path=f"{name}.jsonl") for name in names}
        return trial(datasets=datasets, data_digests={n: f"of {n}" for n in names}, weights=weights).trial_id

    assert mixture(("a", "b"), {"a": 1.0, "b": 3.0}) == mixture(("b", "a"), {"b": 3.0, "a": 1.0})
    assert mixture(("a", "b"), {"a": 1.0, "b": 3.0}) != mixture(("a", "b"), {"a": 3.0, "b": 1.0})


def test_a_baseline_is_its_base_model_alone():
    baseline = TrialSpec(base_model=BaseModelSpec(path="models/a"), base_digest="base")
    assert baseline.is_baseline and not trial().is_baseline
    newer = TrialSpec(base_model=BaseModelSpec(path="models/a"), base_digest="base", recipe_version=999)
    assert newer.trial_id == baseline.trial_id


def test_a_trial_read_back_has_the_id_it_was_written_with():
    older = trial(recipe_version=-1)
    assert TrialSpec.model_validate_json(older.model_dump_json()).trial_id == older.trial_id


def test_a_changed_copy_has_its_own_id():
    first, second = trial(), evaluation()
    assert first.model_copy(update={"base_digest": "other"}).trial_id == trial(base_digest="other").trial_id
    assert (first.trial_id, second.eval_id) == (
        trial().trial_id,
        evaluation().eval_id,
    )  # remembered from here on
    assert first.model_copy(update={"base_digest": "other"}).trial_id == trial(base_digest="other").trial_id
    assert second.model_copy(update={"digest": "other"}).eval_id == evaluation(digest="other").eval_id
    assert first.model_copy() == first


# ---------------------------------------------------------------------- what an eval id depends on


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "other"},
        {"template": "{prompt}\n{completion}"},
        {"template": None},
        {"dtype": "bfloat16"},
        {"backend": "lm_eval 1"},
        {"benchmark": BenchmarkSpec(path="facts.yaml", num_fewshot=3)},
        {"benchmark": BenchmarkSpec(path="facts.yaml", fewshot_seed=3)},
        {"benchmark": BenchmarkSpec(path="facts.yaml", limit=3)},
        {"benchmark": BenchmarkSpec(path="facts.yaml", metric="acc")},
        {"benchmark": BenchmarkSpec(path="facts.yaml", max_new_tokens=3)},
        {"benchmark": BenchmarkSpec(path="facts.yaml", apply_template=False)},
        {"benchmark": BenchmarkSpec(task="facts")},
    ],
    ids=str,
)
def test_everything_that_shapes_a_score_changes_the_eval_id(changes):
    assert evaluation(**changes).eval_id != evaluation().eval_id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "renamed"},
        {"benchmark": BenchmarkSpec(path="elsewhere/facts.yaml")},
        {"benchmark": BenchmarkSpec(path="facts.yaml", kind="maths", chance=0.25)},
    ],
    ids=str,
)
def test_names_places_and_labels_keep_the_eval_id(changes):
    assert evaluation(**changes).eval_id == evaluation().eval_id


def test_the_template_does_not_matter_where_it_is_not_applied():
    bare = BenchmarkSpec(path="facts.yaml", apply_template=False)
    assert evaluation(bare, template=None).eval_id == evaluation(bare, template="{prompt}{completion}").eval_id


# ---------------------------------------------------------------------- what a measure's key depends on


def measure(pair: TrialSpec | None = None, **changes) -> PlannedMeasure:
    settings = {
        "base_model": "a",
        "dataset": "d",
        "dataset_kind": None,
        "pair": pair or trial(),
        "max_examples": 10,
        "version": 1,
        "execution": ExecutionSpec(),
    }
    return PlannedMeasure(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"base_model": "renamed", "dataset": "renamed", "dataset_kind": "code"}, True),
        ({"execution": ExecutionSpec(eval_batch_size=3)}, True),
        ({"pair": trial(TrainSpec(learning_rate=0.5, epochs=9))}, True),
        ({"pair": trial(TrainSpec(max_length=9))}, False),
        ({"pair": trial(TrainSpec(template=None))}, False),
        ({"pair": trial(base_digest="other")}, False),
        ({"pair": trial(data_digests={"d": "other"})}, False),
        ({"max_examples": 11}, False),
        ({"version": 2}, False),
    ],
    ids=str,
)
def test_a_measure_is_known_by_the_text_it_reads(changes, same):
    assert (measure(**changes).key == measure().key) == same


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TrainSpec(template="no fields"), r"template must contain \{prompt\} exactly once"),
        (lambda: TrainSpec(template="{completion} {prompt}"), r"\{prompt\} before \{completion\}"),
        (lambda: TrainSpec(template="{prompt} {completion} {completion}"), r"\{completion\} exactly once"),
        (lambda: TrainSpec(trained_layers="3-1"), "the first block is after the last"),
        (lambda: TrainSpec(trained_layers="all"), "match pattern"),
        (lambda: TrainSpec(epochs=0), "greater than or equal to 1"),
        (lambda: TrainSpec(epochs=True), "valid integer"),
        (lambda: TrainSpec(epochs=2.5), "valid integer"),
        (lambda: TrainSpec(epochs="3"), "valid integer"),
        (lambda: TrainSpec(learning_rate=float("inf")), "finite number"),
        (lambda: TrainSpec(learning_rate=float("nan")), "finite number|greater than 0"),
        (lambda: TrainSpec(learning_rate=0), "greater than 0"),
        (lambda: TrainSpec(adam_beta1=1.0), "less than 1"),
        (lambda: TrainSpec(micro_batch_size=4), "not permitted"),
        (lambda: BaseModelSpec(), "exactly one of path, hub, tiny .given: none"),
        (lambda: BaseModelSpec(path="a", tiny="b"), "exactly one of path, hub, tiny .given: path, tiny"),
        (lambda: DatasetSpec(hub="a", mixture={"b": 1.0}), "exactly one of"),
        (lambda: DatasetSpec(mixture={"b": 0.0}), "greater than 0"),
        (lambda: BenchmarkSpec(task="a", path="b"), "exactly one of task, path, tiny"),
    ],
)
def test_a_value_that_a_setting_does_not_take_is_refused_with_its_reason(make, reason):
    with pytest.raises(ValidationError, match=reason):
        make()


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainSpec().epochs = 4


def test_replace_checks_and_types_what_it_is_given():
    replaced = TrainSpec().replace({"epochs": 2e1, "learning_rate": 1, "lora.rank": 4})
    assert (replaced.epochs, replaced.learning_rate, replaced.value("lora.rank")) == (20, 1.0, 4)
    assert isinstance(replaced.epochs, int) and isinstance(replaced.learning_rate, float)
    with pytest.raises(ValidationError, match="valid integer"):
        TrainSpec().replace({"lora.rank": "4"})


def test_layer_range_is_inclusive():
    assert TrainSpec(trained_layers="2-11").layer_range == (2, 11)
    assert TrainSpec().layer_range is None
