"""What the distillation benchmark reports: intervals, and the dense loss that it times."""

import pytest
import torch
from scipy import stats

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from benchmarks import distillation

from levelhead.objectives import distillation_loss


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_interval_is_that_of_students_t(n: int) -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4][:n]
    got = distillation.mean_interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=got["mean"], scale=stats.sem(values))
    assert (got["low"], got["high"]) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("normalisation", ["renormalised", "full", "other"])
def test_the_dense_loss_is_the_same_loss(normalisation: str) -> None:
    x, weight = torch.randn(6, 4), torch.randn(50, 4)
    top = torch.randn(6, 50).log_softmax(-1).topk(5)
    arguments = (x, weight, top.indices, top.values)
    expected = distillation.dense(*arguments, normalisation)
    torch.testing.assert_close(
        distillation_loss(*arguments, normalisation=normalisation), expected, rtol=1e-5, atol=1e-6
    )


def test_differences_are_paired_by_seed() -> None:
    names = ["teacher", *(f"{s}, {t}" for s in ("small", "large") for t in
             ("hard labels", "plain", "recalibrated", "smoothed"))]  # fmt: skip
    metrics = ("accuracy", "ece", "trust")
    seeds = [
        {
            "scores": {
                name: dict.fromkeys(metrics, seed + (0.1 if "recal" in name else 0))
                for name in names
            }
        }
        for seed in range(3)
    ]
    found = distillation.summary(seeds)["paired_differences"]
    assert found["small, recalibrated - small, plain"]["ece"] == pytest.approx(
        {"mean": 0.1, "low": 0.1, "high": 0.1}
    )
