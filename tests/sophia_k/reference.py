"""SophiaK's rule in float64 with numpy, as plainly as it can be written, one parameter at a time.

Nothing here was written from the code; Newton-Schulz is that of the baselines' references.
"""

import numpy as np

from tests.baselines.references import newton_schulz

DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "gamma": 0.05,
    "eps": 1e-12,
    "weight_decay": 0.1,
    "curvature_interval": 10,
    "hidden": True,
    "basis": "smaller",
    "factors": "curvature",
    "diagonal": "curvature",
    "exponent": 0.5,
    "clip": True,
    "orthogonalize": 5,
    "update_rms": 0.1,
    "nesterov": True,
    "others": "gradients",
    "nu": 0.5,
    "rtol": 1e-4,
    "max_basis_dim": 8192,
    "maximize": False,
}


class Parameter:
    """θ and its state: `m`, `squares` (D), `sides` with statistics and bases, `steps` and `refreshes`.

    A side that is not turned keeps the identity. Where statistics are singular their eigenvectors are not determined:
    `borrowed` gives (Q_R, Q_C), which are then only checked.
    """

    def __init__(self, theta, tie=0, **settings):
        assert settings.keys() <= DEFAULTS.keys()
        self.tie = tie  # the side that counts as the smaller where they are equal
        for name, value in {**DEFAULTS, **settings}.items():
            setattr(self, name, value)
        self.beta1, self.beta2 = self.betas
        self.theta = np.array(theta, dtype=np.float64)
        self.m = np.zeros_like(self.theta)
        self.squares = np.zeros_like(self.theta)
        self.steps = self.refreshes = 0
        self.hidden = self.hidden and self.theta.ndim == 2
        self.source = self.diagonal if self.hidden else self.others
        self.turns = self._turns()
        shape = self.theta.shape if self.hidden else (0, 0)
        self.statistics = [np.zeros((size, size)) for size in shape]
        self.bases = [np.eye(size) for size in shape]

    def _turns(self):
        if not self.hidden or self.basis == "none":
            return (False, False)
        rows, columns = self.theta.shape
        smaller = self.tie if rows == columns else int(rows > columns)
        wanted = (True, True) if self.basis == "both" else (smaller == 0, smaller == 1)
        return tuple(want and size <= self.max_basis_dim for want, size in zip(wanted, self.theta.shape, strict=True))

    # ---- bases

    def turned(self, x):
        return self.bases[0].T @ x @ self.bases[1] if self.hidden else x

    def turned_back(self, x):
        return self.bases[0] @ x @ self.bases[1].T if self.hidden else x

    def _begin(self, borrowed):
        """All eigenvectors of the statistics; what was measured before is seen from there."""
        new = list(self.bases)
        for side in np.flatnonzero(self.turns):
            values, vectors = np.linalg.eigh(self.statistics[side])
            if borrowed is not None and values[0] < 1e-9 * values[-1]:
                vectors = np.asarray(borrowed[side], dtype=np.float64)[:, ::-1]
                seen = vectors.T @ self.statistics[side] @ vectors
                np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-5)
                np.testing.assert_allclose(seen, np.diag(values), atol=1e-5 * values[-1])
            new[side] = vectors[:, ::-1]
        self._carry(new)

    def _move(self):
        """One step of orthogonal iteration from columns in the order of their Rayleigh quotients, largest first."""
        new = list(self.bases)
        for side in np.flatnonzero(self.turns):
            q, s = self.bases[side], self.statistics[side]
            order = sorted(range(len(q)), key=lambda column, q=q, s=s: -(q[:, column] @ s @ q[:, column]))
            new[side] = np.linalg.qr(s @ q[:, order])[0]
        self._carry(new)

    def _carry(self, new):
        """D ← (O_R²)ᵀ D O_C², O = Q_oldᵀ Q_new."""
        overlaps = [(old.T @ q) ** 2 for old, q in zip(self.bases, new, strict=True)]
        self.squares = overlaps[0].T @ self.squares @ overlaps[1]
        self.bases = new

    # ---- refreshes and steps

    def refresh(self, estimate, borrowed=None, shared=None):
        """Fold in S_c / √N, [chunks, rows, columns], of a hidden matrix; of another parameter its diagonal.

        `shared` gives, by side, the outer products of all matrices that have a basis of it in common.
        """
        if estimate is None:
            return
        estimate = np.array(estimate, dtype=np.float64)
        self.refreshes += 1
        weight = (1 - self.beta2) / (1 - self.beta2**self.refreshes)
        sampled = self.hidden and self.factors == "curvature"
        if sampled:
            outer = self._outer(estimate, shared)
            self.statistics = [(1 - weight) * s + weight * o for s, o in zip(self.statistics, outer, strict=True)]
        if sampled and self.refreshes == 1:
            self._begin(borrowed)
        if self.source == "curvature":
            seen = sum(self.turned(s) ** 2 for s in estimate) if self.hidden else estimate
            self.squares = (1 - weight) * self.squares + weight * seen
        if sampled and self.refreshes > 1:
            self._move()

    def _outer(self, gradients, shared):
        """Σ S Sᵀ and Σ Sᵀ S."""
        own = {0: sum(s @ s.T for s in gradients), 1: sum(s.T @ s for s in gradients)} | (shared or {})
        return own[0], own[1]

    def step(self, gradient, borrowed=None, shared=None):
        g = np.array(gradient, dtype=np.float64) * (-1 if self.maximize else 1)
        self.steps += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        if self.source == "gradients":
            self.squares = self.beta2 * self.squares + (1 - self.beta2) * self.turned(g) ** 2
        if self.refreshes > 0 or not self._needs_curvature():
            self.theta = self.theta - self.lr * self.weight_decay * self.theta - self.lr * self.update(g)
        if self.hidden and self.factors == "gradients":
            self._follow(g, borrowed, shared)

    def _follow(self, g, borrowed, shared):
        outer = self._outer([g], shared)
        self.statistics = [self.beta2 * s + (1 - self.beta2) * o for s, o in zip(self.statistics, outer, strict=True)]
        if self.steps == 1:
            self._begin(borrowed)
            if self.source == "gradients":
                self.squares = (1 - self.beta2) * self.turned(g) ** 2
        elif self.steps % self.curvature_interval == 0:
            self._move()

    def _needs_curvature(self):
        return self.source == "curvature" or (self.hidden and self.basis != "none" and self.factors == "curvature")

    def measured(self, d):
        """D, with its mean along eigenvectors that have next to none."""
        found = d.copy()
        for side in np.flatnonzero(self.turns):
            for direction in range(d.shape[side]):
                place = (direction, slice(None)) if side == 0 else (slice(None), direction)
                if d[place].mean() < self.rtol * d.mean():
                    found[place] = d.mean()
        return found

    def update(self, g):
        """U, for a learning rate of 1."""
        d = self.squares / (1 - self.beta2**self.steps) if self.source == "gradients" else self.squares
        if not self.hidden and self.others == "gradients":
            ahead = self.nu * self.m / (1 - self.beta1**self.steps) + (1 - self.nu) * g
            return ahead / (np.sqrt(d) + 1e-8)
        x = self.beta1 * self.m + (1 - self.beta1) * g if self.hidden and self.nesterov else self.m
        d = self.measured(d)
        u = self.turned(x) / np.maximum(self.gamma * d ** (self.exponent if self.hidden else 1.0), self.eps)
        if self.clip:
            u = np.clip(u, -1, 1)
        u = self.turned_back(u)
        if self.hidden and self.orthogonalize:
            u = newton_schulz(u, self.orthogonalize)
        return u if self.update_rms is None else self.update_rms * u / np.sqrt(np.mean(u**2))


