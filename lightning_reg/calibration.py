"""What sparsity a trained model bears: its MLPs truncated to a price in perplexity (PPL-p%, Sparsing Law).

One CETT is shared by all layers. A first pass measures the dense perplexity and where the contributions of each layer
lie, a second tabulates CETT over thresholds in every layer at once, and a bisection over the tabulated values evaluates
the truncated model, a pass each. The formulas are in ``functional.cett``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg import activations, capture
from lightning_reg.capture import Targets
from lightning_reg.functional.cett import contributions
from lightning_reg.metrics import CETT

Loss = Callable[[nn.Module, Any], Any]
Mask = str | int | Callable[[Any], Tensor] | None

# norms are counted in 64 steps an octave, from 2^-64 to 2^64
_STEPS, _OCTAVES = 64, 64


@dataclass(frozen=True)
class PerplexitySparsity:
    """Result of ``perplexity_sparsity``.

    Args:
        cett: Error that each layer may make, shared by all.
        sparsity: Share of elements dropped or 0 anyway, in the truncated model: mean over layers.
        layer_sparsity: The same by layer.
        thresholds: Norm of a contribution below which it is dropped, by layer; ``thresholds[name] / ||W[:, i]||`` on
            ``|x_i|``.
        perplexity_dense: Without truncation.
        perplexity_sparse: With it.
        passes: Passes over the batches.
    """

    cett: float
    sparsity: float
    layer_sparsity: dict[str, float]
    thresholds: dict[str, float]
    perplexity_dense: float
    perplexity_sparse: float
    passes: int


def perplexity_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss,
    increase: float = 0.01,
    targets: Targets = None,
    mask: Mask = None,
    grid: int = 64,
) -> PerplexitySparsity:
    """Largest activation sparsity whose perplexity stays within ``1 + increase`` times that of the dense model.

    The inputs of all down-projections are truncated by one CETT: the largest tabulated one that was evaluated and met,
    while the next was not. Where perplexity does not rise with CETT, a larger one may exist. The model is as before
    afterwards, also after an exception: training mode, hooks, random state. Each process looks at its own batches.

    Args:
        model: Trained model; it is run in evaluation mode without gradients.
        batches: Batches that can be iterated again and again: a list or a DataLoader.
        loss: ``loss(model, batch)`` gives ``(sum of the token losses, number of tokens)`` in nats, or a mean, which
            weighs every batch alike.
        increase: Accepted relative increase of the perplexity, > 0: 0.01 is PPL-1%.
        targets: Down-projections, as for the regularizers; all MLPs when left out.
        mask: Where a batch keeps its valid tokens (batch, tokens), for CETT and sparsity: a key or index of the batch,
            or a function of it. ``loss`` takes care of its own padding.
        grid: Thresholds to tabulate for each layer, >= 2. Each costs one product with the weight in the second pass.

    Raises:
        ValueError: If an argument is out of range, no MLP is found, ``batches`` is empty or can be iterated only once,
            a down-projection did not run, or the dense perplexity is not finite.
        TypeError: If ``loss`` gives something else.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1]))]
        >>> def loss(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), 5
        >>> found = perplexity_sparsity(mlp, batches, loss=loss, increase=0.05)
        >>> found.perplexity_sparse <= 1.05 * found.perplexity_dense
        True
    """
    _check(batches, increase, grid)
    modules = capture.named_modules(model)
    layers = [_Layer(mlp.down, modules[mlp.down]) for mlp in capture.select_mlps(targets, model)]
    passes = _Passes(model, batches, loss, mask, layers)
    dense = passes.run(_Layer.locate)
    if not math.isfinite(dense):
        raise ValueError(f"the loss of the dense model is {dense}: no increase of its perplexity can be measured.")
    for layer in layers:
        layer.prepare_table(grid)
    passes.run(_Layer.tabulate)
    if empty := [layer.name for layer in layers if not layer.table.elements]:
        raise ValueError(f"`mask` leaves no token at {', '.join(empty[:5])}: True must mark the valid tokens.")
    errors = torch.cat([layer.table.compute()[0].cpu() for layer in layers])
    candidates = sorted({0.0, *errors[errors < 1].tolist()})  # 1 drops everything, and NaN is a layer without output
    chosen, sparse, sparsity = _bisect(passes, layers, candidates, dense + math.log1p(increase))
    return PerplexitySparsity(
        cett=chosen,
        sparsity=fmean(sparsity.values()),
        layer_sparsity=sparsity,
        thresholds={layer.name: layer.table.lookup(chosen)[0] for layer in layers},
        perplexity_dense=_perplexity(dense),
        perplexity_sparse=_perplexity(sparse),
        passes=passes.count,
    )


def _bisect(
    passes: "_Passes", layers: list["_Layer"], candidates: list[float], allowed: float
) -> tuple[float, float, dict[str, float]]:
    """The largest CETT met with a loss within ``allowed``, that loss, and the sparsity by layer."""

    def truncated(cett: float) -> tuple[float, float, dict[str, float]]:
        for layer in layers:
            layer.set_threshold(cett)
        return cett, passes.run(_Layer.truncate), {layer.name: layer.sparsity for layer in layers}

    # the invariant: candidates[low] meets it, candidates[high] does not; the first is 0, which drops zeros only
    low, high, met = 0, len(candidates), None
    while high - low > 1:
        middle = (low + high) // 2
        tried = truncated(candidates[middle])
        if tried[1] <= allowed:
            low, met = middle, tried
        else:
            high = middle
    return met or truncated(candidates[0])


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf


# --- a layer ---------------------------------------------------------------------------------------------------------


class _Layer:
    """A down-projection. ``locate``, ``tabulate`` and ``truncate`` each look at its input in one kind of pass."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.convolution = isinstance(module, nn.Conv2d)
        with torch.no_grad():
            weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
            # GPT-2's Conv1D keeps (width, out), a convolution (out, width, 1, 1)
            self.weight = weight.mT if capture.is_conv1d(module) else weight.flatten(1)
        self.counts = torch.zeros(2 * _OCTAVES * _STEPS + 1, dtype=torch.int64, device=self.weight.device)
        self.table = CETT([0.0])
        self.threshold: float = 0.0
        self.kept: int | Tensor = 0
        self.elements: int | Tensor = 0

    def locate(self, x: Tensor, valid: Tensor | None) -> None:
        """Count the norms of contributions, by size."""
        norms = self._norms(x, valid)
        place = (norms.log2() + _OCTAVES).mul_(_STEPS).clamp_(0, len(self.counts) - 1).nan_to_num_(0.0)
        self.counts += place.long().flatten().bincount(minlength=len(self.counts))

    def prepare_table(self, grid: int) -> None:
        """Spread thresholds over the error that they would make if contributions were orthogonal."""
        edges = 2.0 ** (torch.arange(1, len(self.counts) + 1, dtype=torch.float64) / _STEPS - _OCTAVES)
        counts = self.counts.cpu().double()
        counts[0] = 0  # zeros
        error = (counts * edges.square()).cumsum(0).sqrt()
        # squares: as many thresholds below an error of 1/4 as above
        levels = error[-1] * torch.linspace(0, 1, grid, dtype=torch.float64).square()
        places = torch.searchsorted(error, levels).clamp_max(len(edges) - 1)
        self.table = CETT(edges[places], sync_on_compute=False).to(self.weight.device)

    def tabulate(self, x: Tensor, valid: Tensor | None) -> None:
        """Add to the table of CETT."""
        self.table.update(x, self.weight, valid)

    def set_threshold(self, cett: float) -> None:
        """Truncate by the largest threshold whose CETT is at most this."""
        self.threshold, self.kept, self.elements = self.table.lookup(cett)[0], 0, 0

    def truncate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Drop contributions below the threshold, and count what is left at valid tokens."""
        norms = contributions(x, self.weight)
        below = norms < torch.as_tensor(self.threshold, dtype=norms.dtype)
        kept = (below | (norms == 0)).logical_not_()
        if valid is not None:
            kept = kept & valid.unsqueeze(-1)
        self.kept = self.kept + kept.sum()
        self.elements = self.elements + (x.numel() if valid is None else valid.sum() * x.shape[-1])
        return x.masked_fill(below, 0.0)

    @property
    def sparsity(self) -> float:
        """Share of elements that ``truncate`` dropped or found to be 0."""
        return 1 - float(self.kept) / float(self.elements)

    def _norms(self, x: Tensor, valid: Tensor | None) -> Tensor:
        norms = contributions(x, self.weight)
        return norms if valid is None else norms.masked_fill(~valid.unsqueeze(-1), 0.0)

    def as_rows(self, x: Tensor) -> Tensor:
        """Tokens by width: a convolution has its channels in front."""
        return x.movedim(-3, -1) if self.convolution else x

    def as_input(self, x: Tensor) -> Tensor:
        """The reverse of ``as_rows``."""
        return x.movedim(-1, -3) if self.convolution else x


# --- a pass ----------------------------------------------------------------------------------------------------------


class _Passes:
    """Passes of a model over the batches."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss, mask: Mask, layers: list[_Layer]) -> None:
        self.model, self.batches, self.loss, self.mask, self.layers = model, batches, loss, mask, layers
        self.valid: Tensor | None = None
        self.count = 0

    def run(self, see: Callable[[_Layer, Tensor, Tensor | None], Tensor | None]) -> float:
        """Mean loss of a pass in which ``see`` looks at each layer's input and may replace it.

        Raises:
            ValueError: If a layer was not called, or no token counted.
        """
        self.count += 1
        total, number = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        ran: set[str] = set()

        def pre_hook(layer: _Layer, module: nn.Module, args: tuple) -> tuple | None:
            if not args:
                return None
            ran.add(layer.name)
            rows = layer.as_rows(args[0])
            new = see(layer, rows, self._valid_rows(rows))
            return None if new is None else (layer.as_input(new), *args[1:])

        with _evaluation(self.model), ExitStack() as hooks:
            for layer in self.layers:
                hooks.callback(layer.module.register_forward_pre_hook(partial(pre_hook, layer)).remove)
            for batch in self.batches:
                self.valid = self._batch_mask(batch)
                part, weight = _loss_and_number(self.loss(self.model, batch))
                total, number = total + part, number + weight
        self._check_pass([layer.name for layer in self.layers if layer.name not in ran], float(number))
        return float(total / number)

    def _check_pass(self, missing: list[str], number: float) -> None:
        if number <= 0:
            raise ValueError(
                f"`batches` and `loss` gave {number:g} tokens: there must be a batch, and a token in its loss."
            )
        if missing:
            raise ValueError(
                f"the down-projections {', '.join(missing[:5])} were not called with a positional input by "
                "`loss(model, batch)`, so they cannot be truncated. Call the model in `loss`, or leave them out with "
                "`targets=`."
            )

    def _batch_mask(self, batch: Any) -> Tensor | None:
        if self.mask is None:
            return None
        try:
            mask = self.mask(batch) if callable(self.mask) else batch[self.mask]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"`mask={self.mask!r}` is not in the batch, a {type(batch).__name__}; give its key, its index, or a "
                "function of the batch."
            ) from error
        if not isinstance(mask, Tensor):
            raise ValueError(f"`mask={self.mask!r}` must select a tensor, got {type(mask).__name__}.")
        return mask.bool()

    def _valid_rows(self, x: Tensor) -> Tensor | None:
        """The mask for rows (..., width): as it is, or flattened where the model flattened batch and tokens."""
        if self.valid is None:
            return None
        valid = self.valid.to(x.device)
        if valid.shape == x.shape[:-1]:
            return valid
        if x.dim() == 2 and valid.numel() == x.shape[0]:
            return valid.flatten()
        raise ValueError(
            "`mask` must have the shape of a down-projection's input without its last axis, "
            f"{tuple(x.shape[:-1])}, got {tuple(valid.shape)}."
        )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, after which modes and random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.get_device() for parameter in model.parameters() if parameter.is_cuda}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # each pass begins with the same random state, so a DataLoader that shuffles gives the same batches again
        with torch.random.fork_rng(sorted(devices)), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.backends.mha.set_fastpath_enabled(False)  # it would pass by the down-projection
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def _loss_and_number(result: Any) -> tuple[Tensor, Tensor]:
    pair = result if isinstance(result, tuple) and len(result) == 2 else (result, 1)
    if not all(isinstance(part, (int, float)) or (isinstance(part, Tensor) and part.numel() == 1) for part in pair):
        raise TypeError(
            "`loss(model, batch)` must give a mean, or (sum of the token losses, number of tokens), got "
            f"{type(result).__name__}."
        )
    loss, number = (torch.as_tensor(part, dtype=torch.float64).detach().reshape(()) for part in pair)
    return loss, number


