"""Settings of all tests."""

import torch

# Small tensors gain nothing from threads, and the runner starts one process a core.
torch.set_num_threads(1)
