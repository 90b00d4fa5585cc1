"""From a sweep to its trials: axes, zips, exclusions, baselines, shared trajectories, measures."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sweep import config
from sweep.config import ConfigError
from sweep.plan import Plan, expand
from sweep.spec import Pins, SweepSpec

BASE: dict[str, Any] = {
    "name": "test",
    "base_models": {"m": {"tiny": "llama-code"}, "n": {"tiny": "qwen3-maths"}},
    "datasets": {"d": {"tiny": "code_output"}, "e": {"tiny": "arithmetic"}},
    "benchmarks": {"b": {"task": "hellaswag"}},
}


def sweep_of(**changes: Any) -> SweepSpec:
    return config.parse(yaml.safe_dump(BASE | changes, sort_keys=False), Path("sweep.yaml"))


def pins_of(sweep: SweepSpec, **digests: str) -> Pins:
    """Each source's content is its name, unless `digests` says otherwise."""

    def named(names: Any) -> dict[str, str]:
        return {name: digests.get(name, f"content of {name}") for name in names}

    plain = [name for name, dataset in sweep.datasets.items() if dataset.mixture is None]
    return Pins(
        base_models=named(sweep.base_models),
        datasets=named(plain),
        benchmarks=named(sweep.benchmarks),
        backend=digests.get("backend", "lm_eval 0"),
    )


def plan_of(digests: dict[str, str] | None = None, **changes: Any) -> Plan:
    sweep = sweep_of(**changes)
    return expand(sweep, pins_of(sweep, **digests or {}))


def trained(plan: Plan) -> list:
    return [planned for planned in plan.trials if not planned.trial.is_baseline]


def baselines(plan: Plan) -> list:
    return [planned for planned in plan.trials if planned.trial.is_baseline]


def cells(plan: Plan, *settings: str) -> list[tuple]:
    return [(p.base_model, p.dataset, *(p.trial.train.value(s) for s in settings)) for p in trained(plan)]


def ids(plan: Plan) -> list[str]:
    return [planned.trial_id for planned in plan.trials]


# ---------------------------------------------------------------------- the product


def test_without_axes_every_base_model_meets_every_dataset():
    assert cells(plan_of()) == [("m", "d"), ("m", "e"), ("n", "d"), ("n", "e")]


def test_the_order_is_row_major_the_last_axis_varies_fastest():
    axes = {"base_model": ["n", "m"], "dataset": ["d"], "learning_rate": [1e-3, 1e-4], "seed": [5, 6]}
    assert cells(plan_of(axes=axes), "learning_rate", "seed") == [
        ("n", "d", 1e-3, 5),
        ("n", "d", 1e-3, 6),
        ("n", "d", 1e-4, 5),
        ("n", "d", 1e-4, 6),
        ("m", "d", 1e-3, 5),
        ("m", "d", 1e-3, 6),
        ("m", "d", 1e-4, 5),
        ("m", "d", 1e-4, 6),
    ]


def test_zipped_axes_vary_together():
    one = {"axes": {"base_model": ["m"], "dataset": ["d"]}}
    plan = plan_of(**one, zip=[{"learning_rate": [1e-3, 1e-4], "epochs": [1, 2]}, {"lora.rank": [4, 8]}])
    assert cells(plan, "learning_rate", "epochs") == [("m", "d", 1e-3, 1), ("m", "d", 1e-4, 2)]

    lora = plan_of(**one, train={"method": "lora"}, zip=[{"lora.rank": [4, 8], "lora.alpha": [8, 16]}])
    assert cells(lora, "lora.rank", "lora.alpha") == [("m", "d", 4, 8.0), ("m", "d", 8, 16.0)]