def _check(batches: Iterable[Any], increase: float, grid: int) -> None:
    if not 0 < increase < math.inf:
        raise ValueError(f"`increase` must be finite and > 0, got {increase}; 0.01 accepts 1% more perplexity.")
    if grid < 2:
        raise ValueError(f"`grid` must be >= 2 thresholds a layer, got {grid}.")
    if isinstance(batches, Iterator):  # `iter` would draw a random number from a DataLoader's
        raise ValueError(
            f"`batches` must be iterable again and again, got {type(batches).__name__}, which one pass uses up; give "
            "`list(batches)` or the DataLoader itself."
        )


# --- threshold shift -------------------------------------------------------------------------------------------------


def calibrate_fatrelu(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: float,
    method: Literal["quantile", "cett"] = "quantile",
    run: Callable[[nn.Module, Any], Any] | None = None,
    targets: Targets = None,
    mask: Mask = None,
    tokens: int = 1024,
) -> dict[str, float]:
    """Replace each MLP's ReLU by a FATReLU whose threshold cuts what the layer can do without (ProSparse, step 3).

    One pass over ``batches``. ``activations.activation_record`` and a checkpoint of ``ProgressiveSparsity`` hold the
    thresholds, ``activations.fold_activations`` leaves plain ``nn.Threshold`` modules.

    Args:
        model: Trained model with ReLU in its MLPs; it is run in evaluation mode without gradients.
        batches: Batches to calibrate on; the pass ends once every layer has seen ``tokens``.
        target: For ``"quantile"`` the share of the activations above 0 that each layer loses, for ``"cett"`` the
            relative error of its output (``functional.cett``); in [0, 1).
        method: ``"quantile"`` or ``"cett"``.
        run: ``run(model, batch)`` calls the model; left out, it is called with the batch, with its items as keywords
            if it is a mapping, and with its first element if it is a sequence.
        targets: Down-projections, as for the regularizers; all MLPs when left out.
        mask: Where a batch keeps its valid tokens (batch, tokens): a key or index, or a function of it.
        tokens: To look at in each layer, kept on the CPU: ``layers * tokens * width`` numbers, twice for ``"cett"``.

    Returns:
        Threshold by path of the activation.

    Raises:
        ValueError: If an argument is out of range, there is no MLP, one has another activation than ReLU, or a layer
            did not run; the model has not changed then.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(calibrate_fatrelu(mlp, [torch.randn(50, 2)], target=0.1))
        ['1']
    """
    if not 0 <= target < 1:
        raise ValueError(f"`target` must be in [0, 1), the share or the error to accept, got {target}.")
    if method not in ("quantile", "cett"):
        raise ValueError(f"`method` must be 'quantile' or 'cett', got {method!r}.")
    if tokens < 1:
        raise ValueError(f"`tokens` must be >= 1, got {tokens}.")
    sites = [_ShiftSite(mlp, model, tokens) for mlp in capture.select_mlps(targets, model)]
    paths = [site.path for site in sites]
    if shared := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"several MLPs share the activation {', '.join(shared)}: give each its own to shift.")
    passes = _Passes(model, batches, lambda *_: 0.0, mask, [])
    with _evaluation(model), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(site.watching(passes._valid_rows))
        for batch in batches:
            passes.valid = passes._batch_mask(batch)
            (run or _call)(model, batch)
            if all(site.seen >= tokens for site in sites):
                break
    if missing := [site.mlp.down for site in sites if site.seen == 0]:
        raise ValueError(f"`batches` brought no valid token to {', '.join(missing[:5])}; see `run` and `mask`.")
    found = {site.path: site.threshold(target, method) for site in sites}
    for site in sites:
        activations.put_activation(model, site.path, activations.FATReLU(found[site.path]))
    return found


