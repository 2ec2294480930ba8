"""Metrics over a split: numbers that average, and torchmetrics, against scikit-learn and numpy on the whole split."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, mean_squared_error, roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from popmtl.method.measured import to_device
from popmtl.method.problem import Problem

torchmetrics = pytest.importorskip("torchmetrics")
from torchmetrics.aggregation import MaxMetric, MinMetric  # noqa: E402
from torchmetrics.classification import BinaryAUROC, MulticlassF1Score, MulticlassJaccardIndex  # noqa: E402
from torchmetrics.image import PeakSignalNoiseRatio  # noqa: E402
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef  # noqa: E402
from torchmetrics.wrappers import MinMaxMetric  # noqa: E402

CLASSES = 3


class Mean(torchmetrics.Metric):
    """A metric of a user's own, whose state averages; it says nothing of `full_state_update`, as most do not."""

    def __init__(self):
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, values):
        self.mean = values.mean()

    def compute(self):
        return self.mean


METRICS = {
    "f1": lambda: MulticlassF1Score(CLASSES),
    "miou": lambda: MulticlassJaccardIndex(CLASSES),
    "auc": BinaryAUROC,
    "auc_binned": lambda: BinaryAUROC(thresholds=200),
    "rmse": lambda: MeanSquaredError(squared=False),
    "correlation": PearsonCorrCoef,
    "largest": MaxMetric,
    "least": MinMetric,
    "psnr": lambda: PeakSignalNoiseRatio(data_range=4.0),
}


class Classify(Problem):
    """Logits in, classes out; the last batch is smaller and lacks classes."""

    objectives = ("a", "b")
    metrics = dict.fromkeys(METRICS, "higher")

    def __init__(self, kept=False):
        self.kept = {name: make() for name, make in METRICS.items()} if kept else None
        generator = torch.Generator().manual_seed(0)
        self.data = {}
        for split in ("validation", "test"):
            x, y = torch.randn(50, CLASSES, generator=generator), torch.randint(CLASSES, (50,), generator=generator)
            y[40:] = 2
            self.data[split] = x, y

    def model(self):
        torch.manual_seed(0)
        return nn.Linear(CLASSES, CLASSES)

    def batches(self, seed):
        raise NotImplementedError

    def evaluation_batches(self, split):
        return zip(*(part.split(20) for part in self.data[split]), strict=True)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1]).expand(2)

    def measure(self, model, batch):
        logits, y = model(batch[0]), batch[1]
        found = self.kept or {name: make() for name, make in METRICS.items()}
        for name, metric in found.items():
            if name.startswith("auc"):
                metric.update(logits[:, 0].sigmoid(), (y == 0).long())
            elif name in ("largest", "least"):
                metric.update(logits[:, 1])
            elif name in ("rmse", "correlation", "psnr"):
                metric.update(logits[:, 1], y.float())
            else:
                metric.update(logits, y)
        return dict(found)

    def expected(self, model, split):
        with torch.no_grad():
            logits, y = model(self.data[split][0]).numpy(), self.data[split][1].numpy()
        error = mean_squared_error(y, logits[:, 1])
        return {
            "f1": f1_score(y, logits.argmax(1), average="macro"),
            "miou": jaccard_score(y, logits.argmax(1), average="macro"),
            "auc": roc_auc_score(y == 0, logits[:, 0]),
            "rmse": error**0.5,
            "correlation": np.corrcoef(logits[:, 1], y)[0, 1],
            "largest": logits[:, 1].max(),
            "least": logits[:, 1].min(),
            "psnr": 10 * math.log10(4.0**2 / error),
        }


@pytest.mark.filterwarnings("ignore:No positive samples")
@pytest.mark.parametrize("kept", [False, True], ids=["a new one for each batch", "one that is kept"])
def test_metric_objects_give_the_figure_of_the_whole_split(kept):
    problem = Classify(kept)
    for seed, split in enumerate(("validation", "test", "validation")):  # members and splits do not mix
        torch.manual_seed(seed)
        model = nn.Linear(CLASSES, CLASSES)
        found, expected = problem.evaluate(model, split).metrics, problem.expected(model, split)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert found["auc_binned"] == pytest.approx(expected["auc"], abs=0.02)
    if kept:
        assert not any(metric.update_called for metric in problem.kept.values())


def evaluate(measure, metrics="m", sizes=(4, 2)):
    """A problem whose batches are numbered; its metrics, as `measure(batch number)` gives them."""

    class Numbered(Problem):
        objectives = ("a", "b")

        def model(self):
            return nn.Linear(1, 2)

        def batches(self, seed):
            raise NotImplementedError

        def evaluation_batches(self, split):
            return [torch.full((size, 1), float(i)) for i, size in enumerate(sizes)]

        def losses(self, model, batch):
            return model(batch).mean(0)

        def measure(self, model, batch):
            return measure(int(batch[0]))

    problem = Numbered()
    problem.metrics = dict.fromkeys(metrics.split(), "higher")
    return problem.evaluate(problem.model(), "validation").metrics


