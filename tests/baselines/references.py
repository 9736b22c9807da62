"""The baselines' rules from their papers' formulas, in float64 with numpy, one parameter at a time.

Each class has `step(theta, g, lr, decay)`, which returns the next parameter. Nothing here was written from code.
"""

import numpy as np


class AdamW:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, with the decay times the learning rate."""

    def __init__(self, beta1, beta2, eps=1e-8):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, theta, g, lr, decay):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        return theta - lr * (self.direction(g) + decay * theta)

    def direction(self, g):
        m_hat = self.m / (1 - self.beta1**self.t)
        return m_hat / (np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps)


class NAdamW(AdamW):
    """Dozat 2016 (openreview OM0jvwB8jIp57ZJjtNEZ), algorithm 2, with μ the same in all steps; decay as AdamW's."""

    def direction(self, g):
        mu, t = self.beta1, self.t
        m_hat = mu * self.m / (1 - mu ** (t + 1)) + (1 - mu) * g / (1 - mu**t)
        return m_hat / (np.sqrt(self.v / (1 - self.beta2**t)) + self.eps)


class NAdamWithSchedule:
    """The same with the paper's μ_t = β1 (1 − ½ 0.96^(t ψ)), in the average of gradients as well."""

    def __init__(self, beta1, beta2, psi=4e-3, eps=1e-8):
        self.beta1, self.beta2, self.psi, self.eps = beta1, beta2, psi, eps
        self.t, self.m, self.v, self.product = 0, 0.0, 0.0, 1.0

    def step(self, theta, g, lr, decay):
        self.t += 1
        mu, following = (self.beta1 * (1 - 0.5 * 0.96 ** (t * self.psi)) for t in (self.t, self.t + 1))
        self.product *= mu
        self.m = mu * self.m + (1 - mu) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m_hat = following * self.m / (1 - self.product * following) + (1 - mu) * g / (1 - self.product)
        v_hat = self.v / (1 - self.beta2**self.t)
        return theta - lr * (m_hat / (np.sqrt(v_hat) + self.eps) + decay * theta)


class Lion:
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2."""

    def __init__(self, beta1, beta2):
        self.beta1, self.beta2, self.m = beta1, beta2, 0.0

    def step(self, theta, g, lr, decay):
        c = self.beta1 * self.m + (1 - self.beta1) * g
        self.m = self.beta2 * self.m + (1 - self.beta2) * g
        return theta - lr * (np.sign(c) + decay * theta)


class Signum:
    """Bernstein et al. 2018 (arXiv 1802.04434), algorithm 2, with decoupled decay."""

    def __init__(self, beta):
        self.beta, self.m = beta, 0.0

    def step(self, theta, g, lr, decay):
        self.m = self.beta * self.m + (1 - self.beta) * g
        return theta - lr * (np.sign(self.m) + decay * theta)


def newton_schulz(x, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """Muon's quintic iteration (Jordan et al. 2024): X ← aX + b(XXᵀ)X + c(XXᵀ)²X from X / ‖X‖."""
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class Muon:
    """Jordan et al. 2024 with Nesterov's momentum, scaled to AdamW's size by 0.2 √max(A, B) (arXiv 2502.16982)."""

    def __init__(self, momentum):
        self.momentum, self.b = momentum, 0.0

    def step(self, theta, g, lr, decay):
        self.b = self.momentum * self.b + g
        update = 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g + self.momentum * self.b)
        return theta - lr * (update + decay * theta)


class SOAP:
    """Vyas et al. 2024 (arXiv 2409.11321), algorithms 3 and 4, for a matrix; with Adam's bias corrections.

    As our class says: the first step is Adam's, and the bases come of the first gradient's statistics after it. Where
    these are singular the first bases are not determined: `first` gives them.
    """

    def __init__(self, beta1, beta2, interval, sides=(True, True), eps=1e-8):
        self.beta1, self.beta2, self.interval, self.sides, self.eps = beta1, beta2, interval, sides, eps
        self.t, self.m, self.v, self.statistics, self.bases = 0, 0.0, 0.0, [0.0, 0.0], None

    def step(self, theta, g, lr, decay, first=None):
        self.t += 1
        left, right = self.bases or [np.eye(size) for size in g.shape]
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        turned = left.T @ g @ right
        self.v = self.beta2 * self.v + (1 - self.beta2) * turned**2
        m_hat = left.T @ self.m @ right / (1 - self.beta1**self.t)
        n = m_hat / (np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps)
        for side, outer in enumerate((g @ g.T, g.T @ g)):
            self.statistics[side] = self.beta2 * self.statistics[side] + (1 - self.beta2) * outer
        theta = theta - lr * (left @ n @ right.T + decay * theta)
        if self.t == 1:
            self.bases = first or [np.linalg.eigh(s)[1][:, ::-1] for s in self.statistics]
            self.bases = [q if turns else np.eye(len(q)) for q, turns in zip(self.bases, self.sides, strict=True)]
            self.v = (1 - self.beta2) * (self.bases[0].T @ g @ self.bases[1]) ** 2
        elif self.t % self.interval == 0:
            for side in np.flatnonzero(self.sides):
                self._move(side)
        return theta

    def _move(self, side):
        """Algorithm 4, after the columns were sorted by their eigenvalues as estimated, and the squares with them."""
        q = self.bases[side]
        values = np.diag(q.T @ self.statistics[side] @ q)
        order = sorted(range(len(values)), key=lambda index: -values[index])
        self.bases[side] = np.linalg.qr(self.statistics[side] @ q[:, order])[0]
        self.v = self.v[order] if side == 0 else self.v[:, order]