class Fused:
    """A weight that is `split` matrices beside each other along its longer side: a `Parameter` for each.

    What they share are the statistics of the other side, which are those of all of them.
    """

    def __init__(self, theta, split, **settings):
        self.dim = 0 if theta.shape[0] >= theta.shape[1] else 1
        self.split = split
        self.parts = [Parameter(part, tie=1 - self.dim, **settings) for part in self.cut(theta)]

    def cut(self, x):
        return np.split(np.asarray(x, dtype=np.float64), self.split, axis=x.ndim - 2 + self.dim)

    def joined(self, name):
        return np.concatenate([getattr(part, name) for part in self.parts], axis=self.dim)

    def _shared(self, gradients):
        other = 1 - self.dim
        return {other: sum(g @ g.T if other == 0 else g.T @ g for g in gradients)}

    def _borrowed(self, bases):
        """Of each: what all share has one basis, the other side has several."""
        return [
            [None if q is None else q[number] if side == self.dim else q for side, q in enumerate(bases)]
            for number in range(self.split)
        ]

    def refresh(self, estimate, bases):
        cut = self.cut(estimate)
        shared = self._shared([g for part in cut for g in part])
        for part, own, borrowed in zip(self.parts, cut, self._borrowed(bases), strict=True):
            part.refresh(own, borrowed, shared)

    def step(self, gradient, bases):
        cut = self.cut(gradient)
        shared = self._shared(cut)
        for part, own, borrowed in zip(self.parts, cut, self._borrowed(bases), strict=True):
            part.step(own, borrowed, shared)
