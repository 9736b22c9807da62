"""Run by `make wheel-test` in an environment that has the built wheel and torch only."""

import importlib.metadata
import pathlib
import subprocess
import sys
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that it misses numpy; we do not
    import torch
    from torch.nn import functional as F

warnings.simplefilter("error")

import sophia  # noqa: E402

package = pathlib.Path(sophia.__file__).parent
assert "site-packages" in package.parts, f"sophia comes from {package}, not from the wheel"
for name in ("py.typed", "reference.json", "study/default.toml"):
    assert (package / name).exists(), f"the wheel lacks {name}"
assert importlib.metadata.version("sophia-lm") == sophia.__version__

model = torch.nn.Linear(4, 3)
inputs, targets = torch.randn(16, 4), torch.randint(0, 3, (16,))
optimizer = sophia.SophiaG(model.parameters(), lr=0.1).attach(model)
losses = []
for _ in range(20):
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses

# The command line needs the extra "train", and says so.
for command in ("demo", "prepare", "train", "eval", "sample", "export", "plan"):
    answer = subprocess.run([sys.executable, "-m", "sophia", command], capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer
    assert "sophia-lm[train]" in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr, answer.stderr
print(f"wheel {sophia.__version__}: imports, trains, and asks for its extra")