def test_a_base_model_may_be_zipped_with_its_dataset():
    plan = plan_of(zip=[{"base_model": ["m", "n"], "dataset": ["e", "d"]}])
    assert cells(plan) == [("m", "e"), ("n", "d")]


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ([{"base_model": "m"}], [("n", "d", 1), ("n", "d", 2), ("n", "e", 1), ("n", "e", 2)]),
        ([{"base_model": "m", "seed": 1}, {"base_model": "n"}], [("m", "d", 2), ("m", "e", 2)]),
        ([{"dataset": ["d", "e"], "seed": [1, 7]}, {"dataset": "e"}], [("m", "d", 2), ("n", "d", 2)]),
        ([{"seed": 2e0}, {"base_model": "n"}], [("m", "d", 1), ("m", "e", 1)]),
        ([{"trained_layers": None, "seed": 2}, {"dataset": "d"}], [("m", "e", 1), ("n", "e", 1)]),
    ],
)
def test_excluded_cells_are_left_out(rules, left):
    assert cells(plan_of(axes={"seed": [1, 2]}, exclude=rules), "seed") == left


def test_a_setting_that_is_a_list_can_be_excluded():
    lora = {"train": {"method": "lora"}, "axes": {"lora.target_modules": [["q_proj"], ["q_proj", "v_proj"]]}}
    plan = plan_of(**lora, exclude=[{"lora.target_modules": [["q_proj"]]}])
    assert {p.trial.train.lora.target_modules for p in trained(plan)} == {("q_proj", "v_proj")}


def test_further_grids_add_their_trials_and_a_trial_two_grids_name_runs_once():
    plan = plan_of(
        axes={"base_model": ["m"], "dataset": ["d"], "seed": [1, 2]},
        also=[
            {"axes": {"base_model": ["m"], "dataset": ["d", "e"], "seed": [2]}},
            {"axes": {"base_model": ["n"]}, "exclude": [{"dataset": "d"}]},
        ],
    )
    assert cells(plan, "seed") == [("m", "d", 1), ("m", "d", 2), ("m", "e", 2), ("n", "e", 0)]


def test_settings_without_meaning_for_a_method_do_not_double_its_trials():
    plan = plan_of(axes={"base_model": ["m"], "dataset": ["d"], "method": ["full", "lora"], "lora.rank": [4, 8]})
    assert [(p.trial.train.method, p.trial.train.lora.rank) for p in trained(plan)] == [
        ("full", 4),
        ("lora", 4),
        ("lora", 8),
    ]


def test_a_mixture_is_a_dataset_of_its_own():
    datasets = BASE["datasets"] | {"mix": {"mixture": {"d": 1, "e": 3}, "kind": "mixed"}}
    (planned,) = trained(plan_of(datasets=datasets, axes={"base_model": ["m"], "dataset": ["mix"]}))
    assert planned.dataset_kind == "mixed"
    assert planned.trial.weights == {"d": 1.0, "e": 3.0}
    assert planned.trial.data_digests == {"d": "content of d", "e": "content of e"}


def test_ten_thousand_trials_are_ten_thousand_ids():
    axes = {"learning_rate": [1e-5 * (i + 1) for i in range(50)], "seed": list(range(50))}
    assert len(set(ids(plan_of(axes=axes)))) == 10_000 + 2


# ---------------------------------------------------------------------- checkpoints and shared trajectories


@pytest.mark.parametrize(("eval_epochs", "epochs"), [("last", (4,)), ("all", (1, 2, 3, 4)), ([3, 1, 3], (1, 3))])
def test_the_epochs_asked_for_are_the_checkpoints(eval_epochs, epochs):
    assert {p.epochs for p in trained(plan_of(train={"epochs": 4}, eval_epochs=eval_epochs))} == {epochs}


@pytest.mark.parametrize("lengths", [[3, 10], [10, 3]])
def test_a_constant_schedule_of_3_and_of_10_epochs_is_one_trial_with_the_checkpoints_of_both(lengths):
    one = {"base_model": ["m"], "dataset": ["d"]}
    (planned,) = trained(plan_of(train={"lr_schedule": "constant"}, axes=one | {"epochs": lengths}))
    assert planned.epochs == (3, 10)
    assert planned.trial.train.epochs == 10


