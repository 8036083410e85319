"""The evaluators by name, as the training loop and ``eqvision eval`` call them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
from jax.sharding import Mesh

from eqvision.classifiers import Classifier
from eqvision.data import Source
from eqvision.evaluators.console import note
from eqvision.evaluators.features import FrozenFeatures, cached_features
from eqvision.evaluators.few_shot import SHOTS, few_shot, too_few
from eqvision.evaluators.knn import K, knn
from eqvision.evaluators.linear_probe import linear_probe
from eqvision.evaluators.splits import rarest_class
from eqvision.names import nearest
from eqvision.recipes import TrainConfig
from eqvision.run_folder import RunFolder
from eqvision.setup import load_source


class _Problem(NamedTuple):
    """Features of both splits, and what the classes are called."""

    train: FrozenFeatures
    test: FrozenFeatures
    class_names: tuple[str, ...]
    seed: int


def run_evaluators(
    names: Sequence[str],
    model: Classifier,
    stats: eqx.nn.State,
    config: TrainConfig,
    folder: RunFolder,
    step: int,
    mesh: Mesh,
) -> dict[str, float]:
    """Metrics of the evaluators ``names`` on the frozen model, such as ``test/linear_probe/accuracy``.

    They are fitted on ``data.train_split`` and measured on ``data.test_split``, prepared as in evaluation; the classes
    are those of the data and need not be those of the model's head. Features are kept in features/ of the run folder.
    Which examples are held out or are shots depends on ``config.seed`` alone.

    Raises UnknownNameError, and ValueError for tasks and data other than one class per image.
    """
    check_evaluators(names, config)
    if not names:
        return {}
    train = load_source(config, config.data.train_split, train=True)
    test = load_source(config, config.data.test_split)
    class_names = _common_classes(train, test, config)

    def features(source: Source, split: str) -> FrozenFeatures:
        kept = folder.path / "features"
        return cached_features(model, stats, source, config, mesh, folder=kept, split=split, step=step)

    both = features(train, config.data.train_split), features(test, config.data.test_split)
    problem = _Problem(both[0], both[1], class_names, config.seed)
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(names):
        metrics |= {f"test/{metric}": value for metric, value in EVALUATORS[name](problem).items()}
    return metrics


def check_evaluators(names: Sequence[str], config: TrainConfig) -> None:
    """Raise before anything is computed: UnknownNameError, and ValueError where the task has no classes to probe."""
    for name in names:
        if name not in EVALUATORS:
            raise nearest(name, list(EVALUATORS), "evaluator")
    if names and config.task.kind != "single_label":
        raise ValueError(
            f"task.kind is {config.task.kind!r}, and {', '.join(names)} need one class per image "
            "(single_label); leave --eval.evaluators empty, or evaluate with --evaluator classification"
        )
    if names and config.data.train_split == config.data.test_split:
        raise ValueError(
            f"{', '.join(names)} would be fitted and measured on the same split {config.data.test_split!r}; "
            "choose another split to measure on"
        )


def _common_classes(train: Source, test: Source, config: TrainConfig) -> tuple[str, ...]:
    """The classes of both splits, of which one may lack the last ones: arrays count theirs from the labels."""
    for source in (train, test):
        if source.labels.ndim != 1:
            raise ValueError(
                f"{source.describe(0)} has {source.labels.shape[1]} values as its label; evaluators on frozen "
                "features need one class per image"
            )
    fewer, more = sorted((train.class_names, test.class_names), key=len)
    if more[: len(fewer)] != fewer:
        raise ValueError(
            f"the classes of the splits {config.data.train_split!r} and {config.data.test_split!r} differ: "
            f"{', '.join(train.class_names[:5])} ... and {', '.join(test.class_names[:5])} ..."
        )
    return more


def _linear_probe(problem: _Problem) -> dict[str, float]:
    """Ridge in closed form, and logistic regression."""
    given, num_classes = (*problem.train, *problem.test), len(problem.class_names)
    ridge = linear_probe(*given, num_classes=num_classes, seed=problem.seed)
    logistic = linear_probe(*given, num_classes=num_classes, kind="logistic", seed=problem.seed)
    note(f"linear_probe: ridge with l2 {ridge.l2:g}, logistic regression with l2 {logistic.l2:g}")
    return {"linear_probe/accuracy": ridge.accuracy, "linear_probe/logistic_accuracy": logistic.accuracy}


def _few_shot(problem: _Problem) -> dict[str, float]:
    """Each number of shots that every class has; the others are left out with a note."""
    num_classes, metrics = len(problem.class_names), {}
    rarest, available = rarest_class(problem.train.labels, problem.seed)
    for shots in SHOTS:
        if available < shots:
            note(f"few_shot: left out {shots} shots; {too_few(repr(problem.class_names[rarest]), available, shots)}")
            continue
        result = few_shot(*problem.train, *problem.test, num_classes=num_classes, shots=shots, seed=problem.seed)
        metrics[f"few_shot_{shots}/accuracy"] = result.accuracy
    if not metrics:
        raise ValueError(too_few(repr(problem.class_names[rarest]), available, min(SHOTS)))
    return metrics


def _knn(problem: _Problem) -> dict[str, float]:
    k = min(K, len(problem.train.labels))
    if k < K:
        note(f"knn: k is {k} and not {K}, since there are no more training examples")
    return {"knn/accuracy": knn(*problem.train, *problem.test, num_classes=len(problem.class_names), k=k)}


EVALUATORS: dict[str, Callable[[_Problem], dict[str, float]]] = {
    "linear_probe": _linear_probe,
    "few_shot": _few_shot,
    "knn": _knn,
}
