"""The Gauss-Newton-Bartlett estimator (paper, section 2.3 and algorithm 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sophia.optim.curvature.estimator import Forward, Refresh, without_autocast
from sophia.optim.curvature.likelihood import LIKELIHOODS, NOISES, output_noise
from sophia.optim.gradients import isolated_gradients
from sophia.optim.noise import row_keys, stream_key


@dataclass(frozen=True, kw_only=True)
class GaussNewtonBartlett:
    """Squared gradients for labels that the model itself draws: h̃ = (1/N) Σ_c s_c ⊙ s_c.

    s_c is the gradient of the sum of the sampled losses over chunk c's counted predictions on all ranks, N the number
    of counted predictions in all chunks on all ranks. Never negative, and its expectation is the diagonal of the
    Gauss-Newton matrix of the mean loss. One chunk is the paper's B · ĝ ⊙ ĝ, whose relative squared error is 2 whatever
    the batch size; C chunks bring it to about 2 / C.

    The loss is the mean over counted predictions: `F.cross_entropy` for "categorical",
    `F.binary_cross_entropy_with_logits` for "bernoulli" and `F.mse_loss` for "gaussian", where each output is a
    prediction of its own.
    """

    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    """What the model's outputs parametrise: the last dimension is the classes for "categorical"."""
    noise: Literal["labels", "signs"] = "labels"
    """Sampled labels as in the paper, or random signs through the square root of the output Hessian: less variance."""
    chunks: int = 1
    """Parts into which the rows of each forward are dealt (row index modulo chunks), each with a forward and a backward
    pass of its own. Cheaper: hand over slices as several forwards; `attach` does."""
    vocab_size: int | None = None
    """Real entries of a padded vocabulary: those above are left out of the softmax and never sampled."""

    def __post_init__(self) -> None:
        """Refuse settings that do not fit each other."""
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood={self.likelihood!r} is not one of {', '.join(LIKELIHOODS)}")
        if self.noise not in NOISES:
            raise ValueError(f"noise={self.noise!r} is not one of {', '.join(NOISES)}")
        if isinstance(self.chunks, bool) or not isinstance(self.chunks, int) or self.chunks < 1:
            raise ValueError(f"chunks={self.chunks!r} must be a whole number of at least 1")
        if self.vocab_size is not None and self.likelihood != "categorical":
            raise ValueError(f"vocab_size={self.vocab_size} has no meaning for the {self.likelihood} likelihood")
        if self.vocab_size is not None and (not isinstance(self.vocab_size, int) or self.vocab_size < 2):
            raise ValueError(f"vocab_size={self.vocab_size!r} must be a whole number of at least 2")

    def estimate(self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh) -> list[Tensor | None]:
        """The estimate h̃, one fp32 tensor or None a parameter.

        Args:
            forwards: each returns the logits of one micro-batch, [..., vocab], or an object that holds them as
                `.logits`, or (logits, mask) with a bool mask of shape logits.shape[:-1], true where one counts.
            params: the parameters, in the order of the result.
            refresh: seed, step, rows and replicas.

        Raises:
            ValueError: on all ranks, when an output does not fit the estimator or no prediction counts on any rank.
        """
        squares: list[Tensor | None] = [None] * len(params)
        total = 0
        for gradients, count in self.chunk_gradients(forwards, params, refresh):
            total += count
            for index, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                known = squares[index]
                squares[index] = gradient.square_() if known is None else known.addcmul_(gradient, gradient)
        return [None if square is None else square.div_(total) for square in squares]

    def chunk_gradients(
        self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh
    ) -> Iterator[tuple[list[Tensor | None], int]]:
        """(s_c, its count of predictions) chunk by chunk: what other curvature than a diagonal can be made of too."""
        total = first_row = 0
        for index, forward in enumerate(forwards):
            rows = 0
            for chunk in range(self.chunks):
                outputs, error = None, None
                try:
                    with refresh.forward_pass(index, params):
                        outputs = self._read(forward())
                        rows = outputs.rows
                        numbers = _row_numbers(refresh, first_row, outputs, last=index == len(forwards) - 1)
                        outputs.keep_rows(numbers % self.chunks == chunk)
                except Exception as problem:  # whatever it is, the other ranks must hear of it
                    error = problem
                counted = 0 if outputs is None else outputs.counted()
                counts = refresh.replicas.agree(error, [counted], params[0].device)
                count = sum(theirs[0] for theirs in counts)
                if count == 0:  # on all ranks: there is nothing to go backward from
                    continue
                assert outputs is not None
                gradients = self._backward(outputs, numbers, params, refresh)
                if total == 0:
                    refresh.replicas.check_reduced(gradients, params)
                total += count
                yield gradients, count
            first_row += rows
        if total == 0:
            raise ValueError(
                "no prediction counts on any rank: the mask given with the logits (attach() makes it from labels that "
                "are not -100) is False everywhere; it must be True where a label contributes to the loss"
            )

    def _backward(
        self, outputs: "_Outputs", numbers: Tensor, params: Sequence[Tensor], refresh: Refresh
    ) -> list[Tensor | None]:
        # Rows numbered by the caller are global: their noise must not depend on which rank holds them.
        rank = refresh.replicas.rank if refresh.rows is None else 0
        keys = row_keys(stream_key(refresh.seed, refresh.step, rank), numbers)
        with torch.no_grad(), without_autocast(outputs.logits.device):
            vector = output_noise(
                outputs.flat,
                outputs.mask,
                keys,
                likelihood=self.likelihood,
                kind=self.noise,
                vocab_size=self.vocab_size,
            ).view_as(outputs.logits)
            if refresh.scale != 1:
                vector.mul_(refresh.scale)
        with isolated_gradients(params, outputs.logits), without_autocast(outputs.logits.device):
            # `.backward()`, not `autograd.grad`: the hooks of DDP and FSDP2 must run.
            torch.autograd.backward(outputs.logits, vector)
            totals = refresh.replicas.sum_gradients([p.grad for p in params], params)
        return [None if s is None else s.div_(refresh.scale) for s in totals]

    def _read(self, output: Any) -> "_Outputs":
        logits, mask = output if isinstance(output, tuple) and _is_mask_pair(output) else (output, None)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"forward() returned {type(output).__name__}{_shapes(output)}, not logits: return a tensor of logits, "
                "an object that holds them as .logits, or (logits, mask) with a bool mask"
            )
        if logits.dim() == 0:
            raise ValueError(
                "forward() returned a scalar, but Gauss-Newton-Bartlett needs the model's logits: return "
                "model(inputs), not the loss (SophiaH is the one that takes the loss)"
            )
        if not logits.is_floating_point():
            raise ValueError(f"forward() returned {logits.dtype} values, not logits")
        if not logits.requires_grad:
            raise ValueError(
                f"the logits of shape {tuple(logits.shape)} that forward() returned carry no gradient: compute them "
                "with the trainable model, without torch.no_grad(), inference_mode() or detach()"
            )
        if self.likelihood == "categorical":
            self._check_classes(logits)
        return _Outputs(
            logits, _checked_mask(mask, logits, elementwise=self.likelihood != "categorical"), self.likelihood
        )

    def _check_classes(self, logits: Tensor) -> None:
        classes = logits.shape[-1]
        if classes < 2:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} have one class, whose curvature is zero: for a binary label "
                'use GaussNewtonBartlett(likelihood="bernoulli"), for a regression likelihood="gaussian"'
            )
        if self.vocab_size is not None and self.vocab_size > classes:
            raise ValueError(
                f"vocab_size={self.vocab_size} is more than the {classes} classes of logits of shape "
                f"{tuple(logits.shape)}: give the number of real entries of the padded vocabulary"
            )