def test_a_cosine_schedule_of_3_and_of_10_epochs_is_two_trials():
    plan = plan_of(axes={"base_model": ["m"], "dataset": ["d"], "epochs": [3, 10]})
    assert [p.epochs for p in trained(plan)] == [(3,), (10,)]


# ---------------------------------------------------------------------- what keeps ids, what changes them


@pytest.mark.parametrize(
    "changes",
    [
        {"execution": {"layout": "packed"}},
        {"execution": {"pack_length": 256}},
        {"execution": {"micro_batch_size": 1}},
        {"execution": {"gradient_checkpointing": True}},
        {"execution": {"attention": "eager"}},
        {"execution": {"eval_batch_size": 1}},
        {"execution": {"max_retries": 0}},
        {"resources": {"train": {"cpus": 4, "gpus": 1}, "evaluate": {"gpus": 0.5}}},
        {"name": "renamed"},
        {"keep": "none", "keep_state": "last"},
        {"layer_delta": "off"},
        {"measure": False, "measure_examples": 3},
        {"base_models": {"renamed": BASE["base_models"]["m"], "n": BASE["base_models"]["n"]}},
        {"datasets": {"d": BASE["datasets"]["d"] | {"kind": "else"}, "renamed": BASE["datasets"]["e"]}},
        {"benchmarks": {"renamed": BASE["benchmarks"]["b"] | {"kind": "else", "chance": 0.5}}},
    ],
    ids=str,
)
def test_names_and_the_way_it_runs_keep_every_trial_id_and_eval_id(changes):
    content = {name: f"content of {name}" for name in "mndeb"}
    renamed = {"base_models": "m", "datasets": "e", "benchmarks": "b"}
    digests = content | {"renamed": content[next((renamed[k] for k in changes if k in renamed), "b")]}
    before, after = plan_of(), plan_of(digests, **changes)
    assert ids(after) == ids(before)
    assert {e.eval_id for p in after.trials for e in p.evaluations} == {
        e.eval_id for p in before.trials for e in p.evaluations
    }


@pytest.mark.parametrize("settings", [{"seed": 1}, {"learning_rate": 2e-5}, {"precision": "bf16"}], ids=str)
def test_a_setting_of_the_training_changes_every_trial_and_no_baseline(settings):
    before, after = plan_of(), plan_of(train=settings)
    assert {p.trial_id for p in trained(after)}.isdisjoint(p.trial_id for p in trained(before))
    assert [p.trial_id for p in baselines(after)] == [p.trial_id for p in baselines(before)]


def test_extending_a_sweep_keeps_the_trials_it_had():
    before = plan_of(axes={"learning_rate": [1e-3]})
    after = plan_of(axes={"learning_rate": [1e-4, 1e-3], "seed": [0, 1]})
    assert set(ids(before)) < set(ids(after))


def test_the_type_of_the_kept_weights_is_in_the_eval_id_and_not_in_the_trial_id():
    before, after = plan_of(), plan_of(export_dtype="bfloat16")
    assert ids(after) == ids(before)
    assert after.trials[0].evaluations[0].eval_id != before.trials[0].evaluations[0].eval_id


def test_new_content_under_an_old_name_is_another_trial_or_score():
    before = plan_of()
    other_data = plan_of({"d": "changed"})
    assert len(set(ids(before)) - set(ids(other_data))) == 2
    other_items = plan_of({"b": "changed"})
    assert ids(other_items) == ids(before)
    assert other_items.trials[0].evaluations[0].eval_id != before.trials[0].evaluations[0].eval_id


# ---------------------------------------------------------------------- baselines and measures


def test_there_is_one_baseline_per_base_model():
    found = baselines(plan_of(axes={"seed": [1, 2, 3], "method": ["full", "lora"]}))
    assert [(p.base_model, p.dataset, p.epochs) for p in found] == [("m", None, (0,)), ("n", None, (0,))]


