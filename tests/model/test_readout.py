"""`GPT.forward` with a readout: what is made of the hidden states in place of logits."""

import pytest
import torch
import torch.nn.functional as F

from sophia.model import GPT, GPTConfig

SHAPE = {"vocab_size": 50, "context": 16, "layers": 2, "heads": 2, "width": 8}


def tokens():
    return torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))


class PlainLoss:
    """The sum of all cross-entropies, by way of the logits."""

    def __init__(self, targets):
        self.targets = targets

    def __call__(self, hidden, weight, vocab_size):
        logits = F.linear(hidden, weight)[..., :vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="sum")


@pytest.mark.parametrize("rows", [None, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_readout_sees_what_the_head_sees(rows, checkpointing):
    model = GPT(GPTConfig(**SHAPE, padded_vocab_size=rows, activation_checkpointing=checkpointing))
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten(), reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens(), PlainLoss(tokens())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiled_model_is_compiled_once_for_all_readouts_of_a_kind():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = GPT(GPTConfig(**SHAPE))
    expected = model(tokens(), PlainLoss(tokens())).item()
    model.compile(dynamic=False, backend=count)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            loss = model(tokens(), PlainLoss(tokens()))
            loss.backward()
            assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert len(graphs) == 1
