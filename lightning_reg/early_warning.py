"""Early warning: tells from the growth of the attention logits that a training is about to diverge.

>>> warning = EarlyWarning(threshold=22500, patience=2)
>>> for step in range(5, 105, 5):
...     predicted = warning.update(step, max_logit=step**2)
>>> round(predicted, 6)
150.0
"""

import math
from typing import Any

from lightning_reg.functional.logit_growth import check_options, predict_crossing

SPACING = 1 / 400  # of kept points, relative: 280 in half of the training, however long it is


class EarlyWarning:
    """Takes (step, max logit) as they are measured, and says when a crossing is ahead.

    It warns after ``patience`` measurements in a row from which ``predict_crossing`` sees a crossing, and stops after
    as many from which it sees none. It keeps few points, on the host; nothing here touches a device.

    Args:
        threshold: Of the largest attention logit; every run of Wortsman et al. above 1e4 diverged.
        patience: Predictions in a row that make and end a warning.
        until: Last step of the training: crossings after it are no reason to warn. None where that is not known.
        window: As all that follow, an argument of ``predict_crossing``.
        reach: Crossings beyond ``reach`` times the steps done are not reported.
        minimum_points: Fewer points in the window predict nothing.
        minimum_growth: Least exponent of the growth over steps.
        confidence: Standard errors that it must be above 0.

    Attributes:
        until: As given; may be set once the length of the training is known.
        prediction: What the last measurement alone predicts: a step, or None.
        warned: Whether the warning is on.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self, threshold: float = 1e4, *, patience: int = 2, until: int | None = None, window: float = 0.5,
        reach: float = 2.0, minimum_points: int = 6, minimum_growth: float = 0.5, confidence: float = 2.0,
    ) -> None:  # fmt: skip
        check_options(threshold, window, reach, minimum_points, minimum_growth, confidence)
        if patience < 1:
            raise ValueError(f"`patience` must be >= 1, got {patience}. 1 warns at the first prediction.")
        if until is not None and until < 1:
            raise ValueError(f"`until` must be >= 1 or None, got {until}. Give the last step of the training.")
        self._patience, self._window = patience, window
        self.until = math.inf if until is None else until
        self._options: dict[str, Any] = {
            "threshold": threshold, "window": window, "reach": reach, "minimum_points": minimum_points,
            "minimum_growth": minimum_growth, "confidence": confidence,
        }  # fmt: skip
        self._points: list[tuple[float, float]] = []
        self._against = 0  # measurements in a row that speak against the state
        self._crossing: float | None = None  # the last one that was predicted
        self.prediction: float | None = None
        self.warned = False

    def update(self, step: int, max_logit: float) -> float | None:
        """Take a measurement.

        A step that is not after the last one is a training that went back: what was measured from there on is
        forgotten. NaN and what is not positive say nothing and change nothing.

        Returns:
            The step of the crossing that was predicted last, while the warning is on; else None.
        """
        step_now, value = float(step), float(max_logit)
        if step_now > 0 and value > 0:
            self._keep(step_now, value)
            steps, values = zip(*self._points)
            crossing = predict_crossing(steps, values, **self._options)
            self._decide(crossing if crossing is not None and crossing <= self.until else None)
        return self._crossing if self.warned else None

    def state_dict(self) -> dict[str, Any]:
        """What was measured and decided; the options are not in it."""
        return {
            "points": [list(point) for point in self._points], "against": self._against, "warned": self.warned,
            "prediction": self.prediction, "crossing": self._crossing,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._points = [(step, value) for step, value in state["points"]]
        self._against, self.warned = state["against"], state["warned"]
        self.prediction, self._crossing = state["prediction"], state["crossing"]

    def _keep(self, step: float, value: float) -> None:
        """Add a point; the one before gives way where it is too near to the one before that."""
        points = [point for point in self._points if self._window * step <= point[0] < step]
        if len(points) > 1 and points[-1][0] < points[-2][0] * (1 + SPACING):
            points.pop()
        self._points = [*points, (step, value)]

    def _decide(self, crossing: float | None) -> None:
        self.prediction = crossing
        if crossing is not None:
            self._crossing = crossing
        self._against = self._against + 1 if (crossing is not None) != self.warned else 0
        if self._against >= self._patience:
            self.warned, self._against = not self.warned, 0