def test_a_baseline_is_evaluated_under_every_template_of_its_trials():
    templates = ["Q: {prompt} A: {completion}", "{prompt}{completion}"]
    plan = plan_of(
        axes={"template": templates},
        exclude=[{"base_model": "n", "template": templates[1]}],
        benchmarks={"b": {"task": "hellaswag"}, "bare": {"task": "gsm8k", "apply_template": False}},
    )
    for baseline, used in zip(baselines(plan), (templates, templates[:1]), strict=True):
        assert [e.template for e in baseline.evaluations if e.name == "b"] == used
        assert [e.template for e in baseline.evaluations if e.name == "bare"] == [None]
        wanted = {e.eval_id for p in trained(plan) if p.base_model == baseline.base_model for e in p.evaluations}
        assert {e.eval_id for e in baseline.evaluations} == wanted


def test_two_names_of_one_base_model_share_a_baseline_with_the_templates_of_both():
    templates = ["Q: {prompt} A: {completion}", "{prompt}{completion}"]
    plan = plan_of({"m": "same", "n": "same"}, zip=[{"base_model": ["m", "n"], "template": templates}])
    (baseline,) = baselines(plan)
    assert [e.template for e in baseline.evaluations] == templates


def test_baselines_can_be_left_out():
    assert not baselines(plan_of(baselines=False))
    assert not baselines(plan_of(benchmarks={}))


def test_each_pair_is_measured_once():
    plan = plan_of(axes={"seed": [1, 2], "base_model": ["m"]}, exclude=[{"dataset": "e"}])
    assert [(m.base_model, m.dataset) for m in plan.measures] == [("m", "d")]


def test_pairs_that_are_not_trained_can_be_measured_too():
    pairs = [{"base_model": "n", "dataset": "e"}, {"base_model": "m", "dataset": "d"}]
    one = {"axes": {"base_model": ["m"], "dataset": ["d"]}, "measure_only": [*pairs, pairs[0]]}
    assert [(m.base_model, m.dataset) for m in plan_of(**one).measures] == [("m", "d"), ("n", "e")]
    only = plan_of(**one, measure=False)
    assert [(m.base_model, m.dataset) for m in only.measures] == [("n", "e"), ("m", "d")]
    assert len(trained(only)) == 1


def test_two_names_of_one_dataset_are_one_trial_and_one_measure():
    same = {"tiny": "code_output"}
    plan = plan_of({"d": "same", "e": "same"}, datasets={"d": same, "e": same}, axes={"base_model": ["m"]})
    assert cells(plan) == [("m", "d")]
    pairs = [{"base_model": "m", "dataset": name} for name in "de"]
    only = plan_of({"d": "same", "e": "same"}, datasets={"d": same, "e": same}, measure_only=pairs)
    assert len({m.key for m in only.measures}) == len(only.measures) == 2


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exclude": [{"base_model": ["m", "n"]}]}, "no trial: every cell is excluded"),
        (
            {"eval_epochs": [5], "train": {"epochs": 3}},
            r"eval_epochs is \[5\], but a trial has only 3 epochs",
        ),
        (
            {"eval_epochs": [2, 9], "axes": {"epochs": [3, 4]}},
            r"eval_epochs names \[9\], but no trial has more than 4 epochs",
        ),
    ],
)
def test_a_sweep_that_asks_for_nothing_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        plan_of(**changes)


def test_settings_that_do_not_go_together_are_refused_and_named():
    sweep = sweep_of().model_copy(update={"axes": {"trained_layers": ("3-1",)}})
    with pytest.raises(ConfigError, match="do not go together: trained_layers '3-1': the first block is after"):
        expand(sweep, pins_of(sweep))


def test_two_names_of_one_evaluation_are_refused():
    benchmarks = {"x": {"tiny": "code_output_test"}, "y": {"tiny": "code_output_test"}}
    with pytest.raises(ConfigError, match="benchmarks 'x' and 'y' are the same evaluation"):
        plan_of({"x": "same", "y": "same"}, benchmarks=benchmarks)
