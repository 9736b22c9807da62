"""Parameter groups for :class:`SophiaK`: which weights are matrices of hidden layers, and which only look like them."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

# Of Adam's rule, which moves all else; the momentum of hidden matrices is longer.
ADAM_BETAS = (0.9, 0.98)
# What wrappers (DDP, torch.compile, activation checkpoints) put into names.
_WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")

# Names of weights that hold queries, keys and values one after the other: GPT-2's (also nanoGPT's), torch's own, MPT's,
# and this package's. (Where heads take turns, as in GPT-NeoX's `query_key_value`, no cut gives the three.)
_FUSED = ("c_attn.weight", "in_proj_weight", "Wqkv.weight", "queries_keys_values.weight")

Head = nn.Module | Literal["auto"] | None


def matrix_groups(
    model: nn.Module, *, exclude: Sequence[str], head: Head, split: Mapping[str, int] | Literal["auto"] | None
) -> list[dict[str, Any]]:
    """See :meth:`SophiaK.groups`."""
    named = {short(name): p for name, p in model.named_parameters()}
    outside = {*embeddings(model), *_head(model, head), *_matching(exclude, named)}
    hidden = [p for p in named.values() if p.ndim == 2 and p not in outside]
    rest: dict[str, Any] = {"hidden": False, "betas": ADAM_BETAS}
    kept = set(hidden)
    counts = _counts({name: p for name, p in named.items() if p in kept}, split)
    fused = [
        {"params": [p for p in hidden if counts.get(p) == count], "hidden": True, "split": count}
        for count in sorted(set(counts.values()))
    ]
    found: list[dict[str, Any]] = [
        {"params": [p for p in hidden if p not in counts], "hidden": True},
        *fused,
        {"params": [p for p in named.values() if p not in kept and p.ndim >= 2], **rest},
        {"params": [p for p in named.values() if p.ndim < 2], **rest, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def short(name: str) -> str:
    """A parameter's name without what wrappers of its modules put into it."""
    for wrapper in _WRAPPERS[1:]:
        name = name.replace(wrapper, "")
    return name.removeprefix(_WRAPPERS[0])


def embeddings(model: nn.Module) -> dict[Tensor, str]:
    """The weights of all embeddings, tied ones too, with their names."""
    return {
        module.weight: short(f"{name}.weight".removeprefix("."))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }


def _matching(patterns: Sequence[str], named: dict[str, nn.Parameter]) -> Iterator[Tensor]:
    if isinstance(patterns, str):
        raise ValueError(f"exclude={patterns!r} is one text: give a list of patterns, [{patterns!r}]")
    for pattern in patterns:
        hit = [p for name, p in named.items() if fnmatch.fnmatchcase(name, pattern)]
        if not hit:
            raise ValueError(
                f"exclude: {pattern!r} matches no parameter: give shell wildcards on names, which begin with "
                f"{', '.join(list(named)[:4])}"
            )
        yield from hit


def _counts(hidden: Mapping[str, Tensor], split: Mapping[str, int] | Literal["auto"] | None) -> dict[Tensor, int]:
    """Of how many matrices those weights consist that are more than one."""
    if split is None:
        return {}
    if split == "auto":
        fused = {p: 3 for name, p in hidden.items() if name.endswith(_FUSED) and max(p.shape) == 3 * min(p.shape)}
        if not fused:
            raise ValueError(
                f"split='auto' found no fused queries, keys and values: no hidden weight's name ends in "
                f"{', '.join(_FUSED)} with a side three times the other; leave it out, or give {{pattern: number}}"
            )
        return fused
    if not isinstance(split, Mapping):
        raise ValueError(f"split={split!r} must be 'auto', None or a dict {{pattern on names: number of matrices}}")
    counts: dict[Tensor, int] = {}
    for pattern, count in split.items():
        hit = [p for name, p in hidden.items() if fnmatch.fnmatchcase(name, pattern)]
        if not hit:
            raise ValueError(
                f"split: {pattern!r} matches no hidden matrix: give shell wildcards on names, which begin with "
                f"{', '.join(list(hidden)[:4])}"
            )
        counts |= dict.fromkeys(hit, count)
    return counts


def _head(model: nn.Module, head: Head) -> list[Tensor]:
    """The weight of the output head, unless it is an embedding's."""
    if head is None:
        return []
    if isinstance(head, nn.Module):
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not any(weight is p for p in model.parameters()):
            raise ValueError(f"head={type(head).__name__} has no weight that is the model's: give its output layer")
        return [weight]
    if head != "auto":
        raise ValueError(f"head={head!r} must be the output layer itself (head=model.lm_head), 'auto' or None")
    return _found_head(model)


def _found_head(model: nn.Module) -> list[Tensor]:
    """By what the model says (transformers), by the embedding that it shares, by the vocabulary, or as the last."""
    asked = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    told = (ask() for ask in asked if callable(ask))
    weights = _weights(module for module in told if isinstance(module, nn.Module))
    if weights:
        return weights[:1]
    tokens = embeddings(model)
    linear = _weights(module for module in model.modules() if isinstance(module, nn.Linear))
    if any(weight in tokens for weight in linear):
        return []
    vocabulary = max((len(weight) for weight in tokens), default=None)
    likely = [weight for weight in linear if vocabulary is None or len(weight) == vocabulary]
    if not likely:
        raise ValueError(
            "found no output head, a linear layer with a row for each of the vocabulary: name it, head=model.lm_head "
            "say, or give head=None where the model has none, or uses an embedding's weight for it"
        )
    return likely[-1:]


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    found = (getattr(module, "weight", None) for module in modules)
    return [weight for weight in found if isinstance(weight, Tensor)]
