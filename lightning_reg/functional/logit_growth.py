r"""Logit growth: the step at which the largest attention logit will pass a threshold, if it goes on as it did.

Formula
    ``log v(t) = c + b x + a x^2`` with ``x = log(t / now)``, by least squares over the points with
    ``t >= window * now``; ``b`` is the exponent of the growth at this moment (``v ~ t^b``). The crossing is
    ``now * exp(x)`` with ``x = 2 g / (b + sqrt(b^2 + 4 a g))`` and ``g = log(threshold) - c``, the first one ahead.
Source
    Wortsman et al. 2023 (arXiv 2309.14322, section 3.2): the largest attention logit grows before the loss shows it,
    every run of theirs above 1e4 diverged, and a quadratic in log-log foretells it. They fit it over model sizes, at a
    fixed step; here it is over the steps of one run, which is all that a training sees.
Input
    ``steps`` that rise and ``values`` > 0, normally max |q.k| / sqrt(head width) over visible keys of all layers,
    measured at regular steps (attention_logits). On the host, in float64. Sampled rows will do: only growth counts.
Unit and range
    A step, from ``now`` (passed already) to ``reach * now``; None where nothing is to be expected by then: too few
    points, growth that falls, is flat or is no larger than its own scatter, a parabola that bends down before.
Default and why
    ``threshold=1e4`` is the paper's. ``window=0.5``: the older half of a log-log curve is another regime (the rise from
    the initialization). ``reach=2``: no further than the fit has seen. ``minimum_growth=0.5`` and ``confidence=2``:
    what merely hovers below the threshold is no growth. experiments/results/early_warning.md has what they give.
Cost
    One least squares with three unknowns for each measurement, under a millisecond; no device is touched.
When it hurts
    It knows nothing of the schedule: growth under a rising learning rate may stop when that falls. With a held or
    falling rate, most warnings that were no divergence were of runs that passed 1e4 and ended worse, but kept
    learning. Divergence by other ways (output logits, spikes, bad data) is not seen.
Not together with
    QK-norm, soft-cap and QK-clip bound the logits: no crossing is to be seen, and its absence proves nothing then.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def predict_crossing(
    steps: Sequence[float] | Tensor, values: Sequence[float] | Tensor, *, threshold: float = 1e4, window: float = 0.5,
    reach: float = 2.0, minimum_points: int = 6, minimum_growth: float = 0.5, confidence: float = 2.0,
) -> float | None:  # fmt: skip
    """The step at which ``values`` will pass ``threshold``, or None where they are not on their way.

    Points that are NaN or not positive are left out; infinity is above any threshold.

    Args:
        steps: When was measured (points,), rising; the last one is now.
        values: What was measured (points,).
        threshold: To be passed.
        window: Points before ``window * now`` are left out.
        reach: Crossings beyond ``reach * now`` are not reported.
        minimum_points: Fewer points in the window give None.
        minimum_growth: Least exponent ``d log(value) / d log(step)`` now.
        confidence: Standard errors that the exponent must be above 0.

    Returns:
        The step, not rounded; that of the last point when its value is at or above the threshold; or None.

    Raises:
        ValueError: If an option is out of its range, or ``steps`` do not rise or do not fit ``values``.

    Example:
        >>> steps = range(5, 105, 5)
        >>> round(predict_crossing(steps, [step**2 for step in steps], threshold=22500), 6)
        150.0
    """
    check_options(threshold, window, reach, minimum_points, minimum_growth, confidence)
    t, v = _points(steps, values)
    if not len(t):
        return None
    now = float(t[-1])
    if v[-1] >= threshold:
        return now
    if int(_recent(t, v, window).sum()) < minimum_points:
        return None
    level, growth, bend, error = fit_growth(t, v, window=window)
    if growth <= 0 or growth < max(minimum_growth, confidence * error):
        return None
    gap = math.log(threshold) - level
    if gap <= 0:  # by the fit it is there, only the last point scatters below
        return now
    inside = growth**2 + 4 * bend * gap
    if inside < 0:
        return None
    ahead = 2 * gap / (growth + math.sqrt(inside))
    return now * math.exp(ahead) if ahead <= math.log(reach) else None


def check_options(
    threshold: float, window: float, reach: float, minimum_points: int, minimum_growth: float, confidence: float
) -> None:
    """Raise ValueError for an option out of its range."""
    if not 0 < threshold < math.inf:
        raise ValueError(f"`threshold` must be > 0 and finite, got {threshold}. The paper's is 1e4.")
    if not 0 <= window < 1:
        raise ValueError(
            f"`window` must be in [0, 1), got {window}. It is a share of the steps done; 0 keeps all points."
        )
    if not 1 < reach < math.inf:
        raise ValueError(f"`reach` must be > 1 and finite, got {reach}. It is a multiple of the steps done.")
    if minimum_points < 4:
        raise ValueError(
            f"`minimum_points` must be >= 4, got {minimum_points}. A parabola takes three and leaves no error."
        )
    if not minimum_growth >= 0:
        raise ValueError(f"`minimum_growth` must be >= 0, got {minimum_growth}. Falling values cross nothing.")
    if not confidence >= 0:
        raise ValueError(f"`confidence` must be >= 0, got {confidence}. 0 believes every fit.")


def _points(steps: Sequence[float] | Tensor, values: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Steps and values in float64, of what is a number and positive."""
    t, v = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (_list(steps), _list(values)))
    if t.shape != v.shape or t.dim() != 1:
        raise ValueError(
            f"`steps` and `values` must be of one dimension and equal length, got {tuple(t.shape)} and "
            f"{tuple(v.shape)}. Give one value for each step."
        )
    if not bool((t.diff() > 0).all()):
        raise ValueError("`steps` must rise. Sort the points, and keep one of each step.")
    kept = (t > 0) & (v > 0)
    return t[kept], v[kept]


def _list(numbers: Sequence[float] | Tensor) -> Sequence[float] | Tensor:
    return numbers if isinstance(numbers, Tensor) else list(numbers)


def fit_growth(steps: Tensor, values: Tensor, *, window: float = 0.5) -> tuple[float, float, float, float]:
    """``(c, b, a, standard error of b)`` of the card's parabola around the last of ``steps``; all is positive."""
    recent = _recent(steps, values, window)
    x, y = (steps[recent].double() / steps[-1]).log(), values[recent].double().log()
    design = torch.stack([torch.ones_like(x), x, x.square()], 1)
    # as stable as the pseudo-inverse, and several times cheaper
    basis, triangle = torch.linalg.qr(design)
    inverse = torch.linalg.inv(triangle) @ basis.mT
    solution = inverse @ y
    variance = (y - design @ solution).square().sum() / (len(x) - 3)
    level, growth, bend = solution.tolist()
    return level, growth, bend, float((inverse[1].square().sum() * variance).sqrt())


def _recent(steps: Tensor, values: Tensor, window: float) -> Tensor:
    return (steps >= window * steps[-1]) & values.isfinite()