class _Outputs:
    """One micro-batch's outputs with their mask, as [rows, positions(, vocab)]."""

    def __init__(self, logits: Tensor, mask: Tensor, likelihood: str) -> None:
        self.logits = logits
        single = logits.dim() == 1 and likelihood == "categorical"
        self.rows = 1 if single else logits.shape[0]
        positions = mask.numel() // max(1, self.rows)
        tail = (logits.shape[-1],) if likelihood == "categorical" else ()
        self.flat = logits.detach().reshape(self.rows, positions, *tail)
        self.mask = mask.reshape(self.rows, positions)

    def keep_rows(self, kept: Tensor) -> None:
        """Count predictions in these rows only. kept: bool [rows]."""
        self.mask = self.mask & kept.unsqueeze(-1)

    def counted(self) -> int:
        """The number of predictions that count."""
        return int(self.mask.sum())


def _row_numbers(refresh: Refresh, first: int, outputs: _Outputs, *, last: bool) -> Tensor:
    device = outputs.logits.device
    if refresh.rows is None:
        return torch.arange(first, first + outputs.rows, device=device)
    numbers = refresh.rows[first : first + outputs.rows]
    if len(numbers) != outputs.rows or (last and first + outputs.rows != len(refresh.rows)):
        raise ValueError(
            f"rows holds {len(refresh.rows)} indices, but the logits have {first + outputs.rows} rows"
            f"{'' if last else ' or more'}: give one global index for each row of the batch, over all forwards"
        )
    return numbers.to(device)


def _is_mask_pair(output: tuple[Any, ...]) -> bool:
    if hasattr(output, "logits"):  # a named tuple
        return False
    if len(output) == 2 and isinstance(output[1], Tensor) and output[1].dtype == torch.bool:
        return True
    described = ", ".join(f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in output)
    raise ValueError(
        f"forward() returned a tuple of ({described}): only (logits, mask) with a mask of dtype torch.bool is "
        "understood; if the model returns (logits, loss), return its first element"
    )


def _checked_mask(mask: Tensor | None, logits: Tensor, *, elementwise: bool) -> Tensor:
    """The mask on the logits' device, of shape logits.shape[:-1], or logits.shape where each output is a prediction."""
    whole = logits.shape if elementwise else logits.shape[:-1]
    if mask is None:
        return torch.ones(whole, dtype=torch.bool, device=logits.device)
    mask = mask.to(logits.device)
    if elementwise and mask.shape == logits.shape[:-1]:
        return mask.unsqueeze(-1).expand(whole)
    if mask.shape != whole:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, but for logits of shape {tuple(logits.shape)} it must be "
            f"{tuple(whole)}: one bool a prediction"
        )
    return mask


def _shapes(output: Any) -> str:
    return f" of keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
