"""Settings of all tests."""

import signal

import torch

# Small tensors gain nothing from threads, and the runner starts one process a core.
torch.set_num_threads(1)

# A shell starts what it puts into the background with SIGINT ignored, and so every child of it. Tests that interrupt
# would wait for ever there.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