def test_numbers_average_by_size_and_nan_does_not_count():
    values = {
        "plain": [0.0, 3.0],
        "tensor": [torch.tensor([1.0]), np.float32(4.0)],
        "absent": [math.nan, torch.tensor(3.0)],
        "nowhere": [math.nan, math.nan],
        "infinite": [math.inf, 1.0],
    }
    found = evaluate(lambda i: {name: of[i] for name, of in values.items()}, " ".join(values))
    assert found == pytest.approx(
        {"plain": 1, "tensor": 2, "absent": 3, "nowhere": math.nan, "infinite": math.inf}, nan_ok=True
    )


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (lambda i: {}, "measure does not return m, which metrics declares"),
        (lambda i: {"m": 1, "recall_at_5": 2}, "measure returns recall_at_5, which metrics does not declare"),
        (lambda i: {"m": 1} if i else {"m": 1, "late": 2}, "measure returns late, which metrics does not declare"),
        (lambda i: {"m": torch.zeros(3)}, r"metric m must be one number, not a Tensor of shape \(3,\)"),
        (lambda i: {"m": {"a": 1}}, "metric m must be one number, not a dict"),
        (lambda i: {"m": None}, "metric m must be one number, not a NoneType"),
        (lambda i: 1.0, "measure must return a dict by name, not float"),
        (lambda i: {"m": 1.0} if i else {"m": MaxMetric()}, "measure returns for m a number on one batch and a metric"),
        (lambda i: {"m": MaxMetric()} if i else {"m": 1.0}, "measure returns for m a number on one batch and a metric"),
    ],
)
def test_what_measure_must_not_return_is_named(measure, says):
    with pytest.raises(ValueError, match=says):
        evaluate(measure)


def updated(metric, *values):
    metric.update(*values)
    return metric


def test_metrics_without_one_number_are_named():
    def by_class(i):
        return {"m": updated(MulticlassF1Score(2, average=None), torch.tensor([0, 1]), torch.tensor([0, 1]))}

    with pytest.raises(ValueError, match=r"metric m must be one number, not a Tensor of shape \(2,\)"):
        evaluate(by_class)

    collection = torchmetrics.MetricCollection({"m": MaxMetric(), "n": MinMetric()})
    with pytest.raises(ValueError, match="metric m must be one number, not a dict"):
        evaluate(lambda i: {"m": updated(collection, torch.tensor([1.0]))})
    with pytest.raises(ValueError, match="measure must return a dict by name, not MetricCollection; of a MetricColl"):
        evaluate(lambda i: updated(collection, torch.tensor([1.0])))


def test_the_items_of_a_collection_are_metrics_though_it_shares_their_states():
    collection = torchmetrics.MetricCollection(
        {"precision": torchmetrics.Precision("binary"), "recall": torchmetrics.Recall("binary")}
    )
    predicted, true = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]), torch.tensor([[1, 0, 1, 1], [1, 0, 0, 1]])
    for _ in range(2):
        found = evaluate(lambda i: dict(updated(collection, predicted[i], true[i]).items()), "precision recall")
        assert found == pytest.approx({"precision": 2 / 5, "recall": 2 / 5})


def test_states_that_average_are_put_together_and_wrappers_refused():
    assert evaluate(lambda i: {"m": updated(Mean(), torch.tensor([3.0 + i]))})["m"] == 3.5
    wrapper = MinMaxMetric(MaxMetric())
    advice = "metric m: MinMaxMetric cannot be put together over batches; keep one object and update it"
    with pytest.raises(ValueError, match=advice):
        evaluate(lambda i: {"m": updated(MinMaxMetric(MaxMetric()), torch.tensor([1.0]))})
    with pytest.raises(ValueError, match="metric m must be one number, not a dict"):
        evaluate(lambda i: {"m": updated(wrapper, torch.tensor([1.0]))})
    composed = MaxMetric() + MinMetric()
    assert evaluate(lambda i: {"m": updated(composed, torch.tensor([1.0 + i]))})["m"] == 3
    with pytest.raises(ValueError, match="CompositionalMetric cannot be put together"):
        evaluate(lambda i: {"m": updated(MaxMetric() + MinMetric(), torch.tensor([1.0]))})


def test_kept_objects_come_on_the_models_device():
    for kept in (False, True):
        problem = Classify(kept)
        problem.one, problem.model_of_another_kind = MaxMetric(), nn.Linear(1, 1)
        to_device(problem, torch.device("meta"))
        assert problem.one.max_value.is_meta
        assert not problem.model_of_another_kind.weight.is_meta
        if kept:
            assert problem.kept["f1"].tp.is_meta


def test_objects_are_reset_when_the_evaluation_fails():
    kept = MaxMetric()

    def fails(i):
        if i:
            raise KeyError
        return {"m": updated(kept, torch.tensor([7.0]))}

    with pytest.raises(KeyError):
        evaluate(fails)
    assert evaluate(lambda i: {"m": updated(kept, torch.tensor([1.0]))})["m"] == 1


def test_a_figure_is_one_members_own_where_actors_are_a_process_group(monkeypatch):
    """torchmetrics would gather the states of all processes, which hold other members."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda *_, **__: pytest.fail("it asked the others"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: pytest.fail("it asked the others"))
    assert evaluate(lambda i: {"m": updated(MaxMetric(), torch.tensor([1.0 + i]))})["m"] == 2
    composed = MaxMetric() + MinMetric()
    assert evaluate(lambda i: {"m": updated(composed, torch.tensor([1.0 + i]))})["m"] == 3
