"""A parameter of :class:`SophiaK` with the settings of its group: what its step is made of."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophia.optim import kronecker, update
from sophia.optim.dtensor import is_dtensor, local
from sophia.optim.matrix_dtype import product_dtype
from sophia.optim.matrix_owners import Place
from sophia.optim.matrix_update import MatrixRule


class Member(NamedTuple):
    """One parameter and its group."""

    p: Tensor
    group: Mapping[str, Any]
    place: Place | None = None
    """Of a hidden matrix that lies in shards; None for all that is whole, or needs not be."""

    @property
    def here(self) -> bool:
        """Whether what its basis needs is on this rank."""
        return self.place is None or self.place.here

    @property
    def hidden(self) -> bool:
        """Whether it is a hidden layer's matrix."""
        return self.p.ndim == 2 and bool(self.group["hidden"])

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether rows and columns have a basis."""
        if not self.hidden:
            return False, False
        tie = 1 - self.split_dim if self.split > 1 else 0  # a side that its matrices share costs one basis, not several
        return kronecker.turned(self._part_shape, self.group["basis"], self.group["max_basis_dim"], tie)

    @property
    def split(self) -> int:
        """Of how many matrices it is put together."""
        return int(self.group["split"]) if self.hidden else 1

    @property
    def split_dim(self) -> int:
        """Along which they lie beside each other: its longer side."""
        return 0 if self.p.shape[0] >= self.p.shape[-1] else 1

    @property
    def _part_shape(self) -> tuple[int, ...]:
        """Of each of its matrices."""
        return tuple(
            size // self.split if self.split > 1 and dim == self.split_dim else size
            for dim, size in enumerate(self.p.shape)
        )

    @property
    def shared(self) -> tuple[bool, bool]:
        """Whether all its matrices have one basis of rows, of columns."""
        return self.split > 1 and self.split_dim == 1, self.split > 1 and self.split_dim == 0

    def parts(self, x: Tensor) -> Tensor:
        """What is of its shape, as its matrices: [matrices, rows, columns], or x itself where it is one."""
        return kronecker.parts(x, self.split, self.split_dim) if self.split > 1 else x

    def whole(self, several: Tensor) -> Tensor:
        """The way back from `parts`."""
        return kronecker.whole(several, self.split_dim) if self.split > 1 else several

    @property
    def sampled_sides(self) -> tuple[bool, bool]:
        """Whether rows and columns have a basis of sampled curvature."""
        return self.sides if self.group["factors"] == "curvature" else (False, False)

    @property
    def samples_diagonal(self) -> bool:
        """Whether its diagonal is one of sampled curvature; else of squared gradients."""
        return bool(self.group["diagonal" if self.hidden else "others"] == "curvature")

    @property
    def wants_curvature(self) -> bool:
        """Whether its step uses sampled curvature."""
        return self.samples_diagonal or any(self.sampled_sides)

    @property
    def diagonal_name(self) -> str:
        """Of its diagonal in the state."""
        return "hessian" if self.samples_diagonal else "exp_avg_sq"

    @property
    def rule(self) -> MatrixRule:
        """Of its step; where it is no hidden matrix, Sophia's, to a length."""
        names = ("gamma", "eps", "exponent", "clip", "orthogonalize", "update_rms", "rtol")
        settings = {name: self.group[name] for name in names}
        if not self.hidden:
            settings |= {"exponent": 1.0, "clip": True, "orthogonalize": 0}
        return MatrixRule(**settings, product_dtype=self.product_dtype)

    @property
    def product_dtype(self) -> torch.dtype | None:
        """In which it is turned; None is that of the arithmetic."""
        if not self.hidden:
            return None
        return product_dtype(self.group["product_dtype"], self.p.device, update.compute_dtype(self.p))

    @property
    def follows_gradients(self) -> bool:
        """Whether diagonal or statistics are made of gradients."""
        return not self.samples_diagonal or (any(self.sides) and self.group["factors"] == "gradients")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in its state, on all ranks together."""
        found = {name: tuple(self.p.shape) for name in ("exp_avg", self.diagonal_name)}
        for dim, side in enumerate(("row", "column")):
            if self.sides[dim]:
                size = self._part_shape[dim]
                several = () if self.split == 1 or self.shared[dim] else (self.split,)
                found |= dict.fromkeys((f"{side}_statistics", f"{side}_basis"), (*several, size, size))
        return found

    def complete(self, state: dict[str, Any], dtype: torch.dtype, exact: torch.dtype) -> None:
        """Start what is missing in its state, and drop what another setting left there, or what another rank holds.

        Args:
            state: of the parameter.
            dtype: of momentum and sampled diagonal.
            exact: of all else.
        """
        wanted = {name: shape for name, shape in self.shapes().items() if self.here or name == "exp_avg"}
        for name in ("step", "refreshes"):
            state.setdefault(name, torch.zeros((), dtype=torch.float32))
        for name in set(state) - {"step", "refreshes"} - set(wanted):
            del state[name]
        for name, shape in wanted.items():
            if name in state or (name == "exp_avg_sq" and float(state["step"]) > 0):
                continue  # an average that begins late begins with its first gradient
            if name.endswith("_basis"):
                state[name] = torch.eye(shape[-1], dtype=exact, device=self.p.device).expand(shape).clone()
            elif name.endswith("_statistics"):
                state[name] = torch.zeros(shape, dtype=exact, device=self.p.device)
            else:
                state[name] = self.zeros(name, exact if name == "exp_avg_sq" else dtype)

    def lacks_bases(self, state: Mapping[str, Any]) -> bool:
        """Whether a state that was loaded, whole, has an average already and nothing to make its bases of."""
        wanted = [side for side, turned in zip(("row", "column"), self.sides, strict=True) if turned]
        begun = float(state.get("refreshes" if any(self.sampled_sides) else "step", 0)) > 0
        known = (state.get(f"{side}_statistics") for side in wanted)
        return begun and any(one is None or not bool(one.any()) for one in known)

    def zeros(self, name: str, dtype: torch.dtype) -> Tensor:
        """A momentum, sharded as the parameter is, or a diagonal, which is whole where it is a hidden matrix's."""
        if name == "exp_avg" or not self.hidden:
            return torch.zeros_like(self.p, dtype=dtype, memory_format=torch.preserve_format)
        if self.place is None:
            return torch.zeros_like(local(self.p), dtype=dtype, memory_format=torch.preserve_format)
        return torch.zeros(self.place.shape, dtype=dtype, device=self.p.device)

    def put_together(self, state: dict[str, Any]) -> None:
        """Make whole what was loaded in shards, as another Sophia's diagonal is. All ranks call it."""
        for name in sorted(state):
            if self.hidden and name != "exp_avg" and is_dtensor(state[name]):
                state[name] = state[name].full_tensor()