class _ShiftSite:
    """An MLP with ReLU, and what passed through it."""

    def __init__(self, mlp: capture.Mlp, model: nn.Module, tokens: int) -> None:
        modules = capture.named_modules(model)
        found = [path for path in mlp.activations if activations.is_relu(capture.attribute(model, path))]
        if len(found) != 1 or len(mlp.activations) != 1:
            others = ", ".join(activations.describe(capture.attribute(model, path)) for path in mlp.activations)
            raise ValueError(
                f"the MLP of {mlp.down!r} must have one ReLU in an attribute to shift, found {others or 'none'}. Train "
                "it with `ProgressiveSparsity`, or substitute ReLU, or leave it out with `targets=`."
            )
        self.mlp, self.path, self.tokens = mlp, found[0], tokens
        self.down = _Layer(mlp.down, modules[mlp.down])
        self.activation = capture.attribute(model, self.path)
        self.owner = modules[self.path.rpartition(".")[0]]
        self.after: Tensor | None = None  # the activation, until the down-projection is reached
        self.pairs: list[tuple[Tensor, Tensor]] = []  # activation and hidden of valid tokens (tokens, width)
        self.seen = 0

    @contextmanager
    def watching(self, valid_rows: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """See what leaves the activation and enters the down-projection."""

        def keep(_: Any, args: Any, output: Tensor) -> None:
            self.after = output.detach().clone()  # the model may go on in place

        def pair(_: Any, args: tuple) -> None:
            if self.after is not None and self.seen < self.tokens:
                self._add(self.down.as_rows(self.after), self.down.as_rows(args[0]), valid_rows)
            self.after = None

        attribute = self.path.rpartition(".")[2]
        module = self.activation if isinstance(self.activation, nn.Module) else _Called(self.activation)
        handles = [module.register_forward_hook(keep), self.down.module.register_forward_pre_hook(pair)]
        shifted = module.number if isinstance(module, activations.FATReLU) else None
        if isinstance(module, activations.FATReLU):
            module.number = 0.0  # ReLU again, while it is watched
        if module is not self.activation:
            self.owner.__dict__[attribute] = module  # a function: called through a module meanwhile
        try:
            yield
        finally:
            if isinstance(module, activations.FATReLU):
                module.number = shifted
            for handle in handles:
                handle.remove()
            if module is not self.activation:
                self.owner.__dict__[attribute] = self.activation

    def _add(self, after: Tensor, hidden: Tensor, valid_rows: Callable[[Tensor], Tensor | None]) -> None:
        if after.shape != hidden.shape:
            raise ValueError(
                f"what leaves the activation {self.path!r} has shape {tuple(after.shape)}, but {self.mlp.down!r} is "
                f"entered by {tuple(hidden.shape)}; leave this MLP out with `targets=`."
            )
        valid = valid_rows(hidden)
        rows = [part.flatten(0, -2) if valid is None else part[valid] for part in (after, hidden)]
        rows = [part[: self.tokens - self.seen].float().cpu() for part in rows]
        self.seen += len(rows[0])
        self.pairs.append((rows[0], rows[1]))

    def threshold(self, target: float, method: str) -> float:
        """The largest threshold that costs at most ``target``."""
        after, hidden = (torch.cat(parts) for parts in zip(*self.pairs, strict=True))
        positive = after[after > 0].unique() if method == "cett" else after[after > 0].sort().values
        if not len(positive):
            return 0.0
        if method == "quantile":
            cut = int(target * len(positive))  # as many may go; equal ones go together or stay
            return float(positive[positive < positive[cut]].amax()) if bool((positive < positive[cut]).any()) else 0.0
        weight = self.down.weight.float().cpu()
        whole = torch.linalg.vector_norm(hidden @ weight.mT, dim=-1, dtype=torch.float64)
        # the invariant: positive[low] meets the target, positive[high] does not; -1 stands for 0, which cuts nothing
        low, high = -1, len(positive)
        while high - low > 1:
            middle = (low + high) // 2
            lost = hidden.masked_fill(after > positive[middle], 0.0) @ weight.mT
            errors = torch.linalg.vector_norm(lost, dim=-1, dtype=torch.float64)[whole > 0] / whole[whole > 0]
            low, high = (middle, high) if bool(errors.mean() <= target) else (low, middle)
        return float(positive[low]) if low >= 0 else 0.0


class _Called(nn.Module):
    """A function as a module, so that it can be watched."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _call(model: nn.Module, batch: Any) -> Any:
    if type(model).forward in (nn.Module.forward, pl.LightningModule.forward):
        raise ValueError(f"{type(model).__name__} has no `forward`: give `run=lambda model, batch: ...` to call it.")
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
