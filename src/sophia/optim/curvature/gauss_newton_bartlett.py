"""The Gauss-Newton-Bartlett estimator (paper, section 2.3 and algorithm 2)."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sophia.optim.curvature.deferred import deferred_logits
from sophia.optim.curvature.estimator import Forward, Refresh, without_autocast
from sophia.optim.curvature.likelihood import LIKELIHOODS, NOISES
from sophia.optim.curvature.outputs import Outputs, read_outputs
from sophia.optim.dtensor import localise
from sophia.optim.gradients import GradientInPartsError, handed_over, isolated_gradients
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
                `.logits`, or the scalar that `sophia.curvature.deferred_logits` makes of them, or (one of these, mask)
                with a bool mask of shape logits.shape[:-1], true where one counts. A mask on the host is read without
                waiting for the device.
            params: the parameters, in the order of the result.
            refresh: seed, step, rows and replicas.

        Raises:
            ValueError: on all ranks, when an output does not fit the estimator or no prediction counts on any rank.
        """
        squares, factor = self.sums(forwards, params, refresh)
        return [None if square is None else square.mul_(factor) for square in squares]

    def sums(
        self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh
    ) -> tuple[list[Tensor | None], float]:
        """Σ_c s_c ⊙ s_c, one fp32 tensor or None a parameter, and 1/N; as :meth:`estimate`, which is their product."""
        try:
            squares, total = self._sums_of_squares(forwards, params, refresh, streams=refresh.replicas.alone)
        except GradientInPartsError:  # a square of parts is another number: begin again, with whole gradients
            squares, total = self._sums_of_squares(forwards, params, refresh, streams=False)
        return squares, 1 / total

    def chunk_gradients(
        self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh
    ) -> Iterator[tuple[list[Tensor | None], int]]:
        """(s_c, its count of predictions) chunk by chunk: what other curvature than a diagonal can be made of too.

        The tensors are the caller's own. Whoever drops them before asking for the next chunk has one set at a time.
        """
        checked = False
        for chunk in self._chunks(forwards, params, refresh):
            with chunk.backward_pass():
                totals = refresh.replicas.sum_gradients([p.grad for p in params], params)
            if refresh.scale != 1:
                totals = [None if s is None else s.div_(refresh.scale) for s in totals]
            if not checked:
                refresh.replicas.check_reduced(totals, params)
                checked = True
            count = chunk.count
            del chunk
            yield totals, count
            del totals

    def _sums_of_squares(
        self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh, *, streams: bool
    ) -> tuple[list[Tensor | None], int]:
        """Σ_c s_c² of each parameter and the count of predictions.

        Args:
            forwards, params, refresh: as for `estimate`.
            streams: square each parameter's gradient as soon as the backward pass has it. Then the gradients of a chunk
                never exist together, and a refresh holds no more tensors of the model's size than a training step.
        """
        squares: list[Tensor | None] = [None] * len(params)
        total = 0

        def take(index: int, gradient: Tensor) -> None:
            part = localise(gradient, params[index])
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            known = squares[index]
            # Not in the gradient's place: those of one pass may share their memory. The scale is a power of two.
            if known is None:
                squares[index] = (part * part).mul_(refresh.scale**-2)
            else:
                known.addcmul_(part, part, value=refresh.scale**-2)

        if streams:
            for chunk in self._chunks(forwards, params, refresh):
                with handed_over(params, take), chunk.backward_pass():
                    total += chunk.count
                del chunk
            return squares, total
        for gradients, count in self.chunk_gradients(forwards, params, refresh):
            total += count
            for index, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                known = squares[index]
                squares[index] = gradient.square_() if known is None else known.addcmul_(gradient, gradient)
            # Not beside those of the next chunk: at its peak a refresh holds one set of gradients and the squares.
            del gradients, gradient
        return squares, total

    def _chunks(self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh) -> Iterator["_Chunk"]:
        """The chunks that count anything on any rank, each after its forward pass."""
        deferred_logits.keep_from_compiler()
        total = first_row = 0
        for index in range(len(forwards)):
            for number in range(self.chunks):
                # In a list that lets go of it: no chunk's graph is left when the next forward pass begins.
                held = [self._forward(forwards, params, refresh, index, number, first_row)]
                rows, count = held[0].outputs.rows, held[0].count
                if count > 0:
                    total += count
                    yield held.pop()
                held.clear()
            first_row += rows
        if total == 0:
            raise ValueError(
                "no prediction counts on any rank: the mask given with the logits (attach() makes it from labels that "
                "are not -100) is False everywhere; it must be True where a label contributes to the loss"
            )

    def _forward(
        self,
        forwards: Sequence[Forward],
        params: Sequence[Tensor],
        refresh: Refresh,
        index: int,
        number: int,
        first_row: int,
    ) -> "_Chunk":
        """Run one forward; all ranks learn how many predictions of this chunk count, or that one of them failed."""
        outputs, error = None, None
        try:
            with refresh.forward_pass(index, params):
                outputs = read_outputs(forwards[index](), self)
            rows = _row_numbers(refresh, first_row, outputs.rows, last=index == len(forwards) - 1)
            if self.chunks > 1:
                outputs.keep_rows(rows % self.chunks == number)
        except Exception as problem:  # whatever it is, the other ranks must hear of it
            error = problem
        counted = 0 if outputs is None else outputs.counted()
        counts = refresh.replicas.agree(error, [counted], params[0].device)
        assert outputs is not None
        # Rows numbered by the caller are global: their noise must not depend on which rank holds them.
        rank = refresh.replicas.rank if refresh.rows is None else 0
        return _Chunk(
            estimator=self,
            params=params,
            outputs=outputs,
            keys=row_keys(stream_key(refresh.seed, refresh.step, rank), rows),
            counted=counted,
            count=sum(theirs for (theirs,) in counts),
            scale=refresh.scale,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """Predictions whose summed gradient is to be squared."""

    estimator: GaussNewtonBartlett
    params: Sequence[Tensor]
    outputs: Outputs
    keys: Tensor
    """Int64 [rows], one stream of noise a row."""
    counted: int
    """Predictions that count on this rank."""
    count: int
    """Predictions that count on all ranks."""
    scale: float
    """Factor on the gradients."""

    @contextlib.contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Inside, `.grad` of the parameters holds the scaled gradients of this chunk alone; after it, what it did."""
        anchor = self.outputs.anchor
        with isolated_gradients(self.params, anchor), without_autocast(anchor.device):
            self.outputs.backward(self.estimator, self.keys, self.counted, self.scale)
            yield


def _row_numbers(refresh: Refresh, first: int, rows: int, *, last: bool) -> Tensor:
    """The numbers that the noise of these rows belongs to, on the host."""
    if refresh.rows is None:
        return torch.arange(first, first + rows)
    numbers = refresh.rows[first : first + rows]
    if len(numbers) != rows or (last and first + rows != len(refresh.rows)):
        raise ValueError(
            f"rows holds {len(refresh.rows)} indices, but the logits have {first + rows} rows"
            f"{'' if last else ' or more'}: give one global index for each row of the batch, over all forwards"
        )
    return numbers.cpu()
